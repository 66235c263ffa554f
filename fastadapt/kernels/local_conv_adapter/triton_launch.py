"""Local convolution adapter in Triton: the forward as two launches.

The backward is the reference's: what trains is better served by the operation's parts, as config.pays tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.core.launch import launch
from fastadapt.core.tiles import padded, precision
from fastadapt.kernels.local_conv_adapter import config, reference
from fastadapt.kernels.local_conv_adapter.config import Problem
from fastadapt.kernels.local_conv_adapter.reference import Operands
from fastadapt.kernels.local_conv_adapter.triton_kernel import adapter_kernel, prepare_kernel

BLOCK = 1024  # elements of a program of prepare_kernel

backward = reference.backward


def forward(
    tensors: Sequence[Tensor | None],
    height: int,
    width: int,
    prefix_tokens: int,
    dilation: int,
    factor: float,
    activation: str,
) -> list[Tensor]:
    """[y, u], as reference.forward."""
    call = Operands(*tensors)
    problem = problem_of(call, height, width, dilation)
    if config.algorithm(problem) == "library":
        return reference.forward(tensors, height, width, prefix_tokens, dilation, factor, activation)
    x, residual = with_adjacent_columns(call.x), with_adjacent_columns(call.residual)
    # the others as they lie in memory, the convolution's as (kh, kw, h)
    down, down_bias, taps, conv_bias, up, up_bias, scale = (
        None if tensor is None else tensor.contiguous()
        for tensor in call._replace(weight=call.weight.permute(1, 2, 0))[1:8]
    )
    y = x.new_empty(*x.shape[:2], problem.width, dtype=x.dtype if residual is None else residual.dtype)
    u = x.new_empty(*x.shape[:2], problem.h)
    tiles = config.tiles(problem)
    count = -(-problem.rows // tiles.rows)
    counters, down, up = prepared(down, up, count, x.dtype)
    launch(
        adapter_kernel, (count,),
        x, down, down_bias, taps, conv_bias, up, up_bias, scale, residual, u, y, counters, problem.rows, x.shape[1],
        prefix_tokens, height, width, problem.depth, problem.h, problem.width, *x.stride()[:2],
        *((0, 0) if residual is None else residual.stride()[:2]), dilation, config.tile_reach(problem), factor,
        device=x.device, ACTIVATION=activation, SCALE="none" if scale is None else "rows" if scale.ndim else "shared",
        EVEN_DEPTH=problem.depth % tiles.columns == 0, EVEN_WIDTH=problem.width % tiles.columns == 0, KH=taps.shape[0],
        KW=taps.shape[1], UNROLL=tiles.unroll, HIDDEN=padded(problem.h), ROWS=tiles.rows, DEPTH=tiles.columns,
        COLUMNS=tiles.columns, PRECISION=precision(), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return [y, u]


def prepared(down: Tensor, up: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """So many counters at zero, and both weights in `dtype`: one launch."""
    counters = torch.empty(count, dtype=torch.int32, device=down.device)
    narrow = [None, None] if down.dtype is dtype else [torch.empty_like(weight, dtype=dtype) for weight in (down, up)]
    cast = 0 if narrow[0] is None else max(down.numel(), up.numel())
    launch(
        prepare_kernel, (-(-max(count, cast if count else 0) // BLOCK),),
        down, up, *narrow, counters, down.numel(), up.numel(), count, device=down.device, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return counters, *(weight if other is None else other for weight, other in zip((down, up), narrow))


def problem_of(call: Operands, height: int, width: int, dilation: int) -> Problem:
    """The numbers the choice of algorithm and tiles depends on."""
    (h, depth), kernel, x = call.down_weight.shape, tuple(call.weight.shape[1:]), call.x
    rows, features = x.shape[0] * x.shape[1], call.up_weight.shape[0]
    return config.problem(rows, depth, h, features, (height, width), kernel, dilation, x.dtype, x.device)


def with_adjacent_columns(tensor: Tensor | None) -> Tensor | None:
    """`tensor` itself, or a copy where its last dimension has another stride than 1."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
