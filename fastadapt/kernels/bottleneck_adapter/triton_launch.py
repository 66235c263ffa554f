"""Bottleneck adapter in Triton: the forward and the backward, as sequences of kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.core.launch import launch
from fastadapt.core.tiles import padded, precision
from fastadapt.kernels.bottleneck_adapter import config, reference
from fastadapt.kernels.bottleneck_adapter import triton_kernel as kernels
from fastadapt.kernels.bottleneck_adapter.config import Problem, Tiles
from fastadapt.kernels.bottleneck_adapter.reference import Operands, flat_rows


def contiguous(call: Operands) -> Operands:
    """The call with its parameters and row scales as the kernels read them."""
    own = {name: getattr(call, name) for name in Operands._fields[1:8]}
    return call._replace(**{name: tensor.contiguous() for name, tensor in own.items() if tensor is not None})


def problem_of(call: Operands, rows: int, dtype: torch.dtype) -> Problem:
    """The numbers the choice of algorithm and tiles depends on."""
    (h, depth), width = call.down_weight.shape, call.up_weight.shape[0]
    return config.problem(rows, depth, width, h, dtype, call.up_weight.dtype, call.up_weight.device)


def scale_kind(call: Operands) -> str:
    """Whose the scale tensor is."""
    return "none" if call.scale is None else "shared" if call.scale.ndim == 0 else "rows"


def options(tiles: Tiles) -> dict[str, int]:
    """The launch options of `tiles`, under Triton's names."""
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def strides(rows: Tensor | None) -> tuple[int, int]:
    """Of a matrix that may not be there."""
    return (0, 0) if rows is None else rows.stride()


