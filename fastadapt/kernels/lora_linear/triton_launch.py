"""LoRA linear in Triton: the forward and the backward, as sequences of kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.core import philox
from fastadapt.core.launch import launch
from fastadapt.core.tiles import padded, precision
from fastadapt.kernels.lora_linear import config, reference
from fastadapt.kernels.lora_linear import triton_kernel as kernels
from fastadapt.kernels.lora_linear.config import Problem, Tiles
from fastadapt.kernels.lora_linear.reference import EACH, HEAD, cast, flat_rows, members

SUM_BLOCK = 1024
BAND = 8  # row tiles of one band of the schedule (device_math.tile_of)


class Call(NamedTuple):
    """One call as the kernels read it: a tuple with an entry a member for each role, parameters contiguous.

    weights keep their own dtype; biases are None where no member has one; downs and ups share one dtype.
    """

    seed: Tensor | None
    threshold: int
    dtype: torch.dtype
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None
    downs: tuple[Tensor, ...]
    ups: tuple[Tensor, ...]
    alphas: tuple[float, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    depth: int

    @property
    def dropout(self) -> bool:
        return self.seed is not None


def call_of(flat: Sequence[Tensor | None], scales: Sequence[float], dropout_p: float, dtype: torch.dtype) -> Call:
    """The call in a flat list (x, seed, members' tensors), computed in `dtype`."""
    weights, biases, downs, ups = zip(*members(flat))
    if any(bias is not None for bias in biases):
        biases = tuple(w.new_zeros(w.shape[0], dtype=dtype) if b is None else cast(b, dtype) for w, b in zip(weights, biases))
    if len({down.dtype for down in downs}) > 1:
        downs, ups = (tuple(cast(t, dtype) for t in factors) for factors in (downs, ups))
    return Call(
        seed=flat[1],
        threshold=philox.threshold(dropout_p),
        dtype=dtype,
        weights=tuple(weight.contiguous() for weight in weights),
        biases=None if biases[0] is None else tuple(bias.contiguous() for bias in biases),
        downs=tuple(down.contiguous() for down in downs),
        ups=tuple(up.contiguous() for up in ups),
        alphas=tuple(scale * philox.inv_keep(dropout_p) for scale in scales),
        widths=tuple(weight.shape[0] for weight in weights),
        ranks=tuple(down.shape[0] for down in downs),
        depth=weights[0].shape[1],
    )


def problem_of(call: Call, rows: int, device: torch.device, backward: bool) -> Problem:
    """The numbers the choice of algorithm depends on; the widest member stands for its group."""
    sizes = (max(call.widths), call.depth) if backward else (call.depth, max(call.widths))
    weight_dtype = max((weight.dtype for weight in call.weights), key=lambda dtype: dtype.itemsize)
    return config.problem(
        rows, *sizes, max(call.ranks), call.dropout, call.dtype, weight_dtype, device, backward, members=len(call.ranks)
    )


def options(tiles: Tiles) -> dict[str, int]:
    """The launch options of `tiles`, under Triton's names."""
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def forward(tensors: Sequence[Tensor | None], scales: Sequence[float], dropout_p: float) -> list[Tensor]:
    """The outputs and low-rank products, as reference.forward."""
    x = tensors[0]
    rows = flat_rows(x)
    call = call_of(tensors, scales, dropout_p, x.dtype)
    problem = problem_of(call, rows.shape[0], x.device, backward=False)
    algorithm = config.algorithm(problem)
    if algorithm == "library":
        return reference.forward(tensors, scales, dropout_p)
    if algorithm == "merge":
        biases = call.biases or [None] * len(call.weights)
        outputs = [F.linear(rows, merged(call, g), bias) for g, bias in enumerate(biases)]
        products = down_products(call, rows, problem)
    else:
        fused = algorithm == "fused"
        products = [rows.new_empty(rows.shape[0], rank) for rank in call.ranks] if fused else down_products(call, rows, problem)
        outputs = [rows.new_empty(rows.shape[0], width) for width in call.widths]
        launch_forward(call, rows, problem, fused, products, outputs)
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs] + products


