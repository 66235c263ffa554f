"""Local convolution adapter in plain torch, forward and backward: the specification, the CPU path and the oracle of the tests.

A sample's tokens are `prefix_tokens` of no place (CLS, registers) and then the H x W grid in raster order.  With C the
depthwise convolution over the grid by w, zeros around it and taps `dilation` apart, alpha the scale that all rows share and g_t
the one of row t (1 where there is none), for each row x

    u = x D^T + d
    z = C(u) + c                                    z = u for a prefix token
    r = act(z)
    y = alpha g (r U^T + b) + residual

and, with dy and du' the gradients of y and u (the last when the backward is differentiated),

    l  = alpha g dy                 dU = l^T r      db = sum_t l        dscale = (dy U) . r + dy . b, times the other scale
    dz = (l U) o act'(z)            du = C^T(dz) + du'                  du = dz + du' for a prefix token
    dw[u, v] = sum_ij dz[i, j] u[i + (u - a) dilation, j + (v - b) dilation]        a = (kh - 1) / 2, b = (kw - 1) / 2
    dc = sum_ij dz[i, j]            dD = du^T x     dd = sum_t du       dx = du D

summed over rows, in dc over those of the grid.  z is computed anew in the backward.  The residual's gradient is dy, which the
caller passes on.  Parameters of another dtype than x are cast to x's where they are used; every gradient has its tensor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def _quick_gelu_backward(g: Tensor, z: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * z)
    return g * gate * (1 + 1.702 * z * (1 - gate))


# name -> (the activation, what it makes of a gradient g at z), both functions of float32 or float64
ACTIVATIONS = {
    "relu": (torch.relu, lambda g, z: torch.ops.aten.threshold_backward(g, z, 0.0)),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "quick_gelu": (lambda z: z * torch.sigmoid(1.702 * z), _quick_gelu_backward),
    "identity": (lambda z: z, lambda g, z: g),
}


class Operands(NamedTuple):
    """The tensors of a call, or what belongs to each of them.

    x (B, T, K); down_weight (h, K), down_bias (h,); weight (h, kh, kw), conv_bias (h,); up_weight (N, h), up_bias (N,);
    scale () or (B, T); residual (B, T, N).  All but x and the three weights may be None.
    """

    x: Tensor
    down_weight: Tensor
    down_bias: Tensor | None
    weight: Tensor
    conv_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    scale: Tensor | None
    residual: Tensor | None


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in `dtype`."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The tensors without the residual, then u; x and u each left out where no gradient reads it."""
    need = Operands(*needs)
    u = outputs[1] if any((*needs[:5], need.up_weight, need.scale)) else None
    return [tensors[0] if need.down_weight else None, *tensors[1:8], None, u]


