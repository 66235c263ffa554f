"""A tower's side adapters in plain torch, forward and backward: the specification, the path of last resort, the tests' oracle.

For adapter i, whose tap f_i (T, K_i) is a row for each of the T tokens, with xhat = rstd (f - mean(f)) its standardised row,

    n   = gamma o xhat + beta                           n = f where there is no LayerNorm
    z   = n D^T + d
    r   = act(z)
    y   = scale (r W^T + w),    W = [U; S], w = [u, s]  y = scale r where there is no up-projection
    out = sum_b base_b + sum_i LN_out,i(y_i)            LN_out(y) = y where there is none

and with g = dout, yhat = rstd_y (y - mean(y)) and p = g o gamma_out, everything above computed again,

    dy  = rstd_y (p - mean(p) - yhat mean(p o yhat))    dy = g without LN_out, whose own weight and bias are frozen
    dW  = scale dy^T r              dw = scale sum_t dy         (rows of U and of S, numbers of u and of s)
    dz  = scale dy W o act'(z)      dd = sum_t dz               (scale dy o act'(z) without an up-projection)
    M   = dz^T xhat
    dD  = M o gamma + dd beta^T     dgamma = sum_h D o M        dbeta = D^T dd          (dD = dz^T f without LayerNorm)

The taps are a frozen tower's: they have no gradient, so that LayerNorm's affine gradients are by-products of the weight
gradient's product.  A base's gradient is g, which the caller passes on.  Only taps and parameters are kept for the backward.
Weights of another dtype than the taps are cast to it where they are used; every gradient has its tensor's dtype.
(Liu et al., "M2IST", 2024; Sung et al., "LST", NeurIPS 2022, for the linear form.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = Sequence["Tensor | None"]


class Operands(NamedTuple):
    """The tensors of an adapter, or what belongs to each of them.

    tap (..., K); down_weight D (h, K), down_bias d (h,); up_weight U (n, h), up_bias u (n,), shared_weight S (m, h) and
    shared_bias s (m,), n + m = N, or none of these four and h = N; norm_weight and norm_bias (K,); out_norm_weight and
    out_norm_bias (N,).  All but tap and down_weight may be None.
    """

    tap: Tensor
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor | None
    up_bias: Tensor | None
    shared_weight: Tensor | None
    shared_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    out_norm_weight: Tensor | None
    out_norm_bias: Tensor | None

    @property
    def ups(self) -> list[tuple[str, str]]:
        """The names of the up-projections that there are, weight and bias, in the order of their columns."""
        return [name for name in UPS if getattr(self, name[0]) is not None]

    @property
    def width(self) -> int:
        """N."""
        weights = [getattr(self, weight) for weight, _ in self.ups] or [self.down_weight]
        return sum(weight.shape[0] for weight in weights)


UPS = [("up_weight", "up_bias"), ("shared_weight", "shared_bias")]
EACH = len(Operands._fields)  # tensors of an adapter


class Settings(NamedTuple):
    """What an adapter is told besides its tensors."""

    activation: str
    scale: float
    norm_eps: float
    out_norm_eps: float


def split(tensors: Tensors, base_count: int, *options: Sequence) -> Iterator[tuple[Operands, Settings]]:
    """Each adapter of a call, whose `tensors` are the bases and then EACH of every adapter, and whose options are lists."""
    for i, settings in enumerate(zip(*options, strict=True)):
        start = base_count + EACH * i
        yield Operands(*tensors[start : start + EACH]), Settings(*settings)


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _quick_gelu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * z)
    return gate * (1 + 1.702 * z * (1 - gate))


# name -> (the activation, its derivative), both functions of float32 or float64
ACTIVATIONS = {
    "identity": (lambda z: z, torch.ones_like),
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "gelu": (F.gelu, _gelu_slope),
    "quick_gelu": (lambda z: z * torch.sigmoid(1.702 * z), _quick_gelu_slope),
}


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in `dtype`."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def flat_rows(tensor: Tensor) -> Tensor:
    """`tensor` as (rows, width), a view wherever its strides allow one."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def result_dtype(tensors: Tensors, base_count: int) -> torch.dtype:
    """The widest base's dtype, or the taps' without bases."""
    dtypes = [base.dtype for base in tensors[:base_count]] or [tensors[0].dtype]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def forward(
    tensors: Tensors,
    base_count: int,
    activations: Sequence[str],
    scales: Sequence[float],
    norm_eps: Sequence[float],
    out_norm_eps: Sequence[float],
) -> list[Tensor]:
    """[out]: (..., N) in `result_dtype`, the sum in float32 (float64) rounded once."""
    leading = tensors[base_count].shape[:-1]
    total = sum(flat_rows(base).to(wider(base.dtype)) for base in tensors[:base_count])
    for call, settings in split(tensors, base_count, activations, scales, norm_eps, out_norm_eps):
        _, z = _hidden(call, settings)
        y = _outcome(call, settings, _activated(z, settings))
        if call.out_norm_weight is not None:
            y = F.layer_norm(y, y.shape[1:], *_out_affine(call, y.dtype), settings.out_norm_eps)
        total = total + y
    return [total.to(result_dtype(tensors, base_count)).view(*leading, total.shape[-1])]


