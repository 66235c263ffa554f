"""What is around a group of frozen linears, in plain torch: a branch added to the stream, then LayerNorm or an activation.

    s = x + c o m(branch) / (1 - p)                          m: dropout's 0/1 mask, c: a frozen scale for every channel
    n = P(s)                                                 P: identity, LayerNorm(gamma, beta) or an activation

and, with dn and ds the gradients of n and s,

    ds' = ds + P'(s)^T dn                                    LayerNorm: rstd (g - mean(g) - xhat mean(g xhat)), g = dn o gamma
    dx  = ds'          dbranch = c o m(ds') / (1 - p)

(He et al., "Deep Residual Learning", CVPR 2016; Ba et al., "Layer Normalization", 2016; Hendrycks and Gimpel, "GELUs", 2016.)
All tensors are (rows, width).  gamma, beta and c may have another dtype than the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.core import philox

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu")
PROLOGUES = ("identity", "layer_norm", *ACTIVATIONS)
_SLOPE = 1.702
_norm_backward = torch.ops.aten.native_layer_norm_backward.default  # the overload itself, which the host finds sooner


class Prologue(NamedTuple):
    """P: one of PROLOGUES, with LayerNorm's gamma, beta and eps."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Branch(NamedTuple):
    """How a branch is added: c, or None for ones, and dropout's seed and probability, None and 0 without."""

    scale: Tensor | None
    seed: Tensor | None
    p: float

    @property
    def plain(self) -> bool:
        return self.scale is None and self.seed is None


def added(x: Tensor, branch: Branch, delta: Tensor) -> Tensor:
    """s."""
    if branch.plain:
        return x + delta
    return x + weighted(branch, delta)


def weighted(branch: Branch, tensor: Tensor) -> Tensor:
    """c o m(tensor) / (1 - p), which is its own transpose."""
    if branch.seed is not None:
        tensor = philox.masked(tensor, branch.seed, branch.p) * philox.inv_keep(branch.p)
    return tensor if branch.scale is None else tensor * branch.scale.to(tensor.dtype)


def forward(prologue: Prologue, branch: Branch, x: Tensor, delta: Tensor | None, apply: bool) -> list[Tensor | None]:
    """[s, None without a branch; n, None unless it is asked for]."""
    s = None if delta is None else added(x, branch, delta)
    return [s, applied(prologue, x if s is None else s)[0] if apply else None]


def applied(prologue: Prologue, s: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """n, and LayerNorm's moments."""
    kind = prologue.kind
    if kind == "layer_norm":
        weight, bias, wide = affine(prologue, s.dtype)
        wider = s if wide is s.dtype else s.to(wide)
        n, *moments = torch.native_layer_norm(wider, s.shape[-1:], weight, bias, prologue.eps)
        return n if wide is s.dtype else n.to(s.dtype), tuple(moments)
    if kind == "identity":
        return s, ()
    if kind == "relu":
        return s.relu(), ()
    if kind == "quick_gelu":
        return (_SLOPE * s).sigmoid_().mul_(s) if not s.requires_grad else s * (_SLOPE * s).sigmoid(), ()
    return F.gelu(s, approximate="tanh" if kind == "gelu_tanh" else "none"), ()


def affine(prologue: Prologue, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, torch.dtype]:
    """gamma and beta, and the dtype LayerNorm is computed in: the widest of theirs and s's."""
    weight, bias = prologue.weight, prologue.bias
    if (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype):
        return weight, bias, dtype
    for part in (part for part in (weight, bias) if part is not None):
        dtype = torch.promote_types(dtype, part.dtype)
    return (*(None if part is None else part.to(dtype) for part in (weight, bias)), dtype)


def gradients(
    prologue: Prologue,
    branch: Branch,
    s: Tensor | None,
    moments: Sequence[Tensor] | None,
    dns: Sequence[Tensor],
    ds: Tensor | None,
    need_n: bool,
    need_x: bool,
    need_delta: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """None, for n is there already, ds' and dbranch, those that are needed; the parts of dn, dns, add up.

    s and moments are needed unless P is the identity.
    """
    dx = ds
    if dns:
        through = through_prologue(prologue, s, moments, sum(dns[1:], start=dns[0]))
        dx = through if ds is None else through + ds
    d_delta = dx if branch.plain or not need_delta else weighted(branch, dx)
    return None, dx if need_x else None, d_delta if need_delta else None


def through_prologue(prologue: Prologue, s: Tensor | None, moments: Sequence[Tensor] | None, dn: Tensor) -> Tensor:
    """P'(s)^T dn."""
    kind = prologue.kind
    if kind == "identity":
        return dn
    if kind == "layer_norm":
        weight, bias, wide = affine(prologue, s.dtype)
        if wide is not s.dtype:
            dn, s, narrow = dn.to(wide), s.to(wide), s.dtype
            return _norm_backward(dn, s, s.shape[-1:], *moments, weight, bias, [True, False, False])[0].to(narrow)
        return _norm_backward(dn, s, s.shape[-1:], *moments, weight, bias, [True, False, False])[0]
    if kind == "relu":
        return torch.ops.aten.threshold_backward(dn, s, 0)
    if kind == "quick_gelu":
        if torch.is_grad_enabled():  # silu_backward has no derivative
            gate = (_SLOPE * s).sigmoid()
            return dn * gate * (1 + _SLOPE * s * (1 - gate))
        limit = torch.finfo(s.dtype).max
        # infinity times the zero that the slope approaches is not a number
        return torch.ops.aten.silu_backward(dn, (_SLOPE * s).clamp(-limit, limit))
    return torch.ops.aten.gelu_backward(dn, s, approximate="tanh" if kind == "gelu_tanh" else "none")
