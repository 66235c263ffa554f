"""One layer of a fusion encoder as one function, which keeps little for its backward and computes the rest again.

After the norm ("post", DETR's) and before it ("pre"), with drop_i the layer's dropouts:

    post:  s = x + drop_0(o W_o^T + b_o),   n = norm1(s),   t = n + drop_2(u W_2^T + b_2),   y = norm2(t)
    pre:   s = x + drop_0(o W_o^T + b_o),   n = norm2(s),   y = s + drop_2(u W_2^T + b_2)

    o = attention(q, k, v),     q, k = (a + positions) W_q,k^T + b_q,k,     v = a W_v^T + b_v,     a = x (post), norm1(x) (pre)
    u = drop_1(relu(n W_1^T + b_1))

Kept are x, q, k, v, o, s, u and in post t; with recompute x and o alone, beside what the attention's kernel leaves.  Neither
a + positions nor n is, and no mask: u is zero where drop_1 or relu made it so, and the others come from a seed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.core import philox
from fastadapt.core.backend import autocast_dtype
from fastadapt.modules import attention_state
from fastadapt.modules.attention_state import drop

aten = torch.ops.aten


class Options(NamedTuple):
    """What a layer is beside its tensors; dropout is 0 in eval mode, rows how many of the first tokens have an output."""

    num_heads: int
    dropout: float
    eps: float
    pre_norm: bool
    recompute: bool
    rows: int


class Weights(NamedTuple):
    """A layer's parameters, in the order of the function's arguments."""

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor

    @property
    def norm1(self) -> tuple[Tensor, Tensor]:
        return self.norm1_weight, self.norm1_bias

    @property
    def norm2(self) -> tuple[Tensor, Tensor]:
        return self.norm2_weight, self.norm2_bias


class FusionLayer(torch.autograd.Function):
    """y (B, rows, d) from x (B, T, d), positions (T, d) or (B, T, d), the keys' bias, a seed and the parameters.

    Everything is computed in x's dtype, to which the parameters are cast where they are used.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, x: Tensor, positions: Tensor, bias: Tensor | None, seed: Tensor | None, *weights: Tensor
    ) -> Tensor:
        w = Weights(*(weight.to(x.dtype) for weight in weights))
        with no_autocast(x):
            a, *_ = _before_attention(x, w, options)
            q, k, v = _project(a, positions, w, options)
            o, state = attention_state.forward(q, k, v, bias, options.dropout)
            s = _attended(x, o, seed, w, options)
            n, *_ = _before_feed(s, w, options)
            u = _hidden(n, seed, w, options)
            t = _fed(s, n, u, seed, w, options)
            y, *statistics = (t,) if options.pre_norm else _norm(t, w.norm2, options)
        kept = () if options.recompute else (q, k, v, s, u, *(() if options.pre_norm else (t, *statistics)))
        ctx.options, ctx.states = options, len(state)
        ctx.save_for_backward(x, positions, bias, seed, *weights, o, *state, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("FusionEncoder: the derivative of its backward is not implemented")
        options, p = ctx.options, ctx.options.dropout
        x, positions, bias, seed, *rest = ctx.saved_tensors
        weights, o, rest = rest[: len(Weights._fields)], rest[len(Weights._fields)], rest[len(Weights._fields) + 1 :]
        state, kept = tuple(rest[: ctx.states]), rest[ctx.states :]
        w = Weights(*(weight.to(x.dtype) for weight in weights))
        grads = {name: None for name, need in zip(Weights._fields, ctx.needs_input_grad[5:]) if need}  # filled below
        with no_autocast(x):
            a, *a_statistics = _before_attention(x, w, options)
            if options.recompute:
                q, k, v = _project(a, positions, w, options)
                s = _attended(x, o, seed, w, options)
            else:
                q, k, v, s, u, *of_t = kept
            n, *s_statistics = _before_feed(s, w, options)
            if options.recompute:
                u = _hidden(n, seed, w, options)
                t = None if options.pre_norm else _fed(s, n, u, seed, w, options)
                of_t = () if options.pre_norm else (t, *_norm(t, w.norm2, options)[1:])

            dt = dy if options.pre_norm else _norm_backward(dy, *of_t, w, "norm2", grads)
            d = drop(dt, p, seed, 2)
            du = _linear_backward(d, u, w, ("weight2", "bias2"), grads)
            dz = aten.threshold_backward(du, u, 0)
            if seed is not None:
                dz = dz.mul_(philox.inv_keep(p))
            dn = _linear_backward(dz, n, w, ("weight1", "bias1"), grads)
            if options.pre_norm:
                ds = _norm_backward(dn, s, *s_statistics, w, "norm2", grads).add_(dt)
            else:
                ds = _norm_backward(dn.add_(dt), s, *s_statistics, w, "norm1", grads)
            do = _linear_backward(drop(ds, p, seed, 0), _joined(o), w, ("out_weight", "out_bias"), grads)
            do = _split(do, options)
            dq, dk, dv = map(_joined, attention_state.backward(do, q, k, v, bias, p, o, state))
            placed = a + positions
            queries, keys, values = w.in_weight.chunk(3)
            dplaced = dk @ keys
            dplaced[:, : options.rows].baddbmm_(dq, queries.expand(len(x), -1, -1))
            da = dplaced + dv @ values
            read = (dq, placed[:, : options.rows]), (dk, placed), (dv, a)
            if "in_weight" in grads:
                grads["in_weight"] = torch.cat([d.flatten(0, 1).t() @ z.flatten(0, 1) for d, z in read])
            if "in_bias" in grads:
                grads["in_bias"] = torch.cat([d.sum((0, 1)) for d, _ in read])
            dx = _norm_backward(da, x, *a_statistics, w, "norm1", grads) if options.pre_norm else da
            dx[:, : options.rows].add_(ds)
        if positions.ndim == 2:
            dplaced = dplaced.sum(0)
        of_weights = (grads[name].to(weight.dtype) if name in grads else None for name, weight in zip(w._fields, weights))
        return None, dx, dplaced, None, None, *of_weights


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off for x's device, where it is on."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def _before_attention(x: Tensor, w: Weights, options: Options) -> tuple[Tensor, ...]:
    """a, and with a norm its statistics."""
    return _norm(x, w.norm1, options) if options.pre_norm else (x,)


def _project(a: Tensor, positions: Tensor, w: Weights, options: Options) -> list[Tensor]:
    placed, width = a + positions, a.shape[-1]
    if options.rows == a.shape[1]:
        q, k = F.linear(placed, w.in_weight[: 2 * width], w.in_bias[: 2 * width]).chunk(2, -1)
    else:
        q = F.linear(placed[:, : options.rows], w.in_weight[:width], w.in_bias[:width])
        k = F.linear(placed, w.in_weight[width : 2 * width], w.in_bias[width : 2 * width])
    v = F.linear(a, w.in_weight[2 * width :], w.in_bias[2 * width :])
    return [_split(z, options) for z in (q, k, v)]


def _attended(x: Tensor, o: Tensor, seed: Tensor | None, w: Weights, options: Options) -> Tensor:
    """s."""
    update = F.linear(_joined(o), w.out_weight, w.out_bias)
    return x[:, : options.rows] + drop(update, options.dropout, seed, 0)


def _before_feed(s: Tensor, w: Weights, options: Options) -> tuple[Tensor, ...]:
    """n and its norm's statistics."""
    return _norm(s, w.norm2 if options.pre_norm else w.norm1, options)


def _hidden(n: Tensor, seed: Tensor | None, w: Weights, options: Options) -> Tensor:
    """u."""
    return drop(F.linear(n, w.weight1, w.bias1).relu_(), options.dropout, seed, 1)


def _fed(s: Tensor, n: Tensor, u: Tensor, seed: Tensor | None, w: Weights, options: Options) -> Tensor:
    """t; in pre y."""
    return (s if options.pre_norm else n) + drop(F.linear(u, w.weight2, w.bias2), options.dropout, seed, 2)


def _split(z: Tensor, options: Options) -> Tensor:
    """(B, T, d) as heads, (B, H, T, D)."""
    return z.unflatten(-1, (options.num_heads, -1)).transpose(1, 2)


def _joined(z: Tensor) -> Tensor:
    """Heads as (B, T, d)."""
    return z.transpose(1, 2).flatten(2)


def _norm(x: Tensor, affine: tuple[Tensor, Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm (Ba et al., 2016) and its statistics."""
    return torch.native_layer_norm(x, x.shape[-1:], *affine, options.eps)


def _norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Weights, name: str, grads: dict[str, Tensor]
) -> Tensor:
    """dx; the gradients of the parameters in `grads` go there."""
    names = f"{name}_weight", f"{name}_bias"
    wanted = [name in grads for name in names]
    dx, *found = aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, *getattr(w, name), [True, *wanted]
    )
    grads.update((name, grad) for name, grad, want in zip(names, found, wanted) if want)
    return dx


def _linear_backward(dz: Tensor, x: Tensor, w: Weights, names: tuple[str, str], grads: dict[str, Tensor]) -> Tensor:
    """dx where z = x W^T + b; the gradients of the parameters in `grads` go there."""
    weight, bias = names
    if weight in grads:
        grads[weight] = dz.flatten(0, 1).t() @ x.flatten(0, 1)
    if bias in grads:
        grads[bias] = dz.sum((0, 1))
    return dz @ getattr(w, weight)
