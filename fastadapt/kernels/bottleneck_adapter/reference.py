"""Bottleneck adapter in plain torch, forward and backward: the specification, the CPU path and the oracle of the tests.

For each row x (K numbers), with alpha the scale that all rows share and g_t the one of row t (1 where there is none),

    mu = mean(x)        rstd = (mean((x - mu)^2) + eps)^(-1/2)        xhat = rstd (x - mu)
    n = gamma o xhat + beta                             n = x where there is no LayerNorm
    z = n D^T + d
    r = act(z)
    y = alpha g (r U^T + u) + residual

and, with dy, dz', dmu and drstd the gradients of y, z, mu and rstd (the last three when the backward is differentiated),

    l  = dy U                       dz = alpha g l o act'(z) + dz'
    dU = alpha (g dy)^T r           du = alpha sum_t g dy           dscale = (l . r + dy . u), summed over the rows that share it
    dd = sum_t dz                   M  = dz^T xhat
    dD = M o gamma + dd beta^T      dgamma = sum_h D o M            dbeta = D^T dd          (dD = dz^T x without LayerNorm)
    p  = gamma o (dz D)             dx = rstd (p - mean(p) - xhat mean(p o xhat)) + dmu / K - drstd rstd^3 (x - mu) / K

so the gradients of LayerNorm's affine are the weight gradient's by-products and ask for nothing of the input's, and as
z - d - D beta = (D o gamma) xhat, its means over K are products of the hidden's width:

    mean(p) = dz . (D gamma) / K                        mean(p o xhat) = dz . (z - d - D beta) / K

The residual's gradient is dy, which the caller passes on.  Weights of another dtype than x are cast to x's where they are used; every gradient
has its tensor's dtype.  (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Operands(NamedTuple):
    """The tensors of a call, or what belongs to each of them.

    x (..., K); down_weight (h, K), down_bias (h,), up_weight (N, h), up_bias (N,), norm_weight and norm_bias (K,); scale () or
    (...); residual (..., N).  All but x and the two weights may be None.
    """

    x: Tensor
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None
    residual: Tensor | None

    @property
    def gate(self) -> Tensor | None:
        """The scale of every row, (rows, 1); None where all rows share one."""
        return None if self.scale is None or self.scale.ndim == 0 else self.scale.reshape(-1, 1)

    @property
    def shared_scale(self) -> Tensor | None:
        """The scale that all rows share, where it is a tensor."""
        return self.scale if self.scale is not None and self.scale.ndim == 0 else None


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _quick_gelu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * z)
    return gate * (1 + 1.702 * z * (1 - gate))


# name -> (the activation, its derivative), both functions of float32 or float64
ACTIVATIONS = {
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "gelu": (F.gelu, _gelu_slope),
    "quick_gelu": (lambda z: z * torch.sigmoid(1.702 * z), _quick_gelu_slope),
    "identity": (lambda z: z, torch.ones_like),
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


def forward(tensors: Sequence[Tensor | None], factor: float, activation: str, norm_eps: float) -> list[Tensor]:
    """[y, z] or, with LayerNorm, [y, z, (mu, rstd)]: y (..., N) in the residual's dtype, or in x's without one; z (rows, h) in
    x's; mu and rstd as one (2, rows) in float32 (float64).
    """
    call = Operands(*tensors)
    rows, dtype, wide = flat_rows(call.x), call.x.dtype, wider(call.x.dtype)
    statistics = []
    if call.norm_weight is not None:
        affine = cast(call.norm_weight, wide), cast(call.norm_bias, wide)
        rows, mean, rstd = torch.native_layer_norm(rows.to(wide), rows.shape[1:], *affine, norm_eps)
        rows, statistics = rows.to(dtype), [torch.stack((mean.flatten(), rstd.flatten()))]
    z = F.linear(rows, cast(call.down_weight, dtype), cast(call.down_bias, dtype))
    r = ACTIVATIONS[activation][0](z.to(wide)).to(dtype)
    y = factor * F.linear(r, cast(call.up_weight, dtype), cast(call.up_bias, dtype)).to(wide)
    for scale in (call.shared_scale, call.gate):
        y = y if scale is None else y * scale
    result = dtype if call.residual is None else call.residual.dtype
    y = y if call.residual is None else y + flat_rows(call.residual)
    return [y.to(result).view(*call.x.shape[:-1], y.shape[-1]), z, *statistics]


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The tensors without the residual, then z and LayerNorm's statistics, each left out where no gradient reads it."""
    need = Operands(*needs)
    normed = tensors[5] is not None
    through_hidden = any((need.x, need.down_weight, need.down_bias, need.norm_weight, need.norm_bias))
    from_input = need.down_weight or need.norm_weight or (need.x and normed)
    x = tensors[0] if from_input else None
    z = outputs[1] if through_hidden or need.up_weight or need.scale else None
    return [x, *tensors[1:8], None, z, outputs[2] if normed and from_input else None]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    factor: float,
    activation: str,
    norm_eps: float,
) -> list[Tensor]:
    """The gradients that `needs` marks, in the order of Operands; differentiable again.

    grads: of y, then of z and of (mu, rstd), both None unless the backward is differentiated.
    """
    call, need = Operands(*saved[:9]), Operands(*needs)
    z, statistics = saved[9:]
    dtype = call.up_weight.dtype if z is None else z.dtype
    wide = wider(dtype)
    function, slope = ACTIVATIONS[activation]
    dy = cast(flat_rows(grads[0]), dtype)
    gate = call.gate
    alpha = factor if call.shared_scale is None else factor * call.shared_scale
    gated = dy if gate is None else cast(dy * gate, dtype)
    wanted = {}
    if need.x or need.down_weight or need.down_bias or need.norm_weight or need.norm_bias or need.scale:
        low = dy @ cast(call.up_weight, dtype)
    if need.up_weight or need.scale:
        r = function(z.to(wide)).to(dtype)
    if need.up_weight:
        wanted["up_weight"] = alpha * (gated.t() @ r)
    if need.up_bias:
        wanted["up_bias"] = alpha * gated.to(wide).sum(0)
    if need.scale:
        per_row = (low.to(wide) * r).sum(1)
        if call.up_bias is not None:
            per_row = per_row + dy.to(wide) @ call.up_bias.to(wide)
        wanted["scale"] = factor * (per_row.sum() if gate is None else per_row.view(call.scale.shape))
    if need.x or need.down_weight or need.down_bias or need.norm_weight or need.norm_bias:
        dz = low.to(wide) * slope(z.to(wide))
        dz = dz if gate is None else dz * gate
        if grads[1] is not None:
            dz, alpha = alpha * dz + grads[1], 1.0
        dstatistics = grads[2] if len(grads) > 2 else None
        wanted |= _through_hidden(call, need, z, cast(dz, dtype), alpha, statistics, dstatistics)
    if need.x:
        wanted["x"] = wanted["x"].view(*grads[0].shape[:-1], call.down_weight.shape[1])
    own = call._replace(x=call.x if call.x is not None else z)
    return [
        cast(wanted[name], getattr(own, name).dtype) for name, needed in need._asdict().items() if needed
    ]


