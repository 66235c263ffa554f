"""CLIP's towers, walked block by block, with a bridge in some of the image blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from fastadapt import HiLoraLinear, frozen_group


class BridgedLayer(CLIPEncoderLayer):
    """CLIP's block with a bridge between its attention and its MLP: the class that a bridged layer is given."""

    def forward(self, hidden_states: Tensor, attention_mask: None = None, *, bridge: nn.Module, text: Any) -> Tensor:
        x = hidden_states
        attended, _ = self.self_attn(self.layer_norm1(x), attention_mask)
        x = bridge(x + attended, text)
        return x + self.mlp(self.layer_norm2(x))


class FusedBridgedLayer(BridgedLayer):
    """The same as frozen groups: neither a LayerNorm's output, nor an activation, nor a dropout mask is kept for the backward.

    A linear that is more than its tensors, such as one with hooks, makes it the layer above.
    """

    def forward(self, hidden_states: Tensor, attention_mask: None = None, *, bridge: nn.Module, text: Any) -> Tensor:
        x, attention, mlp = hidden_states, self.self_attn, self.mlp
        inputs = [_members(x, attention.q_proj, attention.k_proj, attention.v_proj), _members(x, attention.out_proj)]
        if None in inputs:
            return super().forward(x, attention_mask, bridge=bridge, text=text)
        q, k, v = (
            t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in _group(x, inputs[0], self.layer_norm1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        (update,) = _group(attended, inputs[1])
        x = bridge(x + update, text)
        (hidden,) = _group(x, [_frozen(mlp.fc1)], self.layer_norm2)
        (update,) = _group(hidden, [_frozen(mlp.fc2)], prologue=mlp.config.hidden_act)
        return x + update


def _members(x: Tensor, *linears: nn.Linear) -> list[tuple] | None:
    """What `frozen_group` takes for each linear; None if it cannot compute one."""
    found = [linear.member(x) if isinstance(linear, HiLoraLinear) else _frozen(linear) for linear in linears]
    return None if any(isinstance(member, str) for member in found) else found


def _frozen(linear: nn.Linear) -> tuple:
    return linear.weight, linear.bias, None, None, 1.0, 0.0


def _group(x: Tensor, members: Sequence[tuple], norm: nn.LayerNorm | None = None, **prologue: Any) -> tuple[Tensor, ...]:
    """Frozen linears, with or without LoRA, of x or of its LayerNorm or activation."""
    if norm is not None:
        prologue = {"prologue": "layer_norm", "norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
    weights, biases, lora_as, lora_bs, scales, dropouts = zip(*members)
    return frozen_group(x, weights, biases, lora_as, lora_bs, scales=scales, dropout_p=max(dropouts), **prologue).outputs


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + mask) v as (B, T, H D), and the map; q (B, H, T, D), k and v (B, H, S, D)."""
    q, k, v = (x.contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ k.mT
    weights = F.softmax(scores if mask is None else scores + mask, -1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class ReleasedAttention(CLIPAttention):
    """As the release's transformers has it: in the dtype of its input, with the map returned to whoever calls the layer."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> tuple[Tensor, Tensor]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projections)
        attended, weights = explicit_attention(q, k, v, attention_mask)
        return self.out_proj(attended), weights


def release(clip: CLIPModel) -> None:
    """Give CLIP the release's attention."""
    for tower in (clip.vision_model, clip.text_model):
        for layer in tower.encoder.layers:
            layer.self_attn.__class__ = ReleasedAttention


def text_states(tower: CLIPTextModel, input_ids: Tensor) -> list[Tensor]:
    """The embedding and the states after each block, (B, T, width), without the final LayerNorm."""
    x = tower.embeddings(input_ids)
    mask = None
    if tower.config._attn_implementation == "eager":
        length, least = x.shape[1], torch.finfo(x.dtype).min
        mask = torch.full((length, length), least, dtype=x.dtype, device=x.device).triu(1)[None, None]
    states = [x]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], mask, is_causal=True))
    return states


def image_states(tower: CLIPVisionModel, pixel_values: Tensor, bridges: Mapping[int, tuple[nn.Module, Any]]) -> list[Tensor]:
    """The embedding and the states after each block, (B, 1 + places, width); bridges: block -> its bridge and its text."""
    states = [tower.pre_layrnorm(tower.embeddings(pixel_values))]
    for index, layer in enumerate(tower.encoder.layers):
        if index in bridges:
            bridge, text = bridges[index]
            states.append(layer(states[-1], bridge=bridge, text=text))
        else:
            states.append(layer(states[-1], None))
    return states
