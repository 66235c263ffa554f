"""A tower's side adapters in Triton: the forward and the backward, as sequences of kernel launches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.core.launch import arch_of, launch, processors
from fastadapt.core.tiles import exact, padded, precision
from fastadapt.kernels.side_fusion import config, reference
from fastadapt.kernels.side_fusion import triton_grad_kernel as grad_kernels
from fastadapt.kernels.side_fusion import triton_kernel as kernels
from fastadapt.kernels.side_fusion.config import Problem, Tiles
from fastadapt.kernels.side_fusion.reference import EACH, Operands, Settings, cast, flat_rows, result_dtype

# roles whose tensors the kernels want in one dtype
WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias", "shared_weight", "shared_bias")
NORMS, OUT_NORMS = ("norm_weight", "norm_bias"), ("out_norm_weight", "out_norm_bias")
# what is trained before and after the activation
BEFORE, OWN, SHARED = ("down_weight", "down_bias", *NORMS), ("up_weight", "up_bias"), ("shared_weight", "shared_bias")
TRAINED = (*WEIGHTS, *NORMS)  # Gradients' roles, and Sums.wanted, bit by bit
FLAGGED = ("down_bias", "up_bias", "shared_bias", "norm_weight", "norm_bias", "out_norm_bias")  # Members.flags, bit by bit
FAR = 2**31  # a stride from here on would make all those of a tuple 64-bit


class Members(NamedTuple):
    """The adapters as the kernels read them: for each role a tuple with an entry an adapter, in the order of the groups.

    An absent tensor is stood in for by another of its dtype, which is not read; a role that no adapter has may be None.
    tap_rows: strides of the taps' rows; owns: U's rows; starts: sums of the hiddens before; flags: bits that the kernels name.
    """

    taps: tuple[Tensor, ...]
    downs: tuple[Tensor, ...]
    down_biases: tuple[Tensor, ...]
    ups: tuple[Tensor, ...]
    up_biases: tuple[Tensor, ...]
    shareds: tuple[Tensor, ...]
    shared_biases: tuple[Tensor, ...]
    gammas: tuple[Tensor, ...] | None
    betas: tuple[Tensor, ...] | None
    out_gammas: tuple[Tensor, ...] | None
    out_betas: tuple[Tensor, ...] | None
    tap_rows: tuple[int, ...]
    depths: tuple[int, ...]
    hiddens: tuple[int, ...]
    owns: tuple[int, ...]
    starts: tuple[int, ...]
    flags: tuple[int, ...]
    scales: tuple[float, ...]
    eps: tuple[float, ...]
    out_eps: tuple[float, ...]


class Gradients(NamedTuple):
    """The gradients of the trained tensors, as Members has those."""

    downs: tuple[Tensor, ...] | None
    down_biases: tuple[Tensor, ...] | None
    ups: tuple[Tensor, ...] | None
    up_biases: tuple[Tensor, ...] | None
    shareds: tuple[Tensor, ...] | None
    shared_biases: tuple[Tensor, ...] | None
    gammas: tuple[Tensor, ...] | None
    betas: tuple[Tensor, ...] | None


class Sums(NamedTuple):
    """The adapters' sums over rows, cut into the tiles of one kernel.

    firsts: each adapter's first tile; befores: how many of its tiles are of sums before the activation; depths: K, or 0 where
    no column of M is wanted; columns, lasts: the range of N that is wanted; offsets: where its sums are; wanted: its gradients,
    bits in the order of Gradients.
    """

    firsts: tuple[int, ...]
    befores: tuple[int, ...]
    depths: tuple[int, ...]
    columns: tuple[int, ...]
    lasts: tuple[int, ...]
    offsets: tuple[int, ...]
    wanted: tuple[int, ...]


class Bank(NamedTuple):
    """Adapters in the order of their groups: the place of each in the call, its tensors, and what the kernels are told."""

    order: tuple[int, ...]
    calls: tuple[Operands, ...]
    members: Members
    groups: tuple[tuple[int, ...], ...]
    problem: Problem

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels with products are compiled for."""
        hidden = padded(self.problem.hidden)
        return {"GROUPS": self.groups, "COUNT": len(self.calls), "HIDDEN": hidden, "PRECISION": precision()}


def rows_view(tensor: Tensor) -> Tensor:
    """`tensor` as (rows, width) with adjacent columns, a view wherever its strides allow one."""
    rows = flat_rows(tensor)
    return rows if (rows.stride(1) == 1 or rows.shape[1] == 1) and rows.stride(0) < FAR else rows.contiguous()


