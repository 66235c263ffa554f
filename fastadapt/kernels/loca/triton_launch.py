"""Local convolution adapter in Triton: the forward and the backward, as sequences of kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastadapt.core.launch import launch
from fastadapt.core.tiles import padded, precision
from fastadapt.kernels.loca import config, reference
from fastadapt.kernels.loca import triton_grad_kernel as grad_kernels
from fastadapt.kernels.loca import triton_kernel as kernels
from fastadapt.kernels.loca.config import Problem, Tiles
from fastadapt.kernels.loca.reference import Operands
from fastadapt.kernels.loca.triton_inference_kernel import inference_kernel

WEIGHTS = ("down_weight", "point_weight", "reduce_weight", "local_weight", "up_weight")
STAGES = ("point", "reduce", "local")
GROUP = 16  # programs whose sums are added up at a time
BLOCK = 1024  # elements of a program of prepare_kernel


@dataclass(frozen=True)
class Run:
    """One call as the kernels read it.

    call: contiguous tensors, weights in n's dtype; statistics: (mean, rstd) of all channels, (2, C + Q) float32; counters: of
    programs that arrive, int32, at zero.  h (rows, C), u (rows, P + padded Q) and v (rows, C - P) are room, made when it is
    first asked for, in n's dtype.
    """

    call: Operands
    problem: Problem
    height: int
    width: int
    statistics: Tensor
    counters: Tensor

    @cached_property
    def h(self) -> Tensor:
        return self.call.n.new_empty(self.rows, self.hidden)

    @cached_property
    def u(self) -> Tensor:
        return self.call.n.new_empty(self.rows, self.sizes[0] + padded(self.sizes[1]))

    @cached_property
    def v(self) -> Tensor:
        return self.call.n.new_empty(self.rows, self.sizes[2])

    @property
    def rows(self) -> int:
        """Of n, B per_sample."""
        return self.problem.rows

    @property
    def per_sample(self) -> int:
        return 1 + self.height * self.width

    @property
    def sizes(self) -> tuple[int, int, int]:
        """P, Q and C - P."""
        return self.call.channels

    @property
    def hidden(self) -> int:
        """C."""
        return self.problem.hidden

    @property
    def device(self) -> torch.device:
        return self.call.n.device

    def programs(self, tiles: Tiles) -> int:
        """How many take a tile of rows each."""
        return -(-self.rows // tiles.rows)

    def partials(self, tiles: Tiles, channels: int) -> Tensor:
        """Room for two sums a channel of every program."""
        return torch.empty(self.programs(tiles), 2, channels, dtype=torch.float32, device=self.device)

    def options(self, tiles: Tiles, *names: str) -> dict[str, object]:
        """The constexprs of these names, and Triton's launch options."""
        first, rest = config.pieces(self.hidden)
        known = {
            "FIRST": first,
            "REST": rest,
            "REDUCED": padded(self.sizes[1]),
            "LOCAL": padded(self.sizes[2]),
            "DEPTH": tiles.depth,
            "COLUMNS": tiles.columns,
            "GROUP": GROUP,
        }
        chosen = {name: known[name] for name in names}
        return chosen | {
            "ROWS": tiles.rows,
            "PRECISION": precision(),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }


def problem_of(call: Operands, height: int, width: int) -> Problem:
    """The numbers the choice of algorithm and tiles depends on."""
    _, reduced, local = call.channels
    rows, (hidden, depth) = call.n.shape[0] * (1 + height * width), call.down_weight.shape
    return config.problem(rows, depth, hidden, reduced, local, call.up_weight.shape[0], call.n.dtype, call.n.device)


