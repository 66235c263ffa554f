"""A tower's side adapters in Triton: the kernels of the backward, which follow `member_kernel`.

`hidden_grad_kernel` goes from dout to dz.  `weight_grad_kernel` cuts every sum over rows into runs of rows; `finish_kernel`
adds those up in their order and makes of them the parameters' gradients, LayerNorm's included.

A run's sums follow each other in float32, for every adapter M (h, K), dd (h,), dy^T r (N, h) and the sum of dy (N,).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import activate, activation_slope, pick
from fastadapt.kernels.side_fusion.triton_kernel import (
    FIRST, HIDDEN_GRAD, LAST, NORM, NORM_BIAS, NORM_WEIGHT, OUT_NORM, UP, activation, member_group, rows_of, rows_of_both
)  # fmt: skip

# bits of Sums.wanted: an adapter's gradients that are asked for, in the order of triton_launch.Gradients
D_DOWN, D_DOWN_BIAS, D_UP, D_UP_BIAS, D_SHARED, D_SHARED_BIAS, D_NORM, D_NORM_BIAS = (tl.constexpr(1 << i) for i in range(8))


@triton.jit
def outcome_grad(
    m, i, outcomes, results, dout, dout_row, all_rows, width, row, row_ok, n, n_ok, GROUP: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """A tile of adapter i's dy, in float32: dout, sent back through LN_out where there is one."""
    ok = row_ok[:, None] & n_ok[None, :]
    dy = tl.load(rows_of(dout, row, dout_row, n), mask=ok, other=0.0).to(tl.float32)
    if GROUP[OUT_NORM]:
        mean = tl.load(results + i * all_rows + row, mask=row_ok, other=0.0)
        rstd = tl.load(results + (COUNT + i) * all_rows + row, mask=row_ok, other=0.0)
        mean_p = tl.load(results + (2 * COUNT + i) * all_rows + row, mask=row_ok, other=0.0)
        mean_py = tl.load(results + (3 * COUNT + i) * all_rows + row, mask=row_ok, other=0.0)
        y = tl.load(rows_of(outcomes + i * all_rows * width, row, width, n), mask=ok, other=0.0).to(tl.float32)
        dy *= tl.load(pick(m.out_gammas, i, COUNT) + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        dy = rstd[:, None] * (dy - mean_p[:, None] - (y - mean[:, None]) * rstd[:, None] * mean_py[:, None])
    return dy


@triton.jit
def hidden_grad_rows(
    m, i, hidden, outcomes, results, dout, dout_row, dz, dy, rows, width, row, row_ok, GROUP: tl.constexpr, COUNT: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`hidden_grad_kernel` for an adapter of this group."""
    dtype: tl.constexpr = m.taps[0].dtype.element_ty
    all_rows = tl.cast(rows, tl.int64)
    h, scale, place = pick(m.hiddens, i, COUNT), pick(m.scales, i, COUNT), all_rows * pick(m.starts, i, COUNT)
    up, shared, own = pick(m.ups, i, COUNT), pick(m.shareds, i, COUNT), pick(m.owns, i, COUNT)
    low = tl.zeros((ROWS, HIDDEN), tl.float32)
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        n_ok = n < width
        ok = row_ok[:, None] & n_ok[None, :]
        grad = outcome_grad(m, i, outcomes, results, dout, dout_row, all_rows, width, row, row_ok, n, n_ok, GROUP, COUNT)
        if GROUP[OUT_NORM]:
            tl.store(rows_of(dy + i * all_rows * width, row, width, n), grad.to(dtype), mask=ok)
        if GROUP[UP]:
            j = tl.arange(0, HIDDEN)
            w = rows_of_both(up, shared, own, n, h)[:, None] + j[None, :]
            weight = tl.load(w, mask=n_ok[:, None] & (j < h)[None, :], other=0.0)
            low = tl.dot(grad.to(dtype), weight.to(dtype), low, input_precision=PRECISION)
        else:
            z = tl.load(rows_of(hidden + place, row, h, n), mask=ok, other=0.0).to(tl.float32)
            grad *= scale * activation_slope(z, activation(GROUP))
            tl.store(rows_of(dz + place, row, h, n), grad.to(dtype), mask=ok)
    if GROUP[UP]:
        j = tl.arange(0, HIDDEN)
        ok = row_ok[:, None] & (j < h)[None, :]
        z = tl.load(rows_of(hidden + place, row, h, j), mask=ok, other=0.0).to(tl.float32)
        low *= scale * activation_slope(z, activation(GROUP))
        tl.store(rows_of(dz + place, row, h, j), low.to(dtype), mask=ok)


@triton.jit
def hidden_grad_kernel(
    m, hidden, outcomes, results, dout, dout_row, dz, dy, rows, width,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For an adapter and ROWS rows: dz, scale included, and dy where there is LN_out."""
    i = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for g in tl.static_range(len(GROUPS)):
        if (i >= GROUPS[g][FIRST]) & (i < GROUPS[g][LAST]):
            if GROUPS[g][OUT_NORM] or (pick(m.flags, i, COUNT) & HIDDEN_GRAD) != 0:
                hidden_grad_rows(
                    m, i, hidden, outcomes, results, dout, dout_row, dz, dy, rows, width, row, row < rows,
                    member_group(GROUPS, g), COUNT, HIDDEN, ROWS, COLUMNS, PRECISION,
                )  # fmt: skip


@triton.jit
def owner(sums, tile, COUNT: tl.constexpr):
    """The adapter that a tile belongs to, and the tile's number among that adapter's."""
    i = 0
    for k in tl.static_range(1, COUNT):
        i += (tile >= sums.firsts[k]).to(tl.int32)
    return i, tile - pick(sums.firsts, i, COUNT)


@triton.jit
def sums_before(
    m, sums, i, local, hidden_start, statistics, dz, partial, start, end, rows, GROUP: tl.constexpr, COUNT: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over rows start to end: a tile of M, and where it is the first of its rows their dd."""
    dtype: tl.constexpr = dz.dtype.element_ty
    all_rows = tl.cast(rows, tl.int64)
    h, depth, wanted_depth = pick(m.hiddens, i, COUNT), pick(m.depths, i, COUNT), pick(sums.depths, i, COUNT)
    column_tiles = tl.maximum(tl.cdiv(wanted_depth, COLUMNS), 1)
    j = local // column_tiles * HIDDEN + tl.arange(0, HIDDEN)
    k = local % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    j_ok, k_ok = j < h, k < wanted_depth
    tap, stride = pick(m.taps, i, COUNT), pick(m.tap_rows, i, COUNT)
    product, total = tl.zeros((HIDDEN, COLUMNS), tl.float32), tl.zeros((HIDDEN,), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        row_ok = row < end
        left = dz + hidden_start + row.to(tl.int64)[None, :] * h + j[:, None]
        left = tl.load(left, mask=j_ok[:, None] & row_ok[None, :], other=0.0)
        total += tl.sum(left.to(tl.float32), 1)
        right = tl.load(rows_of(tap, row, stride, k), mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        if GROUP[NORM]:
            mean = tl.load(statistics + i * all_rows + row, mask=row_ok, other=0.0)
            rstd = tl.load(statistics + (COUNT + i) * all_rows + row, mask=row_ok, other=0.0)
            right = ((right.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(dtype)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    tl.store(partial + j[:, None] * depth + k[None, :], product, mask=j_ok[:, None] & k_ok[None, :])
    tl.store(partial + h * depth + j, total, mask=j_ok & (local % column_tiles == 0))


@triton.jit
def sums_after(
    m, sums, i, local, hidden_start, hidden, dy, dy_row, width, partial, start, end, GROUP: tl.constexpr, COUNT: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over rows start to end: a tile of r^T dy, and where it is the first of its columns their sum of dy."""
    dtype: tl.constexpr = hidden.dtype.element_ty
    h, last = pick(m.hiddens, i, COUNT), pick(sums.lasts, i, COUNT)
    hidden_tiles = tl.cdiv(h, HIDDEN)
    j = local % hidden_tiles * HIDDEN + tl.arange(0, HIDDEN)
    n = pick(sums.columns, i, COUNT) + local // hidden_tiles * COLUMNS + tl.arange(0, COLUMNS)
    j_ok, n_ok = j < h, n < last
    product, total = tl.zeros((HIDDEN, COLUMNS), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        row_ok = row < end
        z = hidden + hidden_start + row.to(tl.int64)[None, :] * h + j[:, None]
        z = tl.load(z, mask=j_ok[:, None] & row_ok[None, :], other=0.0).to(tl.float32)
        right = tl.load(rows_of(dy, row, dy_row, n), mask=row_ok[:, None] & n_ok[None, :], other=0.0)
        total += tl.sum(right.to(tl.float32), 0)
        left = activate(z, activation(GROUP)).to(dtype)
        product = tl.dot(left, right.to(dtype), product, input_precision=PRECISION)
    tl.store(partial + n[None, :] * h + j[:, None], product, mask=j_ok[:, None] & n_ok[None, :])
    tl.store(partial + width * h + n, total, mask=n_ok & (local % hidden_tiles == 0))


@triton.jit
def weight_grad_kernel(
    m, sums, hidden, statistics, dz, dout, dout_row, dy, partials, rows, width, rows_each, size,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For a run of `rows_each` rows, a tile of an adapter's sums: those before its activation, then those after it."""
    i, local = owner(sums, tl.program_id(0), COUNT)
    start = tl.program_id(1) * rows_each
    end = tl.minimum(start + rows_each, rows)
    all_rows = tl.cast(rows, tl.int64)
    h, depth, before = pick(m.hiddens, i, COUNT), pick(m.depths, i, COUNT), pick(sums.befores, i, COUNT)
    hidden_start = all_rows * pick(m.starts, i, COUNT)
    partial = partials + tl.program_id(1) * tl.cast(size, tl.int64) + pick(sums.offsets, i, COUNT)
    for g in tl.static_range(len(GROUPS)):
        if (i >= GROUPS[g][FIRST]) & (i < GROUPS[g][LAST]):
            if local < before:
                sums_before(
                    m, sums, i, local, hidden_start, statistics, dz, partial, start, end, rows, member_group(GROUPS, g), COUNT,
                    HIDDEN, ROWS, COLUMNS, PRECISION,
                )  # fmt: skip
            elif GROUPS[g][UP]:
                own_dy, dy_row = dout, dout_row
                if GROUPS[g][OUT_NORM]:
                    own_dy, dy_row = dy + i * all_rows * width, width
                after = partial + h * depth + h
                sums_after(
                    m, sums, i, local - before, hidden_start, hidden, own_dy, dy_row, width, after, start, end,
                    member_group(GROUPS, g), COUNT, HIDDEN, ROWS, COLUMNS, PRECISION,
                )  # fmt: skip


@triton.jit
def added_up(partial, ok, splits, size):
    """The sum of what the runs of rows left at `partial`, in their order."""
    total = tl.load(partial, mask=ok, other=0.0)
    for split in range(1, splits):
        total += tl.load(partial + split * tl.cast(size, tl.int64), mask=ok, other=0.0)
    return total


@triton.jit
def put(gradients, i, index, values, ok, wanted, FLAG: tl.constexpr, COUNT: tl.constexpr):
    """Store part of adapter i's gradient if that is wanted."""
    if gradients is not None:
        gradient = pick(gradients, i, COUNT)
        tl.store(gradient + index, values.to(gradient.dtype.element_ty), mask=ok & ((wanted & FLAG) != 0))


@triton.jit
def finish_before(
    m, sums, gradients, i, local, partial, splits, size, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """COLUMNS columns of dD and of LayerNorm's gradients, and all of dd."""
    h, depth, wanted = pick(m.hiddens, i, COUNT), pick(m.depths, i, COUNT), pick(sums.wanted, i, COUNT)
    k = local * COLUMNS + tl.arange(0, COLUMNS)
    k_ok = k < pick(sums.depths, i, COUNT)
    through_weight, through_bias = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    if m.gammas is not None:
        down, flags = pick(m.downs, i, COUNT), pick(m.flags, i, COUNT)
        normed, shifted = (flags & NORM_WEIGHT) != 0, (flags & NORM_BIAS) != 0
        gamma = tl.load(pick(m.gammas, i, COUNT) + k, mask=k_ok & normed, other=1.0).to(tl.float32)
        beta = tl.load(pick(m.betas, i, COUNT) + k, mask=k_ok & shifted, other=0.0).to(tl.float32)
    for first in range(0, h, ROWS):
        j = first + tl.arange(0, ROWS)
        j_ok = j < h
        place, ok = j[:, None] * depth + k[None, :], j_ok[:, None] & k_ok[None, :]
        hidden_sum = added_up(partial + h * depth + j, j_ok, splits, size)
        product = added_up(partial + place, ok, splits, size)
        if m.gammas is not None:
            weight = tl.load(down + place, mask=ok & normed, other=0.0).to(tl.float32)
            through_weight += tl.sum(weight * product, 0)
            through_bias += tl.sum(weight * hidden_sum[:, None], 0)
            product = product * gamma[None, :] + hidden_sum[:, None] * beta[None, :]
        put(gradients.downs, i, place, product, ok, wanted, D_DOWN, COUNT)
        put(gradients.down_biases, i, j, hidden_sum, j_ok & (local == 0), wanted, D_DOWN_BIAS, COUNT)
    put(gradients.gammas, i, k, through_weight, k_ok, wanted, D_NORM, COUNT)
    put(gradients.betas, i, k, through_bias, k_ok, wanted, D_NORM_BIAS, COUNT)


@triton.jit
def finish_after(
    m, sums, gradients, i, local, partial, width, splits, size, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """ROWS rows of dW, and their numbers of dw, as parts of U's and u's or of S's and s's."""
    h, own, wanted = pick(m.hiddens, i, COUNT), pick(m.owns, i, COUNT), pick(sums.wanted, i, COUNT)
    scale = pick(m.scales, i, COUNT)
    n = pick(sums.columns, i, COUNT) + local * ROWS + tl.arange(0, ROWS)
    n_ok = n < pick(sums.lasts, i, COUNT)
    is_own, shared = n_ok & (n < own), n_ok & (n >= own)
    for first in range(0, h, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        j_ok = (j < h)[None, :]
        product = added_up(partial + n[:, None] * h + j[None, :], n_ok[:, None] & j_ok, splits, size) * scale
        put(gradients.ups, i, n[:, None] * h + j[None, :], product, is_own[:, None] & j_ok, wanted, D_UP, COUNT)
        put(gradients.shareds, i, (n - own)[:, None] * h + j[None, :], product, shared[:, None] & j_ok, wanted, D_SHARED, COUNT)
    total = added_up(partial + width * h + n, n_ok, splits, size) * scale
    put(gradients.up_biases, i, n, total, is_own, wanted, D_UP_BIAS, COUNT)
    put(gradients.shared_biases, i, n - own, total, shared, wanted, D_SHARED_BIAS, COUNT)


@triton.jit
def finish_kernel(
    m, sums, gradients, partials, width, splits, size, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Part of an adapter's gradients: those before its activation, then those after it."""
    i, local = owner(sums, tl.program_id(0), COUNT)
    before = pick(sums.befores, i, COUNT)
    partial = partials + pick(sums.offsets, i, COUNT)
    if local < before:
        finish_before(m, sums, gradients, i, local, partial, splits, size, COUNT, ROWS, COLUMNS)
    else:
        h, depth = pick(m.hiddens, i, COUNT), pick(m.depths, i, COUNT)
        after = partial + h * depth + h
        finish_after(m, sums, gradients, i, local - before, after, width, splits, size, COUNT, ROWS, COLUMNS)
