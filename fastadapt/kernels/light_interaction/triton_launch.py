"""Light interaction in Triton: the forward and the backward, as sequences of kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.core.launch import launch
from fastadapt.core.tiles import padded
from fastadapt.kernels.light_interaction import config
from fastadapt.kernels.light_interaction import triton_kernel as kernels
from fastadapt.kernels.light_interaction.config import Problem
from fastadapt.kernels.light_interaction.reference import HEAD, Direction, directions

SUM_ELEMENTS = 8192  # that one program of sum_kernel loads
PROJECTIONS = 4  # (d, d) matrices of a direction: Wq, Wk, Wv and Wo


class Call(NamedTuple):
    """One call as the kernels read it; weights are contiguous, x and y have adjacent columns."""

    x: Tensor
    y: Tensor
    mask: Tensor | None
    in_weights: tuple[Tensor, Tensor]
    in_biases: tuple[Tensor, Tensor]
    out_weights: tuple[Tensor, Tensor]
    out_biases: tuple[Tensor, Tensor]
    num_heads: int
    problem: Problem

    @property
    def scale(self) -> float:
        return (self.problem.width // self.num_heads) ** -0.5

    def options(self, num_warps: int) -> dict[str, Any]:
        """The constexprs that all kernels but the last two share, and Triton's launch options."""
        return {
            "WORDS": padded(self.y.shape[1]),
            "WIDTH": self.problem.width,
            "PRECISION": config.precision(self.problem),
            "num_warps": num_warps,
            "num_stages": 1,
        }


def call_of(flat: Sequence[Tensor | None], num_heads: int) -> Call:
    """The call in a flat list (x, y, mask, both directions' tensors)."""
    x, y, mask = flat[:HEAD]
    roles = (tuple(tensor.contiguous() for tensor in both) for both in zip(*directions(flat)))
    mask = None if mask is None else mask.contiguous()
    problem = config.problem(x.shape[-1], x.dtype, x.device)
    return Call(with_adjacent_columns(x), with_adjacent_columns(y), mask, *roles, num_heads, problem)


