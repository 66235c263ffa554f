"""What ETRIS's released code runs: attention maps that are averaged and thrown away, copies, and tables made in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import GlobalAlignment
from fastadapt.models.etris.bridger import EagerBridger
from fastadapt.models.etris.decoder import EagerNeck


def with_map(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
) -> Tensor:
    """What nn.MultiheadAttention gives by default: the result (T, B, C), and the map of all heads' average, unused."""
    result, _ = F.multi_head_attention_forward(
        query, key, value, attention.embed_dim, attention.num_heads, attention.in_proj_weight, attention.in_proj_bias,
        None, None, False, attention.dropout, attention.out_proj.weight, attention.out_proj.bias,
        training=attention.training, key_padding_mask=key_padding_mask, need_weights=True,
    )  # fmt: skip
    return result


class ReleasedBridger(EagerBridger):
    """On maps (B, C, H, W) and sequences (T, B, C), with a copy of the stream that the update is written into."""

    def zoom_in(self, zoom: nn.Module, visual: Tensor) -> Tensor:
        if visual.ndim == 4:
            return super().zoom_in(zoom, visual)
        return _as_map(zoom.inward, visual[:, 1:]).mT

    def zoom_out(self, zoom: nn.Module, tokens: Tensor, visual: Tensor) -> Tensor:
        if visual.ndim == 4:
            return super().zoom_out(zoom, tokens, visual)
        visual = visual.clone()
        visual[:, 1:] += _as_map(zoom.outward, tokens).mT
        return visual

    def interact(self, interaction: nn.Module, v: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        v, t = (x.transpose(0, 1).contiguous() for x in (v, t))
        if hasattr(interaction, "attentions"):
            of_v, of_t = interaction.attentions
            found = v * with_map(of_v, v, t, t, mask), t * with_map(of_t, t, v, v)
        else:
            of_v, of_t = interaction.layers
            found = _decoded(of_v, v, t, None, mask), _decoded(of_t, t, v, mask, None)
        return tuple(x.transpose(0, 1) for x in found)


def _as_map(linear: nn.Module, tokens: Tensor) -> Tensor:
    """A 1x1 convolution, batch norm and ReLU of tokens (B, N, C), as (B, C', N)."""
    x = tokens.mT.contiguous()[..., None]  # N is height and width
    return F.relu(linear.norm(F.conv2d(x, linear.weight[:, :, None, None])[..., 0]))


def _decoded(layer: nn.Module, x: Tensor, memory: Tensor, x_mask: Tensor | None, memory_mask: Tensor | None) -> Tensor:
    """A layer of nn.TransformerDecoder, post-norm, with maps."""

    def drop(y: Tensor) -> Tensor:
        return F.dropout(y, layer.dropout, layer.training)

    x = layer.norm1(x + drop(with_map(layer.self_attn, x, x, x, x_mask)))
    x = layer.norm2(x + drop(with_map(layer.multihead_attn, x, memory, memory, memory_mask)))
    return layer.norm3(x + drop(layer.linear2(drop(F.relu(layer.linear1(x))))))


class ReleasedNeck(EagerNeck):
    """Of copies of the features; with "dead_parameters" a gate is attention from every place to one key, whose softmax is 1."""

    def forward(self, features: Sequence[Tensor], sentence: Tensor) -> Tensor:
        return super().forward([feature.contiguous() for feature in features], sentence)

    def _gated(self, index: int, level: Tensor, sentence: Tensor) -> Tensor:
        if self.dead is None:
            return super()._gated(index, level, sentence)
        places, key, heads = level.flatten(2).permute(2, 0, 1).contiguous(), sentence[None], 8
        gate, dead = self.gates[index], self.dead[index]
        linears = dead.q_proj, dead.k_proj, gate.v_proj
        result, _ = F.multi_head_attention_forward(
            places, key, key, self.width, heads, None, torch.cat([linear.bias for linear in linears]), None, None, False,
            0.0, gate.out_proj.weight, gate.out_proj.bias, training=self.training, need_weights=True,
            use_separate_proj_weight=True, q_proj_weight=dead.q_proj.weight, k_proj_weight=dead.k_proj.weight,
            v_proj_weight=gate.v_proj.weight,
        )  # fmt: skip
        return (places * result).permute(1, 2, 0).view(level.shape)


class ReleasedGlobalAlignment(GlobalAlignment):
    """With maps, and with the tables of positions made on the CPU in every step and moved in every layer."""

    def forward(self, vision: Tensor, words: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        height, width = vision.shape[2:]
        cpu, dtype = torch.device("cpu"), torch.float64 if vision.dtype == torch.float64 else torch.float32
        of_places = self.vision_positions.make(height, width, self.d_model, dtype, cpu)[:, None]
        of_words = self.word_positions.make(words.shape[1], self.d_model, dtype, cpu)[:, None]
        v, t = vision.flatten(2).permute(2, 0, 1).contiguous(), words.transpose(0, 1).contiguous()
        for layer in self.layers:
            v = _aligned(layer, v, t, (of_places, of_words), key_padding_mask)
        return self.norm(v).permute(1, 2, 0).unflatten(2, (height, width))


def _aligned(layer: nn.Module, v: Tensor, t: Tensor, positions: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """A layer of GlobalAlignment on v (places, B, C) and t (words, B, C)."""

    def drop(y: Tensor) -> Tensor:
        return F.dropout(y, layer.dropout, layer.training)

    places, words = positions
    x = layer.norm1(v)
    placed = x + places.to(v.device)
    v = v + drop(layer.self_attn_norm(with_map(layer.self_attn, placed, placed, x)))
    query, key = layer.norm2(v) + places.to(v.device), t + words.to(v.device)
    v = v + drop(layer.cross_attn_norm(with_map(layer.cross_attn, query, key, t, mask)))
    return v + drop(layer.ffn(layer.norm3(v)))