def forward(tensors: Sequence[Tensor | None], factor: float, activation: str, norm_eps: float) -> list[Tensor]:
    """The result, the hidden and LayerNorm's statistics, as reference.forward."""
    call = contiguous(Operands(*tensors))
    x = flat_rows(call.x)
    problem = problem_of(call, x.shape[0], x.dtype)
    if config.algorithm(problem) == "library":
        return reference.forward(tensors, factor, activation, norm_eps)
    residual = None if call.residual is None else flat_rows(call.residual)
    y = x.new_empty(problem.rows, problem.width, dtype=x.dtype if residual is None else residual.dtype)
    hidden = x.new_empty(problem.rows, problem.h)
    statistics = [] if call.norm_weight is None else [x.new_empty(2, problem.rows, dtype=torch.float32)]
    tiles = config.row_tiles(problem)
    launch(
        kernels.forward_kernel, (-(-problem.rows // tiles.rows),),
        x, call.down_weight, call.down_bias, call.up_weight, call.up_bias, call.norm_weight, call.norm_bias, call.scale, residual,
        y, hidden, *(statistics or [None]), problem.rows, problem.depth, problem.width, problem.h, *x.stride(), *strides(residual),
        factor, norm_eps,
        device=x.device, ACTIVATION=activation, SCALE=scale_kind(call), KEEP=True, EVEN_DEPTH=problem.depth % tiles.columns == 0,
        EVEN_WIDTH=problem.width % tiles.columns == 0, HIDDEN=padded(problem.h), ROWS=tiles.rows, DEPTH=tiles.columns,
        COLUMNS=tiles.columns, PRECISION=precision(), **options(tiles),
    )  # fmt: skip
    return [y.view(*call.x.shape[:-1], problem.width), hidden, *statistics]


class Backward(NamedTuple):
    """What both kernels of the backward read; found: a tensor for every gradient that is wanted, x's as (rows, K)."""

    call: Operands
    found: Operands
    problem: Problem
    dy: Tensor
    hidden: Tensor
    statistics: Tensor | None
    factor: float
    activation: str


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    factor: float,
    activation: str,
    norm_eps: float,
) -> list[Tensor]:
    """The gradients that `needs` marks, as reference.backward."""
    hidden, statistics = saved[9:]
    if hidden is None or any(grad is not None for grad in grads[1:]):
        return reference.backward(saved, grads, needs, factor, activation, norm_eps)
    call, need, dy = contiguous(Operands(*saved[:9])), Operands(*needs), flat_rows(grads[0])
    problem = problem_of(call, dy.shape[0], hidden.dtype)
    if config.algorithm(problem) == "library":
        return reference.backward(saved, grads, needs, factor, activation, norm_eps)
    shaped = call._replace(x=hidden.new_empty(problem.rows if need.x else 0, problem.depth))
    found = Operands(*(torch.empty_like(tensor) if wanted else None for tensor, wanted in zip(shaped, need)))
    launch_backward(Backward(call, found, problem, dy, hidden, statistics, factor, activation))
    if need.x:
        found = found._replace(x=found.x.view(*grads[0].shape[:-1], problem.depth))
    return [gradient for gradient in found if gradient is not None]


def launch_backward(run: Backward) -> None:
    """hidden_grad_kernel for what depends on the hidden's gradient, then weight_grad_kernel for the sums over rows."""
    found, problem, device = run.found, run.problem, run.hidden.device
    tiles = config.weight_tiles(problem)
    shared = found.scale is not None and found.scale.ndim == 0
    columns = any(gradient is not None for gradient in (found.down_weight, found.norm_weight, found.norm_bias))
    before = -(-problem.depth // tiles.columns) if columns else int(found.down_bias is not None or shared)
    after = -(-problem.width // tiles.columns) if found.up_weight is not None or found.up_bias is not None else 0
    per_row = torch.empty(problem.rows, dtype=torch.float32, device=device) if shared else found.scale
    dz = torch.empty_like(run.hidden) if before else None
    first = dz is not None or found.x is not None or found.scale is not None
    counters = (torch.empty if first else torch.zeros)(before + after, dtype=torch.int32, device=device)
    if first:
        launch_hidden_grad(run, dz, per_row, counters)
    if before + after:
        launch_weight_grad(run, tiles, dz, per_row if shared else None, counters, before, after)


def launch_hidden_grad(run: Backward, dz: Tensor | None, dscale: Tensor | None, counters: Tensor) -> None:
    """hidden_grad_kernel over all rows."""
    call, problem = run.call, run.problem
    x = None if call.x is None else flat_rows(call.x)
    tiles = config.grad_tiles(problem)
    launch(
        kernels.hidden_grad_kernel, (-(-problem.rows // tiles.rows),),
        run.dy, call.down_weight, call.down_bias, call.up_weight, call.up_bias, call.norm_weight, call.norm_bias, call.scale, x,
        run.hidden, run.statistics, dz, run.found.x, dscale, counters, problem.rows, problem.depth, problem.width, problem.h,
        *run.dy.stride(), *strides(x), run.factor, counters.numel(),
        device=run.hidden.device, ACTIVATION=run.activation, SCALE=scale_kind(call),
        EVEN_DEPTH=problem.depth % tiles.columns == 0, EVEN_WIDTH=problem.width % tiles.columns == 0, HIDDEN=padded(problem.h),
        ROWS=tiles.rows, COLUMNS=tiles.columns, TILES=padded(counters.numel()), PRECISION=precision(), **options(tiles),
    )  # fmt: skip


def launch_weight_grad(
    run: Backward, tiles: Tiles, dz: Tensor | None, per_row: Tensor | None, counters: Tensor, before: int, after: int
) -> None:
    """weight_grad_kernel over `before` tiles of columns of x and `after` tiles of columns of dy."""
    call, found, problem, device = run.call, run.found, run.problem, run.hidden.device
    x = flat_rows(call.x) if found.down_weight is not None or found.norm_weight is not None else None
    splits = config.row_splits(problem, before + after, tiles.rows)
    rows_each = -(-max(problem.rows, 1) // (splits * tiles.rows)) * tiles.rows
    hidden = padded(problem.h)
    each = hidden * tiles.columns + hidden + tiles.columns + 16  # as the kernel lays a partial sum out
    partials = torch.empty((before + after) * splits * each if splits > 1 else 0, dtype=torch.float32, device=device)
    launch(
        kernels.weight_grad_kernel, (before + after, splits),
        x, run.dy, dz, run.hidden, run.statistics, call.down_weight, call.norm_weight, call.norm_bias, call.scale, per_row, partials,
        counters, found.down_weight, found.down_bias, found.up_weight, found.up_bias, found.norm_weight, found.norm_bias,
        None if per_row is None else found.scale, problem.rows, problem.depth, problem.width, problem.h, *strides(x),
        *run.dy.stride(), rows_each, splits, before, run.factor,
        device=device, ACTIVATION=run.activation, SCALE=scale_kind(call), SPLIT=splits > 1, HIDDEN=hidden, ROWS=tiles.rows,
        COLUMNS=tiles.columns, PRECISION=precision(), **options(tiles),
    )  # fmt: skip
