"""Cross-attention over few keys in Triton: the forward and the backward, as sequences of kernel launches.

Exact float32 runs torch's products: the plain cores have too few registers for a head's keys, values and scores together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.core.launch import launch
from fastadapt.core.tiles import precision
from fastadapt.kernels.prior_attention import config, reference
from fastadapt.kernels.prior_attention import triton_kernel as kernels
from fastadapt.kernels.prior_attention.config import Problem, Tiles

SUM_BLOCK = 1024


def forward(tensors: Sequence[Tensor | None], num_heads: int, scale: float) -> list[Tensor]:
    """[out], as reference.forward."""
    q, k, v, mask = tensors
    problem = problem_of(q, k, num_heads)
    if problem.exact:
        return reference.forward(tensors, num_heads, scale)
    q, k, v = map(with_adjacent_columns, (q, k, v))
    tiles = config.forward_tiles(problem)
    out = q.new_empty(q.shape)
    launch(
        kernels.forward_kernel, (-(-problem.queries // tiles.rows) * num_heads * problem.batch,),
        q, k, v, mask, out, *strides(q), *strides(k), *strides(v), *strides(mask), problem.queries, problem.keys, scale,
        device=q.device, **constants(problem, tiles, mask),
    )  # fmt: skip
    return [out]


def backward(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor], needs: Sequence[bool], num_heads: int, scale: float
) -> list[Tensor]:
    """The gradients of q, k and v that `needs` marks, as reference.backward."""
    q, k, v, mask = saved
    need_q, need_k, need_v, _ = needs
    problem = problem_of(q, k, num_heads)
    if problem.exact:
        return reference.backward(saved, grads, needs, num_heads, scale)
    q, k, v, grad = map(with_adjacent_columns, (q, k, v, grads[0]))
    tiles = config.backward_tiles(problem)
    splits = config.splits(problem, summed=need_k or need_v)
    rows_each = -(-problem.queries // (splits * tiles.rows)) * tiles.rows
    dq = q.new_empty(q.shape) if need_q else None
    dk, dv = (k.new_empty((splits, *k.shape), dtype=sum_dtype(k, splits)) if need else None for need in (need_k, need_v))
    launch(
        kernels.backward_kernel, (splits * num_heads * problem.batch,),
        q, k, v, mask, grad, dq, dk, dv, *strides(q), *strides(k), *strides(v), *strides(grad), *strides(mask),
        problem.batch, problem.queries, problem.keys, rows_each, splits, scale,
        device=q.device, NEED_Q=need_q, NEED_K=need_k, NEED_V=need_v, **constants(problem, tiles, mask),
    )  # fmt: skip
    partials = [partial for partial in (dk, dv) if partial is not None]
    own = summed(partials, k) if splits > 1 else [partial[0] for partial in partials]
    return [dq, *own] if need_q else own


def summed(partials: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Each of the partial sums (splits, ...) added over the splits, in `like`'s dtype."""
    if not partials:
        return []
    gradients = [like.new_empty(like.shape) for _ in partials]
    launch(
        kernels.sum_kernel, (-(-like.numel() // SUM_BLOCK), len(partials)),
        tuple(partials), tuple(gradients), like.numel(), partials[0].shape[0],
        device=like.device, COUNT=len(partials), BLOCK=SUM_BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return gradients


def sum_dtype(like: Tensor, splits: int) -> torch.dtype:
    """That of partial sums: float32, or the gradient's own where one program adds up all of it."""
    return torch.float32 if splits > 1 else like.dtype


def problem_of(q: Tensor, k: Tensor, num_heads: int) -> Problem:
    """The numbers the choice of tiles depends on."""
    batch, queries, width = q.shape
    return config.problem(batch, queries, k.shape[1], num_heads, width // num_heads, q.dtype, q.device)


def constants(problem: Problem, tiles: Tiles, mask: Tensor | None) -> dict[str, Any]:
    """The constexprs that both kernels have, and Triton's launch options."""
    return {
        "MASKED": mask is not None,
        "HEADS": problem.num_heads,
        "WIDTH": problem.head_width,
        "COLUMNS": tiles.columns,
        "KEYS": tiles.keys,
        "ROWS": tiles.rows,
        "PRECISION": precision(),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def with_adjacent_columns(tensor: Tensor | None) -> Tensor | None:
    """`tensor` itself, or a copy where its last dimension has another stride than 1."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Those of the first two dimensions: samples, then rows."""
    return (0, 0) if tensor is None else tensor.stride()[:2]
