"""Cross-attention over few keys in plain torch, forward and backward: the specification, CPU path and oracle of the tests.

For each sample and head, with q (Tq, d), k and v (Tk, d), and K, V for k, v with zeros in the rows of masked keys,

    S = scale q K^T             -inf in the columns of masked keys
    P = softmax(S)              over the keys; zeros where all of them are masked
    out = P V

and, with dO the gradient of out,

    dV = P^T dO
    dP = dO V^T
    dS = P o (dP - rowsum(P o dP))
    dq = scale dS K             dk = scale dS^T q

(Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1 and section 3.2.2.)  P is computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """q, k, v and the mask, without v where the gradient of v alone is wanted, which does not read it."""
    q, k, v, mask = tensors
    return [q, k, v if needs[0] or needs[1] else None, mask]


def forward(tensors: Sequence[Tensor | None], num_heads: int, scale: float) -> list[Tensor]:
    """[out]: (B, Tq, D) in q's dtype."""
    q, k, v, mask = tensors
    weights = probabilities(split_heads(q, num_heads), split_heads(unmasked(k, mask), num_heads), mask, scale)
    return [merge_heads(weights.to(q.dtype) @ split_heads(unmasked(v, mask), num_heads))]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    num_heads: int,
    scale: float,
) -> list[Tensor]:
    """The gradients of q, k and v that `needs` marks; differentiable again."""
    q, k, v, mask = saved
    need_q, need_k, need_v, _ = needs
    queries, keys = split_heads(q, num_heads), split_heads(unmasked(k, mask), num_heads)
    grad = split_heads(grads[0], num_heads)
    weights = probabilities(queries, keys, mask, scale)
    wanted = []
    if need_q or need_k:
        dweights = (grad @ split_heads(unmasked(v, mask), num_heads).transpose(-2, -1)).to(weights.dtype)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        dscores = dscores.to(q.dtype)
    if need_q:
        wanted.append(merge_heads(scaled_product(dscores, keys, scale)))
    if need_k:
        wanted.append(merge_heads(scaled_product(dscores.transpose(-2, -1), queries, scale)))
    if need_v:
        wanted.append(merge_heads(weights.to(q.dtype).transpose(-2, -1) @ grad))
    return wanted


def probabilities(queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """P, (B, heads, Tq, Tk), in float32 or wider; queries and keys have their heads split, and keys no masked rows."""
    scores = scaled_product(queries, keys.transpose(-2, -1), scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return torch.softmax(scores, -1)
    columns = mask[:, None, None, :]
    # the second fill is for samples without a key, whose softmax is NaN
    return torch.softmax(scores.masked_fill(columns, -torch.inf), -1).masked_fill(columns, 0.0)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale left @ right, (B, heads, m, n); the scale multiplies before the product is rounded."""
    flat = torch.baddbmm(left.new_empty(()), left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=scale)
    return flat.unflatten(0, left.shape[:2])


def unmasked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`tensor` (B, Tk, D) with zeros in the rows of masked keys, so that what is there, be it NaN, reaches nothing."""
    return tensor if mask is None else tensor.masked_fill(mask[..., None], 0.0)


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) as (B, heads, T, D / heads)."""
    return tensor.unflatten(-1, (num_heads, tensor.shape[-1] // num_heads)).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """(B, heads, T, D / heads) as a contiguous (B, T, D)."""
    return tensor.transpose(1, 2).flatten(2).contiguous()