def save(tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The tensors, of which the bases come as None, with None for all EACH of an adapter none of whose gradients is wanted."""
    base_count = next(i for i, tensor in enumerate(tensors) if tensor is not None)  # the first tap's place
    saved: list[Tensor | None] = [None] * base_count
    for start in range(base_count, len(tensors), EACH):
        kept = any(needs[start : start + EACH])
        saved += tensors[start : start + EACH] if kept else [None] * EACH
    return saved


def backward(
    saved: Tensors,
    grads: Tensors,
    needs: Sequence[bool],
    base_count: int,
    activations: Sequence[str],
    scales: Sequence[float],
    norm_eps: Sequence[float],
    out_norm_eps: Sequence[float],
) -> list[Tensor]:
    """The gradients that `needs` marks, never a base's, in the order of the tensors; differentiable again.

    grads: [dout].
    """
    found = []
    for i, (call, settings) in enumerate(split(saved, base_count, activations, scales, norm_eps, out_norm_eps)):
        start = base_count + EACH * i
        need = Operands(*needs[start : start + EACH])
        if any(need):
            wanted = _gradients(call, need, settings, flat_rows(grads[0]))
            found += [cast(wanted[name], getattr(call, name).dtype) for name, needed in need._asdict().items() if needed]
    return found


def _standardised(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of mean 0 and variance 1, and the inverse deviations; the mean goes first, so that a large one costs no digits."""
    centred = rows - rows.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _hidden(call: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """What multiplies dz in the weight gradient, xhat in float32 (float64) or the tap, and z in the tap's dtype."""
    rows, dtype = flat_rows(call.tap), call.tap.dtype
    n = rows
    if call.norm_weight is not None:
        wide = wider(dtype)
        rows, _ = _standardised(rows.to(wide), settings.norm_eps)
        n = rows * call.norm_weight
        n = (n if call.norm_bias is None else n + call.norm_bias).to(dtype)
    return rows, F.linear(n, cast(call.down_weight, dtype), cast(call.down_bias, dtype))


def _activated(z: Tensor, settings: Settings) -> Tensor:
    return ACTIVATIONS[settings.activation][0](z.to(wider(z.dtype))).to(z.dtype)


def _outcome(call: Operands, settings: Settings, r: Tensor) -> Tensor:
    """y, before LN_out, in float32 (float64)."""
    dtype = r.dtype
    ups = [F.linear(r, cast(getattr(call, weight), dtype), cast(getattr(call, bias), dtype)) for weight, bias in call.ups]
    return settings.scale * (torch.cat(ups, 1) if ups else r).to(wider(dtype))


def _out_affine(call: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return cast(call.out_norm_weight, dtype), cast(call.out_norm_bias, dtype)


def _through_out_norm(call: Operands, settings: Settings, y: Tensor, dout: Tensor) -> Tensor:
    """dy of LN_out, in float32 (float64)."""
    p = dout * _out_affine(call, y.dtype)[0]
    yhat, rstd = _standardised(y, settings.out_norm_eps)
    return rstd * (p - p.mean(1, keepdim=True) - yhat * (p * yhat).mean(1, keepdim=True))


def _gradients(call: Operands, need: Operands, settings: Settings, dout: Tensor) -> dict[str, Tensor]:
    """The gradients of an adapter's tensors by their names: at least those that `need` marks."""
    dtype, wide, scale = call.tap.dtype, wider(call.tap.dtype), settings.scale
    rows, z = _hidden(call, settings)
    r = _activated(z, settings)
    dy = dout.to(wide)
    if call.out_norm_weight is not None:
        dy = _through_out_norm(call, settings, _outcome(call, settings, r), dy)
    low, found, column = dy, {}, 0
    if call.ups:
        weights = torch.cat([cast(getattr(call, weight), dtype) for weight, _ in call.ups])
        low = (dy.to(dtype) @ weights).to(wide)
    for weight, bias in call.ups:
        columns = dy[:, column : column + getattr(call, weight).shape[0]]
        column += columns.shape[1]
        if getattr(need, weight):
            found[weight] = scale * (columns.to(dtype).t() @ r)
        if getattr(need, bias):
            found[bias] = scale * columns.sum(0)
    dz = low * ACTIVATIONS[settings.activation][1](z.to(wide))
    dd = found["down_bias"] = scale * dz.sum(0)
    if need.down_weight or need.norm_weight:
        product = scale * (dz.to(rows.dtype).t() @ rows).to(wide)
        found["down_weight"] = product
        if call.norm_weight is not None:
            found["norm_weight"] = (call.down_weight * product).sum(0)
            weight = product * call.norm_weight
            found["down_weight"] = weight if call.norm_bias is None else weight + dd[:, None] * call.norm_bias
    if need.norm_bias:
        found["norm_bias"] = dd @ call.down_weight.to(wide)
    return found