def one_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """The dtype of those that there are, float32 where they have several."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def in_one_dtype(calls: Sequence[Operands], roles: Sequence[str], dtype: torch.dtype | None = None) -> list[Operands]:
    """The calls with the tensors of these roles contiguous and in this dtype, or `one_dtype`; one copy casts all others."""
    own = [{name: t for name in roles if (t := getattr(call, name)) is not None} for call in calls]
    dtype = dtype or one_dtype(tensor for tensors in own for tensor in tensors.values())
    others = {id(t): t for tensors in own for t in tensors.values() if t.dtype is not dtype}
    cast_ones = {key: torch.empty(t.shape, dtype=dtype, device=t.device) for key, t in others.items()}
    if others:
        torch._foreach_copy_(list(cast_ones.values()), list(others.values()))
    return [
        call._replace(**{name: cast_ones.get(id(t), t).contiguous() for name, t in tensors.items()})
        for call, tensors in zip(calls, own)
    ]


def role(calls: Sequence[Operands], name: str, stand_in: str) -> tuple[Tensor, ...] | None:
    """A tensor for every adapter, its own or one of the role `stand_in`; None where no adapter has one of that."""
    other = next((tensor for call in calls if (tensor := getattr(call, stand_in)) is not None), None)
    own = (getattr(call, name) for call in calls)
    return None if other is None else tuple(other if tensor is None else tensor for tensor in own)


def structure(call: Operands, settings: Settings) -> tuple[int, int, int, int]:
    """What the adapters of a group have in common: kernels.NORM and those after it."""
    norms = int(call.norm_weight is not None), int(bool(call.ups)), int(call.out_norm_weight is not None)
    return *norms, kernels.ACTIVATIONS.index(settings.activation)


def flags(call: Operands, wanted: Operands) -> int:
    """Bits for the vectors that are there, and for a dz that gradients are made of."""
    there = [getattr(call, name) is not None for name in FLAGGED]
    return bits([*there, any(getattr(wanted, name) for name in BEFORE)])


def bits(values: Sequence[bool]) -> int:
    """The number with these bits, the lowest first."""
    return sum(value << i for i, value in enumerate(values))


def bank_of(adapters: Sequence[tuple[Operands, Settings]], wanted: Sequence[Operands]) -> Bank:
    """The adapters sorted into groups, those with LN_out first; wanted: which gradients of each are."""
    kinds = [structure(*adapter) for adapter in adapters]
    order = tuple(sorted(range(len(adapters)), key=lambda i: (-kinds[i][2], kinds[i])))
    calls = [adapters[i][0]._replace(tap=rows_view(adapters[i][0].tap)) for i in order]
    calls = in_one_dtype(calls, WEIGHTS, calls[0].tap.dtype)
    for roles in (NORMS, OUT_NORMS):
        calls = in_one_dtype(calls, roles)
    settings = [adapters[i][1] for i in order]
    hiddens = tuple(call.down_weight.shape[0] for call in calls)
    members = Members(
        taps=tuple(call.tap for call in calls),
        **{f"{name}s": role(calls, f"{name}_weight", "down_weight") for name in ("down", "up", "shared")},
        **{f"{name}_biases": role(calls, f"{name}_bias", "down_weight") for name in ("down", "up", "shared")},
        gammas=role(calls, "norm_weight", "norm_weight"),
        betas=role(calls, "norm_bias", "norm_weight"),
        out_gammas=role(calls, "out_norm_weight", "out_norm_weight"),
        out_betas=role(calls, "out_norm_bias", "out_norm_weight"),
        tap_rows=tuple(call.tap.stride(0) for call in calls),
        depths=tuple(call.tap.shape[1] for call in calls),
        hiddens=hiddens,
        owns=tuple(0 if call.up_weight is None else call.up_weight.shape[0] for call in calls),
        starts=(0, *accumulate(hiddens[:-1])),
        flags=tuple(flags(call, wanted[i]) for call, i in zip(calls, order)),
        scales=tuple(one.scale for one in settings),
        eps=tuple(one.norm_eps for one in settings),
        out_eps=tuple(one.out_norm_eps for one in settings),
    )
    firsts = [p for p, i in enumerate(order) if p == 0 or kinds[i] != kinds[order[p - 1]]]
    groups = tuple((first, last, *kinds[order[first]]) for first, last in zip(firsts, (*firsts[1:], len(calls))))
    return Bank(order, tuple(calls), members, groups, problem_of(calls, members))


def problem_of(calls: Sequence[Operands], members: Members) -> Problem:
    """The numbers the choice of algorithm and tiles depends on."""
    tap, width = members.taps[0], calls[0].width
    return Problem(
        rows=tap.shape[0],
        adapters=len(calls),
        hidden=max((call.down_weight.shape[0] for call in calls if call.ups), default=1),
        width=width,
        linear=any(not call.ups for call in calls),
        out_norm=members.out_gammas is not None,
        itemsize=tap.dtype.itemsize,
        exact=exact(tap.dtype),
        aligned=all(size % 16 == 0 for size in (width, *members.depths, *members.hiddens, *members.tap_rows)),
        arch=arch_of(tap.device),
        processors=processors(tap.device),
    )


def options(tiles: Tiles) -> dict[str, int]:
    """The launch options of `tiles`, under Triton's names."""
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def forward(tensors: Sequence[Tensor | None], base_count: int, *lists: Sequence) -> list[Tensor]:
    """[out], as reference.forward."""
    adapters = list(reference.split(tensors, base_count, *lists))
    bank = bank_of(adapters, [Operands(*[False] * EACH)] * len(adapters))
    problem, tap = bank.problem, bank.members.taps[0]
    algorithm = config.algorithm(problem)
    if algorithm == "library":
        return reference.forward(tensors, base_count, *lists)
    out = tap.new_empty(problem.rows, problem.width, dtype=result_dtype(tensors, base_count))
    bases = tuple(rows_view(base) for base in tensors[:base_count])
    added = bases, tuple(base.stride(0) for base in bases), out, problem.rows, problem.width
    tiles = config.fused_tiles(problem) if algorithm == "fused" else config.combine_tiles(problem)
    grid = -(-problem.rows // tiles.rows), -(-problem.width // tiles.columns)
    sizes = {"BASES": base_count, "ROWS": tiles.rows, "COLUMNS": tiles.columns, **options(tiles)}
    if algorithm == "fused":
        launch(
            kernels.fused_kernel, grid, bank.members, *added, device=tap.device, DEPTH=tiles.depth, **bank.constants, **sizes
        )  # fmt: skip
    else:
        outcomes = tap.new_empty(problem.adapters, problem.rows, problem.width)
        results = tap.new_empty(2, problem.adapters, problem.rows, dtype=torch.float32)
        launch_members(bank, None, None, outcomes, results, None)
        launch(
            kernels.combine_kernel, grid, bank.members, outcomes, results, *added,
            device=tap.device, GROUPS=bank.groups, COUNT=problem.adapters, **sizes,
        )  # fmt: skip
    return [out.view(*tensors[base_count].shape[:-1], problem.width)]


def launch_members(
    bank: Bank,
    hidden: Tensor | None,
    statistics: Tensor | None,
    outcomes: Tensor | None,
    results: Tensor | None,
    dout: Tensor | None,
) -> None:
    """member_kernel; with no hidden to keep it is a forward's, and writes the results of all adapters."""
    problem, tiles = bank.problem, config.member_tiles(bank.problem)
    launch(
        kernels.member_kernel, (-(-problem.rows // tiles.rows), problem.adapters), bank.members, hidden, statistics, outcomes,
        results, dout, 0 if dout is None else dout.stride(0), problem.rows, problem.width,
        device=bank.members.taps[0].device, EVERY_OUTCOME=hidden is None, ROWS=tiles.rows, COLUMNS=tiles.columns,
        DEPTH=tiles.depth, **bank.constants, **options(tiles),
    )  # fmt: skip


def backward(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool], base_count: int, *lists: Sequence
) -> list[Tensor]:
    """The gradients that `needs` marks, as reference.backward."""
    every = zip(reference.split(saved, base_count, *lists), range(base_count, len(saved), EACH))
    pairs = [(adapter, need) for adapter, i in every if any(need := Operands(*needs[i : i + EACH]))]
    adapters, wanted = zip(*pairs)
    bank = bank_of(adapters, wanted)
    if config.algorithm(bank.problem) == "library":
        return reference.backward(saved, grads, needs, base_count, *lists)
    calls = [call for call, _ in adapters]
    own = [wanted[i] for i in bank.order]
    dtypes = [one_dtype(getattr(call, name) for call in calls) for name in Operands._fields]
    found = [
        Operands(*(t.new_empty(t.shape, dtype=dtype) if need else None for t, need, dtype in zip(call, needed, dtypes)))
        for call, needed in zip(bank.calls, own)
    ]
    launch_backward(bank, rows_view(grads[0]), own, found)
    back = dict(zip(bank.order, found))
    pairs = ((gradient, tensor) for i, call in enumerate(calls) for gradient, tensor in zip(back[i], call))
    return [cast(gradient, tensor.dtype) for gradient, tensor in pairs if gradient is not None]


def launch_backward(bank: Bank, dout: Tensor, wanted: Sequence[Operands], found: Sequence[Operands]) -> None:
    """member_kernel for what the others read, hidden_grad_kernel for dz and dy, then the sums over rows."""
    problem, members, tap = bank.problem, bank.members, bank.members.taps[0]
    out_norms = sum(call.out_norm_weight is not None for call in bank.calls)
    hidden = tap.new_empty(problem.rows * sum(members.hiddens))
    dz = torch.empty_like(hidden)
    statistics = None if members.gammas is None else tap.new_empty(2, problem.adapters, problem.rows, dtype=torch.float32)
    outcomes, results, dy = None, None, None
    if out_norms:
        outcomes, dy = (tap.new_empty(out_norms, problem.rows, problem.width) for _ in range(2))
        results = tap.new_empty(4, problem.adapters, problem.rows, dtype=torch.float32)
    launch_members(bank, hidden, statistics, outcomes, results, dout if out_norms else None)
    if out_norms or any(getattr(need, name) for need in wanted for name in BEFORE):
        tiles = config.member_tiles(problem)
        launch(
            grad_kernels.hidden_grad_kernel, (-(-problem.rows // tiles.rows), problem.adapters), members, hidden, outcomes,
            results, dout, dout.stride(0), dz, dy, problem.rows, problem.width,
            device=tap.device, ROWS=tiles.rows, COLUMNS=tiles.columns, **bank.constants, **options(tiles),
        )  # fmt: skip
    launch_sums(bank, (hidden, statistics, dz, dout, dout.stride(0), dy), wanted, found)


def launch_sums(bank: Bank, read: Sequence[Any], wanted: Sequence[Operands], found: Sequence[Operands]) -> None:
    """weight_grad_kernel, which reads `read`, and finish_kernel, which writes `found`."""
    problem, members, device = bank.problem, bank.members, bank.members.taps[0].device
    tiles, hidden = config.weight_tiles(problem), config.hidden_tile(problem, max(members.hiddens))
    count, sums, size = sums_of(bank, wanted, hidden, tiles.columns, tiles.columns)
    splits = config.row_splits(problem, count, tiles.rows)
    rows_each = -(-max(problem.rows, 1) // (splits * tiles.rows)) * tiles.rows
    partials = torch.empty(splits, size, dtype=torch.float32, device=device)
    launch(
        grad_kernels.weight_grad_kernel, (count, splits), members, sums, *read, partials, problem.rows, problem.width,
        rows_each, size,
        device=device, ROWS=tiles.rows, COLUMNS=tiles.columns, **bank.constants | {"HIDDEN": hidden}, **options(tiles),
    )  # fmt: skip
    rows, columns = config.FINISH_ROWS, config.FINISH_COLUMNS
    count, sums, _ = sums_of(bank, wanted, max(members.hiddens), columns, rows)
    gradients = Gradients(*(role(found, name, name) for name in TRAINED))
    launch(
        grad_kernels.finish_kernel, (count,), members, sums, gradients, partials, problem.width, splits, size,
        device=device, COUNT=problem.adapters, ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=2,
    )  # fmt: skip


def sums_of(bank: Bank, wanted: Sequence[Operands], hidden: int, before: int, after: int) -> tuple[int, Sums, int]:
    """How many tiles there are, the sums cut into them, and how many numbers all sums are.

    hidden: the h that a tile has; before, after: its columns of K and of N.
    """
    width, tiles, sizes, ranges = bank.problem.width, [], [], []
    for call, need, own in zip(bank.calls, wanted, bank.members.owns):
        h, depth = call.down_weight.shape
        hidden_tiles = -(-h // hidden)
        is_before, is_own, is_shared = (any(getattr(need, name) for name in names) for names in (BEFORE, OWN, SHARED))
        columns = depth if need.down_weight or need.norm_weight or need.norm_bias else 0
        befores = max(1, -(-columns // before)) * hidden_tiles if is_before else 0
        column, last = 0 if is_own else own, width if is_shared else own
        tiles.append(befores + -(-(last - column) // after) * hidden_tiles)
        sizes.append(h * (depth + 1) + (width * (h + 1) if call.ups else 0))
        ranges.append((befores, columns, column, last))
    firsts, offsets = ((0, *accumulate(each[:-1])) for each in (tiles, sizes))
    names = tuple(bits([getattr(need, name) for name in TRAINED]) for need in wanted)
    return sum(tiles), Sums(firsts, *zip(*ranges), offsets, names), sum(sizes)
