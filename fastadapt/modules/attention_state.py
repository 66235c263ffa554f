"""Attention whose backward takes what it is given: q, k and v, kept or computed anew, the output and what the kernel left.

For a function that keeps less than scaled_dot_product_attention's own backward does.  forward returns the output and a state,
a few small tensors; backward takes both.  The kernels are torch's: flash or memory-efficient attention on a GPU, flash
attention on a CPU.  Where torch has none (dropout on a CPU, float64 on a GPU, empty tensors), the weights are formed, and
formed again in the backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastadapt.core import philox

_ALIGNMENT = 16  # of a row of the bias, in elements, which the memory-efficient kernel asks for
aten = torch.ops.aten


def key_bias(key_padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, (B, 1, 1, S): minus infinity where the mask (B, S) is True, or a floating mask itself."""
    batch, keys = key_padding_mask.shape
    aligned = torch.zeros(batch, 1, 1, -(-keys // _ALIGNMENT) * _ALIGNMENT, dtype=dtype, device=key_padding_mask.device)
    bias, mask = aligned[..., :keys], key_padding_mask[:, None, None]
    return bias.masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else bias.copy_(mask)


def kind(q: Tensor, bias: Tensor | None, dropout_p: float) -> str:
    """Which kernel computes attention; tensors on meta take a GPU's."""
    if q.numel() == 0:
        return "math"
    if q.device.type == "cpu":
        return "math" if dropout_p else "cpu"
    if q.device.type not in ("cuda", "meta") or q.dtype is torch.float64 or q.shape[-1] % 8:
        return "math"
    return "efficient" if bias is not None or q.dtype is torch.float32 else "flash"


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """dropout(softmax(q k^T / sqrt(D) + bias)) v, and the state.

    q (B, H, T, D), k and v (B, H, S, D); bias broadcast to (B, H, T, S), its rows aligned as those of `key_bias` are, or None.
    A query without a key gives zero.
    """
    which = kind(q, bias, dropout_p)
    if which == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)
        return out, (lse,)
    if which == "efficient":
        out, *state = aten._scaled_dot_product_efficient_attention(q, k, v, _expanded(bias, q, k), True, dropout_p)
        return out, tuple(state)
    if which == "flash":
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)
        return out, (lse, seed, offset)
    state = (philox.draw_seed(q.device),) if philox.threshold(dropout_p) else ()
    return drop(_weights(q, k, bias), dropout_p, *state) @ v, state


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    out: Tensor,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of `out`."""
    which = kind(q, bias, dropout_p)
    if which == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, *state, 0.0, False, attn_mask=bias
        )
    if which == "efficient":
        wanted = [True, True, True, False]
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, _expanded(bias, q, k), out, *state, dropout_p, wanted
        )[:3]
    if which == "flash":
        lse, seed, offset = state
        sizes = None, None, q.shape[2], k.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *sizes, dropout_p, False, seed, offset
        )
    weights, scale = _weights(q, k, bias), q.shape[-1] ** -0.5
    for_scores = aten._softmax_backward_data(drop(grad @ v.mT, dropout_p, *state), weights, -1, weights.dtype) * scale
    return for_scores @ k, for_scores.mT @ q, drop(weights, dropout_p, *state).mT @ grad


def drop(x: Tensor, p: float, seed: Tensor | None = None, member: int = 0) -> Tensor:
    """x keep / (1 - p), the mask a function of the seed; x itself without one.  Linear, and its own transpose."""
    if seed is None:
        return x
    return (philox.masked(x.reshape(-1, x.shape[-1]), seed, p, member) * philox.inv_keep(p)).view(x.shape)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return aten._safe_softmax(scores if bias is None else scores + bias, -1)


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