def _through_hidden(
    call: Operands,
    need: Operands,
    z: Tensor,
    dz: Tensor,
    alpha: float | Tensor,
    statistics: Tensor | None,
    dstatistics: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients of what lies before the activation, for dz alpha."""
    wide, dtype = wider(dz.dtype), dz.dtype
    down = cast(call.down_weight, dtype)
    dd = dz.to(wide).sum(0)
    found = {"down_bias": alpha * dd}
    if call.norm_weight is None:
        if need.down_weight:
            found["down_weight"] = alpha * (dz.t() @ flat_rows(call.x))
        if need.x:
            found["x"] = alpha * (dz @ down)
        return found
    found["norm_bias"] = alpha * (dd @ down.to(wide))
    if statistics is None:  # then neither x, nor the weight, nor norm_weight is asked for
        return found
    mean, rstd = statistics[:, :, None]
    xhat = (flat_rows(call.x).to(wide) - mean) * rstd
    if need.down_weight or need.norm_weight:
        product = (dz.t() @ xhat.to(dtype)).to(wide)
        found["norm_weight"] = alpha * (down * product).sum(0)
        weight = product * call.norm_weight
        weight = weight if call.norm_bias is None else weight + dd[:, None] * call.norm_bias
        found["down_weight"] = alpha * weight
    if need.x:
        gamma, hidden, depth = call.norm_weight.to(wide), z.to(wide), xhat.shape[1]
        for bias in (call.down_bias, None if call.norm_bias is None else down.to(wide) @ call.norm_bias.to(wide)):
            hidden = hidden if bias is None else hidden - bias
        wide_dz = dz.to(wide)
        mean_p = (wide_dz @ (down.to(wide) @ gamma))[:, None] / depth
        mean_px = (wide_dz * hidden).sum(1, keepdim=True) / depth
        dx = alpha * rstd * ((dz @ down).to(wide) * gamma - mean_p - xhat * mean_px)
        if dstatistics is not None:
            dmean, drstd = dstatistics[:, :, None]
            dx = dx + (dmean - drstd * rstd * rstd * xhat) / depth
        found["x"] = dx
    return found