def prepared(
    call: Operands, height: int, width: int, counters: int, statistics: Tensor | None = None, eps: float | None = None
) -> Run:
    """The Run of a call with that many counters: one launch, in which weights of another dtype than n are cast.

    statistics: None for room for those of the batch; with `eps` those of the running statistics are written to it.
    """
    call = Operands(*(None if tensor is None else tensor.contiguous() for tensor in call))
    device, sizes = call.n.device, call.channels
    weights = [] if call.down_weight.dtype is call.n.dtype else [getattr(call, name) for name in WEIGHTS]
    narrow = [torch.empty_like(weight, dtype=call.n.dtype) for weight in weights]
    counts = [weight.numel() for weight in weights]
    if statistics is None:
        statistics = torch.empty(2, sum(sizes), dtype=torch.float32, device=device)
    roles = () if eps is None else ("running_mean", "running_var", "bias")
    running = tuple(tuple(getattr(call, f"{name}_{role}") for role in roles) for name in STAGES if roles)
    run = Run(
        call._replace(**dict(zip(WEIGHTS, narrow))), problem_of(call, height, width), height, width, statistics,
        torch.empty(counters, dtype=torch.int32, device=device),
    )  # fmt: skip
    launch(
        kernels.prepare_kernel, (-(-max(counters, sum(sizes), *counts) // BLOCK), len(weights) + 1),
        tuple(weights) or None, tuple(narrow) or None, tuple(counts) or None, run.counters, counters, running or None,
        statistics, sizes, sum(sizes), eps,
        device=device, WEIGHTS=len(weights), NORMS=len(running), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return run


def forward(tensors: Sequence[Tensor | None], height: int, width: int, eps: float, scale: float) -> list[Tensor]:
    """[out, (mean, rstd)] and in training [..., (m, v)], as reference.forward."""
    call = Operands(*tensors)
    if config.algorithm(problem_of(call, height, width)) == "library":
        return reference.forward(tensors, height, width, eps, scale)
    if not call.training:
        return launch_inference(call, height, width, eps, scale)
    run = prepared(call, height, width, counters=2)
    moments = torch.empty_like(run.statistics)
    launch_hidden(run, moments, eps)
    return [launch_output(run, scale), run.statistics, moments]


def launch_hidden(run: Run, moments: Tensor | None, eps: float) -> None:
    """hidden_kernel for h and u, local_kernel for v; with moments, both also for the statistics."""
    call, (point, reduced, local) = run.call, run.sizes
    measure = moments is not None
    counters = run.counters if measure else None
    tiles = config.hidden_tiles(run.problem)
    launch(
        kernels.hidden_kernel, (run.programs(tiles),),
        call.n, call.down_weight, call.down_bias, call.point_weight, call.reduce_weight, call.point_bias, call.reduce_bias,
        run.h, run.u, run.statistics, moments, run.partials(tiles, run.u.shape[1]) if measure else None, counters, run.rows,
        run.per_sample, call.n.shape[-1], run.hidden, point, reduced, run.hidden + reduced, eps,
        device=run.device, STATISTICS=measure,
        **run.options(tiles, "FIRST", "REST", "REDUCED", "DEPTH", "COLUMNS", "GROUP"),
    )  # fmt: skip
    tiles = config.local_tiles(run.problem)
    launch(
        kernels.local_kernel, (run.programs(tiles),),
        run.u, call.local_weight, call.local_bias, call.reduce_norm_weight, call.reduce_norm_bias, run.v, run.statistics,
        moments, run.partials(tiles, local) if measure else None, counters[1:] if measure else None, run.rows, run.per_sample,
        run.height, run.width, point, reduced, local, eps,
        device=run.device, STATISTICS=measure, **run.options(tiles, "REDUCED", "LOCAL", "COLUMNS", "GROUP"),
    )  # fmt: skip


def launch_inference(call: Operands, height: int, width: int, eps: float, scale: float) -> list[Tensor]:
    """[out, (mean, rstd)] by the running statistics: one kernel behind prepare_kernel."""
    problem = problem_of(call, height, width)
    tiles = config.inference_tiles(problem)
    run = prepared(call, height, width, -(-problem.rows // tiles.rows), eps=eps)
    call, (point, reduced, local) = run.call, run.sizes
    out = output_like(call)
    u = call.n.new_empty(run.rows, padded(reduced))
    norms = [getattr(call, f"{name}_norm_{role}") for name in STAGES for role in ("weight", "bias")]
    launch(
        inference_kernel, (run.programs(tiles),),
        call.n, call.down_weight, call.down_bias, call.point_weight, call.reduce_weight, call.local_weight, run.statistics,
        *norms, call.up_weight, call.up_bias, call.layer_scale, call.mlp, call.residual, u, run.h, out, run.counters, run.rows,
        run.per_sample, height, width, problem.depth, run.hidden, point, reduced, problem.out, scale,
        -(-(width + 1) // tiles.rows),
        device=run.device, **run.options(tiles, "FIRST", "REST", "REDUCED", "LOCAL", "DEPTH", "COLUMNS"),
    )  # fmt: skip
    return [out, run.statistics]


def output_like(call: Operands) -> Tensor:
    """Room for out."""
    dtype = call.n.dtype if call.residual is None else call.residual.dtype
    return call.n.new_empty(*call.n.shape[:2], call.up_weight.shape[0], dtype=dtype)


def launch_output(run: Run, scale: float) -> Tensor:
    """out."""
    call, (point, reduced, _) = run.call, run.sizes
    width, out = run.problem.out, output_like(call)
    tiles = config.output_tiles(run.problem)
    launch(
        kernels.output_kernel, (run.programs(tiles) * -(-width // tiles.columns),),
        run.h, run.u, run.v, run.statistics, call.point_norm_weight, call.point_norm_bias, call.local_norm_weight,
        call.local_norm_bias, call.up_weight, call.up_bias, call.layer_scale, call.mlp, call.residual, out, run.rows,
        run.per_sample, run.hidden, point, reduced, width, scale,
        device=run.device, **run.options(tiles, "REDUCED", "DEPTH", "COLUMNS"),
    )  # fmt: skip
    return out


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    height: int,
    width: int,
    eps: float,
    scale: float,
) -> list[Tensor]:
    """The gradients that `needs` marks, as reference.backward."""
    *tensors, statistics = saved
    call, need = Operands(*tensors), Operands(*needs)
    trained, twice = any(needs[: len(reference.TRAINED)]), any(grad is not None for grad in grads[1:])
    if not trained or twice or config.algorithm(problem_of(call, height, width)) == "library":
        return reference.backward(saved, grads, needs, height, width, eps, scale)
    *plain, shifted = tile_counts(call, problem_of(call, height, width))
    places = max(plain) * len(plain)
    run = prepared(call, height, width, 2 + places + shifted, statistics)
    launch_hidden(run, None, eps)
    found = launch_grads(run, grads[0].contiguous(), need.n, scale)
    own = call._replace(mlp=call.n)
    return [found[name].to(getattr(own, name).dtype) for name, needed in need._asdict().items() if needed]


def launch_grads(run: Run, dout: Tensor, need_n: bool, scale: float) -> dict[str, Tensor]:
    """Every gradient by name, n's only if it is needed, mlp's where there is one."""
    call, (point, reduced, local) = run.call, run.sizes
    width, channels = call.up_weight.shape[0], run.hidden + reduced
    inverse = 1.0 / (call.n.shape[0] * run.height * run.width) if call.training else 0.0
    sums = torch.empty(2, channels, dtype=torch.float32, device=run.device)
    vectors = call.up_bias.new_empty(3, channels)
    dloca = dout if call.layer_scale is None else call.n.new_empty(dout.shape)
    dy, y, dh = (torch.empty_like(run.h) for _ in range(3))
    dv, du, dt = torch.empty_like(run.v), torch.empty_like(run.u), call.n.new_empty(run.rows, padded(reduced))
    dn = torch.empty_like(call.n) if need_n else None
    norms = {name: (getattr(call, f"{name}_norm_weight"), getattr(call, f"{name}_norm_bias")) for name in STAGES}
    tiles = config.hidden_tiles(run.problem)
    launch(
        grad_kernels.output_grad_kernel, (run.programs(tiles),),
        dout, call.layer_scale, call.up_weight, run.u, run.v, run.statistics, *norms["point"], *norms["local"], dloca, dy, sums,
        vectors, run.partials(tiles, run.hidden), run.counters, run.rows, run.per_sample, run.hidden, point, reduced, width,
        scale, inverse,
        device=run.device, **run.options(tiles, "FIRST", "REST", "REDUCED", "DEPTH", "COLUMNS", "GROUP"),
    )  # fmt: skip
    tiles = config.local_tiles(run.problem)
    launch(
        grad_kernels.local_grad_kernel, (run.programs(tiles),),
        dy, run.u, run.v, call.local_weight, run.statistics, *norms["reduce"], *norms["local"], sums, vectors, dv,
        dt, run.partials(tiles, reduced), run.counters[1:], run.rows, run.per_sample, run.height, run.width, point, reduced,
        local, inverse,
        device=run.device, **run.options(tiles, "REDUCED", "LOCAL", "COLUMNS", "GROUP"),
    )  # fmt: skip
    tiles = config.hidden_grad_tiles(run.problem)
    launch(
        grad_kernels.hidden_grad_kernel, (run.programs(tiles),),
        dy, dt, run.h, run.u, run.v, call.down_weight, call.point_weight, call.reduce_weight, run.statistics, *norms["point"],
        *norms["reduce"], *norms["local"], sums, du, y, dh, dn, run.rows, run.per_sample, call.n.shape[-1], run.hidden, point,
        reduced, inverse,
        device=run.device, **run.options(tiles, "FIRST", "REST", "REDUCED", "DEPTH", "COLUMNS"),
    )  # fmt: skip
    *plain, shifted = tile_counts(call, run.problem)
    counters = run.counters[2:].split((max(plain) * len(plain), shifted))
    found = {"n": dn, "mlp": dloca} | launch_weight_grads(run, dh, dloca, y, du, scale, plain, counters[0])
    found["local_weight"] = launch_local_weight_grad(run, dv, shifted, counters[1])
    for role, row in zip(("norm_bias", "norm_weight", "bias"), vectors):
        found |= {f"{name}_{role}": part for name, part in zip(STAGES, row.split(run.sizes))}
    return found


def tile_counts(call: Operands, problem: Problem) -> list[int]:
    """How many tiles the gradients of W1, W2, [A; R] and K have."""
    (point, reduced, local), tiles = call.channels, config.weight_tiles(problem)
    hidden, width = problem.hidden, problem.out
    shapes = (hidden, problem.depth), (width, hidden), (point + padded(reduced), hidden), (local, 9 * reduced)
    return [-(-left // tiles.depth) * -(-right // tiles.columns) for left, right in shapes]


def launch_weight_grads(
    run: Run, dh: Tensor, dloca: Tensor, y: Tensor, du: Tensor, scale: float, counts: Sequence[int], counters: Tensor
) -> dict[str, Tensor]:
    """The gradients of W1, b1, W2, b2, A and R, one kernel."""
    call, (point, reduced, _) = run.call, run.sizes
    heights, widths = (run.hidden, call.up_weight.shape[0], du.shape[1]), (call.n.shape[-1], run.hidden, run.hidden)
    weights = [call.up_bias.new_empty(size) for size in zip(heights, widths)]
    biases = [call.up_bias.new_empty(size) for size in heights[:2]]
    tiles = config.weight_tiles(run.problem)
    splits, each = config.row_splits(run.problem, sum(counts), tiles.rows), max(counts)
    launch(
        grad_kernels.weight_grads_kernel, (each, len(counts), splits),
        (dh, dloca, du), (call.n, y, run.h), tuple(weights), tuple(biases), heights, widths, (1.0, scale, 1.0),
        partial_sums(run, tiles, each * len(counts) * splits), counters, run.rows, rows_each(run, tiles, splits), splits,
        device=run.device, JOBS=len(counts), BIASES=len(biases), LEFT=tiles.depth, RIGHT=tiles.columns, **run.options(tiles),
    )  # fmt: skip
    points, reduces, _ = weights[2][..., None, None].tensor_split((point, point + reduced))
    return {
        "down_weight": weights[0],
        "down_bias": biases[0],
        "up_weight": weights[1],
        "up_bias": biases[1],
        "point_weight": points,
        "reduce_weight": reduces,
    }


def launch_local_weight_grad(run: Run, dv: Tensor, count: int, counters: Tensor) -> Tensor:
    """The gradient of K."""
    call, (point, reduced, local) = run.call, run.sizes
    weight = call.local_bias.new_empty(call.local_weight.shape)
    tiles = config.weight_tiles(run.problem)
    splits = config.row_splits(run.problem, count, tiles.rows)
    launch(
        grad_kernels.local_weight_grad_kernel, (count, splits),
        dv, run.u, run.statistics, call.reduce_norm_weight, call.reduce_norm_bias, weight,
        partial_sums(run, tiles, count * splits), counters, run.rows, rows_each(run, tiles, splits), splits, run.per_sample,
        run.height, run.width, point, reduced, local,
        device=run.device, LEFT=tiles.depth, RIGHT=tiles.columns, **run.options(tiles, "REDUCED"),
    )  # fmt: skip
    return weight


def partial_sums(run: Run, tiles: Tiles, count: int) -> Tensor:
    """Room for those of `count` programs, each as over_splits lays it out."""
    return torch.empty(count * (tiles.depth * tiles.columns + tiles.depth), dtype=torch.float32, device=run.device)


def rows_each(run: Run, tiles: Tiles, splits: int) -> int:
    """The rows of a split, whole steps."""
    return -(-run.rows // (splits * tiles.rows)) * tiles.rows