def launch_forward(
    call: Call, rows: Tensor, problem: Problem, fused: bool, products: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """forward_kernel over all tiles of all members."""
    tiles = config.gemm_tiles(problem)
    rank = config.rank_tile(problem, fused)
    grid = (-(-problem.rows // tiles.rows) * -(-problem.width // tiles.columns), len(call.weights))
    launch(
        kernels.forward_kernel, grid,
        rows, call.seed, tuple(cast(weight, call.dtype) for weight in call.weights), call.biases, call.downs, call.ups,
        tuple(products), tuple(outputs), call.widths, call.ranks, call.alphas, problem.rows, call.depth, rows.stride(0),
        rows.stride(1), call.threshold,
        device=rows.device, MEMBERS=len(call.weights), BIAS=call.biases is not None, DROPOUT=call.dropout, FUSED=fused,
        EVEN=call.depth % tiles.depth == 0, CHUNKS=-(-problem.rank // rank), RANK=rank, ROWS=tiles.rows,
        COLUMNS=tiles.columns, DEPTH=tiles.depth, GROUP=BAND, PRECISION=precision(), **options(tiles),
    )  # fmt: skip


def down_products(call: Call, rows: Tensor, problem: Problem) -> list[Tensor]:
    """s_g = mask(x) A_g^T of every member."""
    strides = [(1, call.depth)] * len(call.ranks)
    return project(call, [rows] * len(call.ranks), call.downs, strides, problem, call.dropout)


def up_products(call: Call, grads: Sequence[Tensor], problem: Problem) -> list[Tensor]:
    """l_g = dy_g B_g of every member."""
    return project(call, grads, call.ups, [(rank, 1) for rank in call.ranks], problem, False)


def project(
    call: Call,
    sources: Sequence[Tensor],
    factors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]],
    problem: Problem,
    dropout: bool,
) -> list[Tensor]:
    """mask(source_g) @ factor_g, (rows, rank_g); strides: of each factor along the summed dimension and along the ranks."""
    tiles = config.project_tiles(problem)
    depths = tuple(source.shape[1] for source in sources)
    products = tuple(sources[0].new_empty(problem.rows, rank) for rank in call.ranks)
    chunks = -(-problem.rank // tiles.columns)
    launch(
        kernels.project_kernel, (-(-problem.rows // tiles.rows) * len(sources) * chunks,),
        tuple(sources), call.seed, tuple(factors), products, tuple(source.stride(0) for source in sources),
        tuple(source.stride(1) for source in sources), tuple(depth for depth, _ in strides),
        tuple(rank for _, rank in strides), depths, call.ranks, problem.rows, call.threshold,
        device=sources[0].device, MEMBERS=len(sources), DROPOUT=dropout,
        EVEN=all(depth % tiles.depth == 0 for depth in depths), CHUNKS=chunks, RANK=tiles.columns, ROWS=tiles.rows,
        DEPTH=tiles.depth, PRECISION=precision(), **options(tiles),
    )  # fmt: skip
    return list(products)


def merged(call: Call, g: int) -> Tensor:
    """Member g's weight with its update, in the dtype of the call."""
    width, depth, rank = call.widths[g], call.depth, call.ranks[g]
    weight = call.weights[g]
    result = torch.empty_like(weight, dtype=call.dtype)
    block = 64
    launch(
        kernels.merge_kernel, (-(-width // block), -(-depth // block)),
        weight, call.downs[g], call.ups[g], result, width, depth, rank, call.alphas[g],
        device=weight.device, RANK=min(padded(rank), 64), ROWS=block, COLUMNS=block, num_warps=4, num_stages=2,
    )  # fmt: skip
    return result


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    scales: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    """The gradients that `needs` marks, as reference.backward.

    x may be a function that makes it: called with dx (None where that is not needed), or with nothing before there is a dx.
    """
    flat, products = reference.split_saved(saved)
    dys = [flat_rows(grad) for grad in grads[: len(products)]]
    call = call_of(flat, scales, dropout_p, dys[0].dtype)
    problem = problem_of(call, dys[0].shape[0], dys[0].device, backward=True)
    algorithm = config.algorithm(problem)
    if algorithm == "library" or any(grad is not None for grad in grads[len(products) :]):
        x = flat[0]() if callable(flat[0]) else flat[0]
        return reference.backward([x, *saved[1:]], grads, needs, scales, dropout_p)
    wanted, lows = [], [None] * len(dys)
    if needs[0]:
        dx, lows = grad_input(call, dys, problem, algorithm)
        wanted.append(dx.view(*grads[0].shape[:-1], call.depth))
    elif any(needs[HEAD + 2 :: EACH]):
        lows = up_products(call, dys, problem)
    x = flat[0](wanted[0] if needs[0] else None) if callable(flat[0]) else flat[0]
    rows = None if x is None else flat_rows(x)
    downs, ups = factor_grads(call, problem, members(needs), rows, dys, lows, products)
    for g, (need_weight, need_bias, need_a, need_b) in enumerate(members(needs)):
        weight, bias = flat[HEAD + EACH * g], flat[HEAD + EACH * g + 1]
        if need_weight:
            wanted.append(cast(dys[g].t() @ rows, weight.dtype))
        if need_bias:
            wanted.append(cast(dys[g].sum(0), bias.dtype))
        if need_a:
            wanted.append(downs[g])
        if need_b:
            wanted.append(ups[g])
    return wanted


def grad_input(call: Call, dys: Sequence[Tensor], problem: Problem, algorithm: str) -> tuple[Tensor, list[Tensor]]:
    """dx (rows, K) and l_g = dy_g B_g of every member."""
    if algorithm == "merge":
        dx = dys[0] @ merged(call, 0)
        for g in range(1, len(dys)):
            dx.addmm_(dys[g], merged(call, g))
        return dx, up_products(call, dys, problem)
    fused = algorithm == "fused"
    lows = [dys[0].new_empty(problem.rows, rank) for rank in call.ranks] if fused else up_products(call, dys, problem)
    dx = dys[0].new_empty(problem.rows, call.depth)
    tiles = config.gemm_tiles(problem)
    rank = config.rank_tile(problem, fused)
    launch(
        kernels.grad_input_kernel, (-(-problem.rows // tiles.rows) * -(-call.depth // tiles.columns),),
        tuple(dys), call.seed, tuple(cast(weight, call.dtype) for weight in call.weights), call.downs, call.ups, tuple(lows),
        dx, call.widths, call.ranks, call.alphas, problem.rows, call.depth, tuple(dy.stride(0) for dy in dys),
        tuple(dy.stride(1) for dy in dys), call.threshold,
        device=dx.device, MEMBERS=len(dys), DROPOUT=call.dropout, FUSED=fused,
        EVEN=all(width % tiles.depth == 0 for width in call.widths), CHUNKS=-(-problem.rank // rank), RANK=rank,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, GROUP=BAND, PRECISION=precision(), **options(tiles),
    )  # fmt: skip
    return dx, lows


class Job(NamedTuple):
    """One factor's gradient, alpha left^T right: left (rows, rank), right (rows, width); owner: whose dropout mask."""

    left: Tensor
    right: Tensor
    owner: int
    alpha: float
    gradient: Tensor


def factor_grads(
    call: Call,
    problem: Problem,
    needs: Sequence[tuple],
    rows: Tensor | None,
    dys: Sequence[Tensor],
    lows: Sequence[Tensor | None],
    products: Sequence[Tensor | None],
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """dA and dB of the members that want them, by member: x and dy are each read once."""
    downs = {g: torch.empty_like(call.downs[g]) for g, need in enumerate(needs) if need[2]}
    ups = {g: torch.empty_like(call.ups[g]) for g, need in enumerate(needs) if need[3]}
    jobs = [Job(lows[g], rows, g, call.alphas[g], gradient) for g, gradient in downs.items()]
    jobs += [Job(products[g], dys[g], g, call.alphas[g], gradient) for g, gradient in ups.items()]
    if jobs:
        launch_factor_grads(call, problem, jobs, masked=len(downs))
    return downs, ups


def launch_factor_grads(call: Call, problem: Problem, jobs: Sequence[Job], masked: int) -> None:
    """factor_grads_kernel into partial sums, then sum_kernel into the gradients; dropout masks the first `masked` jobs."""
    device = jobs[0].left.device
    tiles = config.factor_grad_tiles(problem)
    widths = tuple(job.right.shape[1] for job in jobs)
    ranks = tuple(job.left.shape[1] for job in jobs)
    sizes = tuple(width * rank for width, rank in zip(widths, ranks))
    offsets = tuple(sum(sizes[:j]) for j in range(len(jobs)))
    blocks = -(-max(widths) // tiles.columns) * -(-max(ranks) // tiles.depth)
    splits = config.row_splits(problem, blocks * len(jobs), tiles)
    rows_each = -(-max(problem.rows, 1) // (splits * tiles.rows)) * tiles.rows
    partials = torch.empty(splits, sum(sizes), dtype=torch.float32, device=device)
    launch(
        kernels.factor_grads_kernel, (blocks, len(jobs), splits),
        tuple(job.left for job in jobs), tuple(job.right for job in jobs), call.seed, partials, widths, ranks,
        tuple(job.owner for job in jobs), tuple(job.right.stride(0) for job in jobs),
        tuple(job.right.stride(1) for job in jobs), offsets, partials.shape[1], problem.rows, rows_each, call.threshold,
        device=device, JOBS=len(jobs), MASKED=masked, DROPOUT=call.dropout and masked > 0, RANK=tiles.depth, ROWS=tiles.rows,
        COLUMNS=tiles.columns, PRECISION=precision(), **options(tiles),
    )  # fmt: skip
    launch(
        kernels.sum_kernel, (-(-max(sizes) // SUM_BLOCK), len(jobs)),
        partials, tuple(job.gradient for job in jobs), sizes, tuple(job.alpha for job in jobs), offsets, partials.shape[1],
        splits, device=device, JOBS=len(jobs), BLOCK=SUM_BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
