"""ETRIS's neck and decoder: HierarchicalAlignment fuses three levels of vision, GlobalAlignment lets them attend to words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt.core.checks import check_probability, check_tensor, fail
from fastadapt.modules.attention import MultiheadAttention
from fastadapt.modules.convolution import ConvNormReLU
from fastadapt.modules.positions import Table, coordinates, sine_positions, sine_positions_2d


class HierarchicalAlignment(nn.Module):
    """Three levels of vision, each gated by the sentence, brought to one map: the neck of ETRIS.

        s'  = sentence W_s^T + b_s
        h_i = relu(norm(conv_i(feature_i))),      g_i = (s' W_v,i^T + b_v,i) W_o,i^T + b_o,i
        y   = relu(norm(conv3x3(relu(norm(coordconv3x3(relu(norm(conv1x1([h_1 g_1, h_2 g_2, h_3 g_3]))))))))

    (Xu et al., "Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image Segmentation", ICCV
    2023.)  The paper's h_i MHA(q = h_i, k = v = s') is this gate: with one key every softmax is 1, so queries and keys have
    neither effect nor gradient.  The gates have no query and key weights, and count 3 (2 width^2 + 2 width) parameters less
    than released; `released_parameters` is the count with them.  A state dict of the released form loads, strictly too: of
    nn.MultiheadAttention's packed `in_proj_weight` and `in_proj_bias`, or of `q_proj`, `k_proj` and `v_proj`, only the
    values' part is read.

    The first two convolutions have a kernel as large as their stride, the third is a transposed one.  coordconv appends two
    channels, column x then row y from -1 to 1; it adds their convolution, the same for the whole batch, so that no longer
    map is formed and kept.

    Args:
        in_channels: of the three features.  ViT-B/16: (768, 768, 512); ResNet-50: (512, 1024, 1024); ResNet-101: (512,
            1024, 512).
        strides: by which the first two features are shrunk and the third enlarged.  ViT: (1, 1, 1); ResNets: (2, 1, 2).
        sentence_dim: width of the sentence.  1024 for ResNet-50, else 512.
        width: channels of the map.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (768, 768, 512),
        strides: Sequence[int] = (1, 1, 1),
        sentence_dim: int = 512,
        width: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("in_channels", in_channels), ("strides", strides)):
            if len(value) != 3 or min(value) < 1:
                fail(argument, "three positive integers", value)
        self.in_channels, self.sentence_dim, self.width = tuple(in_channels), sentence_dim, width
        like = {"device": device, "dtype": dtype}
        without_bias = {"bias": False, **like}
        kinds = nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d
        self.projections = nn.ModuleList(
            ConvNormReLU(kind(channels, width, stride, stride, **without_bias))
            for kind, channels, stride in zip(kinds, in_channels, strides)
        )
        self.sentence_proj = nn.Linear(sentence_dim, width, **like)
        self.gates = nn.ModuleList(_Gate(width, **like) for _ in kinds)
        self.aggregation = ConvNormReLU(nn.Conv2d(3 * width, width, 1, **without_bias))
        self.coordinate_conv = ConvNormReLU(_CoordConv2d(width, width, 3, padding=1, **without_bias))
        self.output_conv = ConvNormReLU(nn.Conv2d(width, width, 3, padding=1, **without_bias))

    @property
    def released_parameters(self) -> int:
        """The number of parameters with the gates' dead query and key projections, as the released code has them."""
        own = sum(parameter.numel() for parameter in self.parameters())
        return own + len(self.gates) * 2 * (self.width**2 + self.width)

    def forward(self, features: Sequence[Tensor], sentence: Tensor) -> Tensor:
        """Fuse the features.

        Args:
            features: three of shape (B, in_channels[i], H_i, W_i), whose projections have one size.
            sentence: (B, sentence_dim).

        Returns:
            y, (B, width, H, W).

        Raises:
            ValueError: there are not three features, or a shape is not as above.
        """
        if len(features) != 3:
            fail("features", "three tensors", f"{len(features)}")
        batch, device = features[0].shape[0], features[0].device
        for i, (feature, channels) in enumerate(zip(features, self.in_channels)):
            check_tensor(f"features[{i}]", feature, (batch, channels, None, None), device)
        check_tensor("sentence", sentence, (batch, self.sentence_dim), device)
        levels = [projection(feature) for projection, feature in zip(self.projections, features)]
        sizes = [tuple(level.shape[2:]) for level in levels]
        if len(set(sizes)) > 1:
            fail("features", "three levels of one size once projected", f"sizes {sizes}")
        sentence = self.sentence_proj(sentence)
        gated = [level * gate(sentence)[:, :, None, None] for level, gate in zip(levels, self.gates)]
        return self.output_conv(self.coordinate_conv(self.aggregation(torch.cat(gated, dim=1))))


class _Gate(nn.Module):
    """What multi-head attention with a single key is: (x W_v^T + b_v) W_o^T + b_o, for every query."""

    def __init__(self, width: int, **like: Any) -> None:
        super().__init__()
        self.v_proj, self.out_proj = nn.Linear(width, width, **like), nn.Linear(width, width, **like)
        # as nn.MultiheadAttention draws W_v, a third of a Xavier-uniform packed weight
        nn.init.xavier_uniform_(self.v_proj.weight, gain=1 / math.sqrt(2))
        nn.init.zeros_(self.v_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        self.register_load_state_dict_pre_hook(_drop_queries_and_keys)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.v_proj(x))