def with_adjacent_columns(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy where its last dimension has another stride than 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(tensors: Sequence[Tensor | None], num_heads: int) -> list[Tensor]:
    """[x', y'] as reference.forward, then o_0 in x's dtype, and o_1 and its log-sum-exp (B, heads, Ty) in float32."""
    call = call_of(tensors, num_heads)
    x, y = call.x, call.y
    (batch, tokens, width), words = x.shape, y.shape[1]
    tiles = config.forward_tiles(call.problem)
    count = -(-tokens // tiles.rows)
    results, context0 = [x.new_empty(x.shape), y.new_empty(y.shape)], x.new_empty(x.shape)
    context1 = y.new_empty(y.shape, dtype=torch.float32)
    logsum = y.new_empty(batch, num_heads, words, dtype=torch.float32)
    contexts = y.new_empty(batch, count, words, width, dtype=torch.float32)
    logsums = y.new_empty(batch, count, num_heads, words, dtype=torch.float32)
    launch(
        kernels.forward_kernel, (batch, count, 2),
        x, y, call.mask, call.in_weights, call.in_biases, call.out_weights[0], call.out_biases[0], results[0], context0,
        contexts, logsums, x.stride()[:2], y.stride()[:2], tokens, words, call.scale,
        device=x.device, HEADS=num_heads, ROWS=tiles.rows, **call.options(tiles.num_warps),
    )  # fmt: skip
    launch(
        kernels.words_kernel, (batch,) if words else (0,),
        y, call.out_weights[1], call.out_biases[1], contexts, logsums, results[1], context1, logsum, y.stride()[:2], words,
        count,
        device=x.device, HEADS=num_heads, **call.options(config.word_warps(call.problem)),
    )  # fmt: skip
    return [*results, context0, context1, logsum]


def backward(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool], num_heads: int
) -> list[Tensor]:
    """The gradients that `needs` marks, as reference.backward."""
    *flat, context0, context1, logsum = saved
    call = call_of(flat, num_heads)
    x, y, device = call.x, call.y, call.x.device
    dx_out, dy_out = map(with_adjacent_columns, grads[:2])
    (batch, tokens, width), words = x.shape, y.shape[1]
    weights = any(needs[HEAD:])
    tiles = config.backward_tiles(call.problem)
    count = -(-tokens // tiles.rows)
    dx, dy = x.new_empty(x.shape), y.new_empty(y.shape)
    word_parts = y.new_empty(3, batch, count, words, width, dtype=torch.float32)
    image_grads = x.new_empty(4, batch * tokens, width) if weights else None
    word_grads = y.new_empty(5, batch * words, width) if weights else None
    launch(
        kernels.over_image_backward_kernel, (batch, count),
        x, y, call.in_weights[1], call.in_biases[1], call.out_weights[1], context1, logsum, dy_out, dx, image_grads,
        word_parts, x.stride()[:2], y.stride()[:2], dy_out.stride()[:2], tokens, words, call.scale,
        device=device, HEADS=num_heads, ROWS=tiles.rows, WEIGHTS=weights, **call.options(tiles.num_warps),
    )  # fmt: skip
    launch(
        kernels.over_words_backward_kernel, (batch, count),
        x, y, call.mask, call.in_weights[0], call.in_biases[0], call.out_weights[0], call.out_biases[0], context0, dx_out, dx,
        image_grads, word_parts, x.stride()[:2], y.stride()[:2], dx_out.stride()[:2], tokens, words, call.scale,
        device=device, HEADS=num_heads, ROWS=tiles.rows, WEIGHTS=weights, **call.options(tiles.num_warps),
    )  # fmt: skip
    launch(
        kernels.words_backward_kernel, (batch,) if words else (0,),
        y, call.in_weights, call.out_weights[1], call.out_biases[1], context1, dy_out, word_parts, dy, word_grads,
        y.stride()[:2], dy_out.stride()[:2], words, count,
        device=device, WEIGHTS=weights, **call.options(config.word_warps(call.problem)),
    )  # fmt: skip
    wanted = [gradient for gradient, need in zip((dx, dy), needs) if need]
    return wanted + weight_grads(call, needs, context0, image_grads, word_grads) if weights else wanted


class Job(NamedTuple):
    """The gradient of one (d, d) matrix, left^T right, and of its bias, the column sums of left."""

    left: Tensor
    right: Tensor
    weight: Tensor
    bias: Tensor


def weight_grads(
    call: Call, needs: Sequence[bool], context0: Tensor, image_grads: Tensor, word_grads: Tensor
) -> list[Tensor]:
    """The gradients of the weights and biases that `needs` marks; projections without one that is wanted are left out."""
    x, y = call.x, call.y
    width = call.problem.width
    dquery0, dkey1, dvalue1, dattention0 = image_grads
    dquery1, dkey0, dvalue0, dattention1, context1 = word_grads
    operands = (
        ((dquery0, x), (dkey0, y), (dvalue0, y), (dattention0, context0)),
        ((dquery1, y), (dkey1, x), (dvalue1, x), (dattention1, context1.view(y.shape))),
    )
    jobs, wanted = [], []
    roles = zip(call.in_weights, call.in_biases, call.out_weights, call.out_biases)
    for own, tensors, need in zip(operands, roles, directions(needs)):
        gradients = Direction(*map(torch.empty_like, tensors))
        matrices = [*zip(gradients.in_weight.split(width), gradients.in_bias.split(width))]
        matrices.append((gradients.out_weight, gradients.out_bias))
        asked = [need.in_weight or need.in_bias] * 3 + [need.out_weight or need.out_bias]
        jobs += [Job(*pair, *matrix) for pair, matrix, ask in zip(own, matrices, asked) if ask]
        wanted += [gradient for gradient, ask in zip(gradients, need) if ask]
    launch_weight_grads(call.problem, jobs)
    return wanted


def launch_weight_grads(problem: Problem, jobs: Sequence[Job]) -> None:
    """weight_grads_kernel into partial sums, then sum_kernel into the gradients."""
    device, width = jobs[0].left.device, problem.width
    tiles = config.weight_tiles(problem)
    rows = tuple(job.left.shape[0] for job in jobs)
    splits = config.splits(problem, max(rows), len(jobs))
    partials = torch.empty(splits, len(jobs), width + 1, width, dtype=torch.float32, device=device)
    lefts, rights, weights, biases = (tuple(column) for column in zip(*jobs))
    launch(
        kernels.weight_grads_kernel, (len(jobs), splits),
        lefts, rights, tuple(right.stride(0) for right in rights), tuple(right.stride(1) for right in rights),
        tuple(max(right.shape[1], 1) for right in rights), rows,
        tuple(-(-count // (splits * tiles.rows)) * tiles.rows for count in rows), partials,
        device=device, JOBS=len(jobs), ROWS=tiles.rows, WIDTH=width, PRECISION=config.precision(problem),
        num_warps=tiles.num_warps, num_stages=config.weight_stages(problem),
    )  # fmt: skip
    block = SUM_ELEMENTS // padded(splits)
    launch(
        kernels.sum_kernel, (-(-width * (width + 1) // block), len(jobs)),
        partials, weights, biases, splits,
        device=device, JOBS=len(jobs), WIDTH=width, SPLITS=padded(splits), BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