def forward(
    tensors: Sequence[Tensor | None],
    height: int,
    width: int,
    prefix_tokens: int,
    dilation: int,
    factor: float,
    activation: str,
) -> list[Tensor]:
    """[y, u]: y (B, T, N) in the residual's dtype, or in x's without one; u (B, T, h) in x's."""
    call = Operands(*tensors)
    dtype, wide = call.x.dtype, wider(call.x.dtype)
    rows = call.x.reshape(-1, call.x.shape[-1])
    u = F.linear(rows, cast(call.down_weight, dtype), cast(call.down_bias, dtype)).unflatten(0, call.x.shape[:-1])
    z = convolve(call, u, height, width, prefix_tokens, dilation)
    r = cast(ACTIVATIONS[activation][0](cast(z, wide)), dtype)
    y = factor * cast(F.linear(r, cast(call.up_weight, dtype), cast(call.up_bias, dtype)), wide)
    y = y if call.scale is None else y * per_row(call.scale)
    y = y if call.residual is None else y + call.residual
    return [cast(y, dtype if call.residual is None else call.residual.dtype).contiguous(), u]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    height: int,
    width: int,
    prefix_tokens: int,
    dilation: int,
    factor: float,
    activation: str,
) -> list[Tensor]:
    """The gradients that `needs` marks, in the order of Operands; differentiable again.

    grads: of y, then of u, None unless the backward is differentiated.
    """
    call, need, u = Operands(*saved[:9]), Operands(*needs), saved[9]
    dtype = call.up_weight.dtype if u is None else u.dtype
    wide = wider(dtype)
    function, pulled_back = ACTIVATIONS[activation]
    dy, up = cast(grads[0], dtype), cast(call.up_weight, dtype)
    scaled = factor * cast(dy, wide)
    scaled = cast(scaled if call.scale is None else scaled * per_row(call.scale), dtype)
    found = {}
    if u is not None:
        z = cast(convolve(call, u, height, width, prefix_tokens, dilation), wide)
    if need.up_weight or need.scale:
        r = cast(function(z), dtype)
    if need.up_weight:
        found["up_weight"] = scaled.flatten(0, 1).t() @ r.flatten(0, 1)
    if need.up_bias:
        found["up_bias"] = cast(scaled, wide).sum((0, 1))
    if need.scale:
        inner = (cast(dy @ up, wide) * r).sum(-1)
        inner = inner if call.up_bias is None else inner + cast(dy, wide) @ cast(call.up_bias, wide)
        found["scale"] = factor * (inner if call.scale.ndim else inner.sum())
    if any(needs[:5]):
        dz = cast(pulled_back(cast(scaled @ up, wide), z), dtype)
        found |= convolution_gradients(call, need, u, dz, height, width, prefix_tokens, dilation)
    if need.x or need.down_weight or need.down_bias:
        du = found["u"] if grads[1] is None else found["u"] + grads[1]
        du = du.reshape(-1, du.shape[-1])
        found["down_bias"] = cast(du, wide).sum(0)
        found["x"] = (du @ cast(call.down_weight, dtype)).unflatten(0, dy.shape[:-1]) if need.x else None
        found["down_weight"] = du.t() @ call.x.reshape(-1, call.x.shape[-1]) if need.down_weight else None
    own = call._replace(x=u)
    return [cast(found[name], getattr(own, name).dtype) for name, needed in need._asdict().items() if needed]


def convolve(call: Operands, u: Tensor, height: int, width: int, prefix_tokens: int, dilation: int) -> Tensor:
    """z: (B, T, h) in u's dtype."""
    kernel, bias = cast(call.weight.unsqueeze(1), u.dtype), cast(call.conv_bias, u.dtype)
    padding = same_padding(call.weight, dilation)
    grid = image(u, height, width, prefix_tokens)
    return with_prefix(u, F.conv2d(grid, kernel, bias, padding=padding, dilation=dilation, groups=len(kernel)), prefix_tokens)


def convolution_gradients(
    call: Operands, need: Operands, u: Tensor, dz: Tensor, height: int, width: int, prefix_tokens: int, dilation: int
) -> dict[str, Tensor]:
    """The gradients of u, the weight, laid out as it is, and conv_bias, those that `need` asks for, for one of z."""
    channels, through = dz.shape[-1], need.x or need.down_weight or need.down_bias
    du, dweight, _ = torch.ops.aten.convolution_backward(
        image(dz, height, width, prefix_tokens),
        image(u, height, width, prefix_tokens),
        cast(call.weight.unsqueeze(1), dz.dtype),
        [channels],
        [1, 1],
        same_padding(call.weight, dilation),
        [dilation, dilation],
        False,
        [0, 0],
        channels,
        [through, need.weight, False],
    )
    return {
        "u": with_prefix(dz, du, prefix_tokens) if through else None,
        "weight": torch.empty_like(call.weight).copy_(dweight.squeeze(1)) if need.weight else None,
        "conv_bias": cast(dz[:, prefix_tokens:], wider(dz.dtype)).sum((0, 1)),
    }


def image(tokens: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """The grid of (B, prefix_tokens + H W, C) tokens as a (B, C, H, W) view."""
    return tokens[:, prefix_tokens:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def with_prefix(tokens: Tensor, image: Tensor, prefix_tokens: int) -> Tensor:
    """The prefix of these tokens, and behind it the grid of a (B, C, H, W) image."""
    return torch.cat([tokens[:, :prefix_tokens], image.flatten(2).transpose(1, 2)], 1)


def same_padding(weight: Tensor, dilation: int) -> list[int]:
    """Zeros on either side that keep the size of the grid, for a weight (C, kh, kw)."""
    return [size // 2 * dilation for size in weight.shape[1:]]


def per_row(scale: Tensor) -> Tensor:
    """A scale () or (B, T) as it multiplies (B, T, N)."""
    return scale.unsqueeze(-1) if scale.ndim else scale
