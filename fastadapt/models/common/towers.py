"""Frozen towers that give their inner states: DETR's ResNet and encoder, and BERT; all from transformers' own modules."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, DetrConfig
from transformers.models.detr.modeling_detr import DetrConvEncoder, DetrEncoder, DetrEncoderLayer, DetrFrozenBatchNorm2d
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut


class Tap(NamedTuple):
    """What a layer lets out: the result of its attention, and of its second feed-forward linear."""

    attention: Tensor
    feed_forward: Tensor


class States(NamedTuple):
    """A tower's input embedding (B, N, width), its output of the same shape, the taps layer by layer, the padding (B, N)."""

    embedding: Tensor
    output: Tensor
    taps: list[Tap]
    padding: Tensor


def key_mask(padding: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """(B, 1, 1, N) for transformers' attention, from the bool padding (B, N): added to the logits, or True for keys kept."""
    if implementation == "eager":
        return torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill(
            padding, torch.finfo(dtype).min
        )[:, None, None]
    return ~padding[:, None, None]


def image_positions(padding: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """DETR's sine positions (B, H W, width) of the places of maps with this padding (B, H, W), True where there is no image.

        y = 2 pi row / rows,   x = 2 pi column / columns,   counted from 1 over what is image;
        [sin(y / T^(2i/h)), cos(y / T^(2i/h)), ...; the same of x],   h = width / 2

    (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020.)
    """
    image = (~padding).float()
    frequency = temperature ** (2 * (torch.arange(width // 2, device=padding.device) // 2) / (width // 2))
    halves = []
    for dim in (1, 2):
        count = image.cumsum(dim)
        angle = 2 * math.pi * count / (count.select(dim, -1).unsqueeze(dim) + 1e-6)
        angle = angle[..., None] / frequency
        halves.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(3))
    return torch.cat(halves, -1).flatten(1, 2)


class DetrTower(nn.Module):
    """DETR's ResNet, input projection and encoder, with the names and parameters they have in transformers' DetrModel.

    config: a DetrConfig whose backbone is a transformers ResNet; `_attn_implementation` chooses the encoder's attention.
    folded: whether each frozen batch norm is computed as part of the convolution before it, with the image's channels last.
        The parameters stay as they are, so that a state dict serves both.
    """

    def __init__(self, config: DetrConfig, folded: bool) -> None:
        super().__init__()
        self.config, self.folded = config, folded
        self.backbone = DetrConvEncoder(config)
        self.input_projection = nn.Conv2d(self.backbone.intermediate_channel_sizes[-1], config.d_model, kernel_size=1)
        self.encoder = DetrEncoder(config)
        if folded:
            for module in self.backbone.modules():
                if type(module) in _FOLDED and isinstance(module.normalization, DetrFrozenBatchNorm2d):
                    module.__class__ = _FOLDED[type(module)]

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> States:
        """Images (B, 3, H, W) and their mask (B, H, W), 1 for image and 0 for padding, to the encoder's states."""
        if self.folded:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features, mask = self.backbone(pixel_values, pixel_mask)[-1]
        padding = ~mask
        x = embedding = self.input_projection(features).flatten(2).transpose(1, 2).contiguous()
        positions = image_positions(padding, x.shape[-1]).to(x.dtype)
        padding = padding.flatten(1)
        keys = key_mask(padding, x.dtype, self.config._attn_implementation)
        taps = []
        for layer in self.encoder.layers:
            x, tap = detr_layer(layer, x, keys, positions)
            taps.append(tap)
        return States(embedding, x, taps, padding)


def detr_layer(layer: DetrEncoderLayer, x: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tap]:
    """One layer of the encoder and its tap, the attention's before the residual and the LayerNorm."""
    attended, _ = layer.self_attn(x, keys, positions)
    x = layer.self_attn_layer_norm(x + F.dropout(attended, layer.dropout, layer.training))
    mlp = layer.mlp
    fed = mlp.fc2(F.dropout(mlp.activation_fn(mlp.fc1(x)), mlp.activation_dropout, mlp.training))
    x = layer.final_layer_norm(x + F.dropout(fed, mlp.dropout, mlp.training))
    return x, Tap(attended, fed)


def bert_embedding(bert: BertModel, input_ids: Tensor, types: bool = True) -> Tensor:
    """BERT's input (B, N, width); types: whether the embedding of token type 0 is added."""
    embeddings = bert.embeddings
    if types:
        return embeddings(input_ids)
    x = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings.weight[: input_ids.shape[1]]
    return embeddings.dropout(embeddings.LayerNorm(x))


def bert_states(
    bert: BertModel, input_ids: Tensor, attention_mask: Tensor, tapped: int, double_norm: bool = False, types: bool = True
) -> States:
    """BERT's states, with taps of the first `tapped` layers, the attention's after the residual and the LayerNorm.

    double_norm: in the tapped layers each residual and LayerNorm is applied twice, LN(LN(y + x) + x).
    types: whether the embedding of token type 0 is added.
    """
    embedding = x = bert_embedding(bert, input_ids, types)
    padding, taps = attention_mask == 0, []
    keys = key_mask(padding, x.dtype, bert.config._attn_implementation)
    for index, layer in enumerate(bert.encoder.layer):
        twice = double_norm and index < tapped
        attended, _ = layer.attention.self(x, keys)
        a = _add_and_norm(layer.attention.output, layer.attention.output.dense(attended), x, twice)
        fed = layer.output.dense(layer.intermediate(a))
        x = _add_and_norm(layer.output, fed, a, twice)
        if index < tapped:
            taps.append(Tap(a, fed))
    return States(embedding, x, taps, padding)


def _add_and_norm(output: nn.Module, y: Tensor, x: Tensor, twice: bool) -> Tensor:
    y = output.LayerNorm(output.dropout(y) + x)
    return output.LayerNorm(y + x) if twice else y


def _folded(module: nn.Module, x: Tensor) -> Tensor:
    """The convolution and its frozen batch norm as one convolution with a bias."""
    conv, norm = module.convolution, module.normalization
    scale = norm.weight * (norm.running_var + 1e-5).rsqrt()
    weight = (conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    bias = norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class _FoldedConvLayer(ResNetConvLayer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(_folded(self, hidden_states))


class _FoldedShortCut(ResNetShortCut):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _folded(self, hidden_states)


_FOLDED = {ResNetConvLayer: _FoldedConvLayer, ResNetShortCut: _FoldedShortCut}