def _drop_queries_and_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Leave of an attention's state dict what the gate has."""
    for kind in ("weight", "bias"):
        packed = state_dict.pop(f"{prefix}in_proj_{kind}", None)
        if packed is not None:
            state_dict[f"{prefix}v_proj.{kind}"] = packed.chunk(3)[2]
        for dead in ("q_proj", "k_proj"):
            state_dict.pop(f"{prefix}{dead}.{kind}", None)


class _CoordConv2d(nn.Conv2d):
    """A convolution of x with its coordinates appended, as the sum of two, so that x is not copied to append them.

    The weight is the whole one, (out_channels, in_channels + 2, kernel_size, kernel_size).
    """

    def __init__(self, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels + 2, *args, **kwargs)
        self.coordinates = Table(coordinates)

    def forward(self, x: Tensor) -> Tensor:
        of_x, of_coordinates = self.weight.split([self.in_channels - 2, 2], dim=1)
        place = self._conv_forward(self.coordinates(*x.shape[2:], like=x), of_coordinates, None)
        return self._conv_forward(x, of_x, self.bias) + place


class GlobalAlignment(nn.Module):
    """Vision that attends to itself and then to the words, layer by layer: the decoder of ETRIS.

        v <- v + drop(LN_a(MHA(q = k = LN_1(v) + P, v = LN_1(v))))
        v <- v + drop(LN_b(MHA(q = LN_2(v) + P, k = t + p, v = t)))
        v <- v + drop(W_2 LN_f(drop(relu(W_1 LN_3(v) + b_1))) + b_2)

    and a last LN after the layers (Xu et al., ICCV 2023, as released).  t are the words, p and P fixed sines and cosines
    (`positions.sine_positions` and `sine_positions_2d`), made once for each size, dtype and device.  The attention runs on
    scaled_dot_product_attention (`attention.MultiheadAttention`) and never averages its weights.

    Args:
        num_layers: layers.
        d_model: width of vision and words, a multiple of 4.
        num_heads: a divisor of d_model.
        dim_feedforward: width between W_1 and W_2.
        dropout: probability in [0, 1) of `drop`, and of dropping an attention weight, while training.
        device, dtype: of the parameters.

    Raises:
        ValueError: d_model is no multiple of 4 and of num_heads, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        num_layers: int = 3,
        d_model: int = 512,
        num_heads: int = 8,
        dim_feedforward: int = 512,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model % 4:
            fail("d_model", "a multiple of 4", d_model)
        check_probability("dropout", dropout)
        like = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.layers = nn.ModuleList(
            _GlobalAlignmentLayer(d_model, num_heads, dim_feedforward, dropout, **like) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, **like)
        self.vision_positions, self.word_positions = Table(sine_positions_2d), Table(sine_positions)

    def forward(self, vision: Tensor, words: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Align a map with the words.

        Args:
            vision: (B, d_model, H, W).
            words: (B, L, d_model).
            key_padding_mask: (B, L) of bool, True at the words to ignore.

        Returns:
            (B, d_model, H, W), in channels_last memory format.

        Raises:
            ValueError: a shape or the mask's dtype is not as above.
        """
        check_tensor("vision", vision, (None, self.d_model, None, None), vision.device)
        batch, _, height, width = vision.shape
        check_tensor("words", words, (batch, None, self.d_model), vision.device)
        # once for all layers, rather than in every LN
        v = vision.flatten(2).transpose(1, 2).contiguous()
        v_positions = self.vision_positions(height, width, self.d_model, like=v)
        keys = words + self.word_positions(words.shape[1], self.d_model, like=words)
        for layer in self.layers:
            v = layer(v, v_positions, words, keys, key_padding_mask)
        return self.norm(v).transpose(1, 2).unflatten(2, (height, width))


class _GlobalAlignmentLayer(nn.Module):
    """One layer of GlobalAlignment."""

    def __init__(self, d_model: int, num_heads: int, dim_feedforward: int, dropout: float, **like: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model, **like) for _ in range(3))
        self.self_attn, self.cross_attn = (MultiheadAttention(d_model, num_heads, dropout, **like) for _ in range(2))
        self.self_attn_norm, self.cross_attn_norm = (nn.LayerNorm(d_model, **like) for _ in range(2))
        self.ffn = nn.Sequential(
            nn.Linear(d_model, dim_feedforward, **like),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.LayerNorm(dim_feedforward, **like),
            nn.Linear(dim_feedforward, d_model, **like),
        )
        self.dropout = dropout

    def forward(self, v: Tensor, positions: Tensor, words: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm1(v)
        placed = x + positions
        v = v + self._drop(self.self_attn_norm(self.self_attn(placed, placed, x)))
        attended = self.cross_attn(self.norm2(v) + positions, keys, words, mask)
        v = v + self._drop(self.cross_attn_norm(attended))
        return v + self._drop(self.ffn(self.norm3(v)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
