"""A tower's side adapters in Triton: the kernels that compute results.

`fused_kernel` is a whole forward without LN_out: a program goes through all adapters for its rows, keeps the hidden on chip and
the sum in one accumulator.  LN_out needs a row's whole result before it can be added: `member_kernel` writes the results and
each row's mean and deviation, `combine_kernel` adds them up.  `member_kernel` also computes again what the backward reads.

Adapters come as tuples of pointers and numbers (triton_launch.Members).  Those of one structure are neighbours, a group, and
loops go through a group at run time: code is paid for by the group.  Shapes and symbols are those of reference.py; HIDDEN is
the largest h padded to a power of two, and every accumulator is float32.  Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import activate, pick

# what a group's numbers are: its adapters, first <= i < last; 1 or 0 for LayerNorm, an up-projection, LN_out; the activation
FIRST, LAST, NORM, UP, OUT_NORM, ACTIVATION = (tl.constexpr(i) for i in range(6))
ACTIVATIONS = ("identity", "relu", "gelu", "quick_gelu")

# bits of Members.flags: what an adapter has of the optional vectors, and whether its dz is wanted
DOWN_BIAS, UP_BIAS, SHARED_BIAS, NORM_WEIGHT, NORM_BIAS, OUT_NORM_BIAS, HIDDEN_GRAD = (tl.constexpr(1 << i) for i in range(7))


@triton.constexpr_function
def member_group(groups, g):
    """Group g, as a constant that functions can be given."""
    return groups[g]


@triton.constexpr_function
def activation(group):
    """The name of a group's activation."""
    return ACTIVATIONS[group[ACTIVATION]]


@triton.jit
def rows_of(base, row, row_stride, columns):
    """Pointers to a (rows, columns) tile of a matrix with adjacent columns."""
    return base + row.to(tl.int64)[:, None] * row_stride + columns[None, :]


@triton.jit
def moments(count, mean_a, mean_b, product, a, b, ok, fresh):
    """(mean a, mean b, sum (a - mean a) (b - mean b)) of rows after `count` columns, brought up to date with `fresh` more.

    a, b: (ROWS, COLUMNS), of which those not `ok` do not count (Chan, Golub, LeVeque 1979: a large mean costs no digits).
    """
    step_a, step_b = tl.sum(a, 1) / fresh, tl.sum(b, 1) / fresh
    centred = tl.where(ok, (a - step_a[:, None]) * (b - step_b[:, None]), 0.0)
    apart_a, apart_b = step_a - mean_a, step_b - mean_b
    share = fresh / (count + fresh)
    return mean_a + apart_a * share, mean_b + apart_b * share, product + tl.sum(centred, 1) + apart_a * apart_b * count * share


@triton.jit
def tap_statistics(m, i, row, row_ok, COUNT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """(mean, rstd) of rows of adapter i's tap."""
    tap, stride, depth = pick(m.taps, i, COUNT), pick(m.tap_rows, i, COUNT), pick(m.depths, i, COUNT)
    mean, deviation = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        ok = row_ok[:, None] & (k < depth)[None, :]
        values = tl.load(rows_of(tap, row, stride, k), mask=ok, other=0.0).to(tl.float32)
        fresh = tl.minimum(depth - start, DEPTH).to(tl.float32)
        mean, _, deviation = moments(start, mean, mean, deviation, values, values, ok, fresh)
    return mean, tl.rsqrt(deviation / depth + pick(m.eps, i, COUNT))


@triton.jit
def hidden_tile(
    m, i, row, row_ok, mean, rstd, j, j_ok, WITH_NORM: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    HIDDEN: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns j of adapter i's z, in float32."""
    tap, stride, depth = pick(m.taps, i, COUNT), pick(m.tap_rows, i, COUNT), pick(m.depths, i, COUNT)
    down, flags = pick(m.downs, i, COUNT), pick(m.flags, i, COUNT)
    if WITH_NORM:
        gammas, betas, has_beta = pick(m.gammas, i, COUNT), pick(m.betas, i, COUNT), (flags & NORM_BIAS) != 0
    z = tl.zeros((ROWS, HIDDEN), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_ok = k < depth
        values = tl.load(rows_of(tap, row, stride, k), mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        if WITH_NORM:
            gamma = tl.load(gammas + k, mask=k_ok, other=0.0).to(tl.float32)
            beta = tl.load(betas + k, mask=k_ok & has_beta, other=0.0).to(tl.float32)
            normed = (values.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
            values = normed.to(values.dtype)
        weight = tl.load(down + k[:, None] + j[None, :] * depth, mask=k_ok[:, None] & j_ok[None, :], other=0.0)
        z = tl.dot(values, weight.to(values.dtype), z, input_precision=PRECISION)
    has_bias = (flags & DOWN_BIAS) != 0
    return z + tl.load(pick(m.down_biases, i, COUNT) + j, mask=j_ok & has_bias, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rows_of_both(up, shared, own, n, width):
    """Pointers to rows n of two matrices of this width on top of each other, such as W = [U; S], the first of `own` rows."""
    return tl.where(n < own, up + n * width, shared + (n - own) * width)


@triton.jit
def up_bias(m, i, n, n_ok, COUNT: tl.constexpr):
    """Numbers n of adapter i's w = [u, s], in float32."""
    own, flags = pick(m.owns, i, COUNT), pick(m.flags, i, COUNT)
    there = tl.where(n < own, (flags & UP_BIAS) != 0, (flags & SHARED_BIAS) != 0)
    bias = rows_of_both(pick(m.up_biases, i, COUNT), pick(m.shared_biases, i, COUNT), own, n, 1)
    return tl.load(bias, mask=n_ok & there, other=0.0).to(tl.float32)


@triton.jit
def add_bases(total, bases, base_rows, row, row_ok, n, n_ok, BASES: tl.constexpr):
    """`total` and the tile of every base."""
    for b in tl.static_range(BASES):
        tile = rows_of(bases[b], row, base_rows[b], n)
        total += tl.load(tile, mask=row_ok[:, None] & n_ok[None, :], other=0.0).to(tl.float32)
    return total


@triton.jit
def fused_kernel(
    m, bases, base_rows, out, rows, width,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, BASES: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile of out, where no adapter has LN_out.

    The scale multiplies r, not the product, so that the sum has one accumulator.
    """
    dtype: tl.constexpr = m.taps[0].dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, n_ok = row < rows, n < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for g in tl.static_range(len(GROUPS)):
        for i in range(GROUPS[g][FIRST], GROUPS[g][LAST]):
            h, scale = pick(m.hiddens, i, COUNT), pick(m.scales, i, COUNT)
            mean, rstd = 0.0, 1.0
            if GROUPS[g][NORM]:
                mean, rstd = tap_statistics(m, i, row, row_ok, COUNT, ROWS, DEPTH)
            if GROUPS[g][UP]:
                j = tl.arange(0, HIDDEN)
                z = hidden_tile(
                    m, i, row, row_ok, mean, rstd, j, j < h, GROUPS[g][NORM], COUNT, ROWS, HIDDEN, DEPTH, PRECISION
                )  # fmt: skip
                r = (activate(z, activation(GROUPS[g])) * scale).to(dtype)
                up, shared, own = pick(m.ups, i, COUNT), pick(m.shareds, i, COUNT), pick(m.owns, i, COUNT)
                w = rows_of_both(up, shared, own, n, h)[None, :] + j[:, None]
                weight = tl.load(w, mask=(j < h)[:, None] & n_ok[None, :], other=0.0)
                total = tl.dot(r, weight.to(dtype), total, input_precision=PRECISION)
                total += (up_bias(m, i, n, n_ok, COUNT) * scale)[None, :]
            else:
                z = hidden_tile(
                    m, i, row, row_ok, mean, rstd, n, n_ok, GROUPS[g][NORM], COUNT, ROWS, COLUMNS, DEPTH, PRECISION
                )  # fmt: skip
                total += activate(z, activation(GROUPS[g])) * scale
    total = add_bases(total, bases, base_rows, row, row_ok, n, n_ok, BASES)
    tl.store(rows_of(out, row, width, n), total.to(out.dtype.element_ty), mask=row_ok[:, None] & n_ok[None, :])


@triton.jit
def member_rows(
    m, i, hidden, statistics, outcomes, results, dout, dout_row, rows, width, row, row_ok, GROUP: tl.constexpr,
    OUTCOME: tl.constexpr, COUNT: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`member_kernel` for an adapter of this group."""
    dtype: tl.constexpr = m.taps[0].dtype.element_ty
    all_rows = tl.cast(rows, tl.int64)
    h, scale = pick(m.hiddens, i, COUNT), pick(m.scales, i, COUNT)
    kept = hidden if hidden is None else hidden + all_rows * pick(m.starts, i, COUNT)
    mean, rstd = 0.0, 1.0
    if GROUP[NORM]:
        mean, rstd = tap_statistics(m, i, row, row_ok, COUNT, ROWS, DEPTH)
        if hidden is not None:
            tl.store(statistics + i * all_rows + row, mean, mask=row_ok)
            tl.store(statistics + (COUNT + i) * all_rows + row, rstd, mask=row_ok)
    if GROUP[UP]:
        j = tl.arange(0, HIDDEN)
        z = hidden_tile(m, i, row, row_ok, mean, rstd, j, j < h, GROUP[NORM], COUNT, ROWS, HIDDEN, DEPTH, PRECISION)
        if hidden is not None:
            tl.store(rows_of(kept, row, h, j), z.to(dtype), mask=row_ok[:, None] & (j < h)[None, :])
        r = activate(z, activation(GROUP)).to(dtype)
        up, shared, own = pick(m.ups, i, COUNT), pick(m.shareds, i, COUNT), pick(m.owns, i, COUNT)
    if OUTCOME or not GROUP[UP]:
        mean_y, deviation = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        mean_p, product = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        for start in range(0, width, COLUMNS):
            n = start + tl.arange(0, COLUMNS)
            n_ok = n < width
            ok = row_ok[:, None] & n_ok[None, :]
            if GROUP[UP]:
                w = rows_of_both(up, shared, own, n, h)[None, :] + j[:, None]
                weight = tl.load(w, mask=(j < h)[:, None] & n_ok[None, :], other=0.0)
                y = tl.dot(r, weight.to(dtype), input_precision=PRECISION) + up_bias(m, i, n, n_ok, COUNT)[None, :]
            else:
                z = hidden_tile(
                    m, i, row, row_ok, mean, rstd, n, n_ok, GROUP[NORM], COUNT, ROWS, COLUMNS, DEPTH, PRECISION
                )  # fmt: skip
                if hidden is not None:
                    tl.store(rows_of(kept, row, h, n), z.to(dtype), mask=ok)
                y = activate(z, activation(GROUP))
            if OUTCOME:
                y = (y * scale).to(dtype)
                tl.store(rows_of(outcomes + i * all_rows * width, row, width, n), y, mask=ok)
            if GROUP[OUT_NORM]:
                y = y.to(tl.float32)
                fresh = tl.minimum(width - start, COLUMNS).to(tl.float32)
                if dout is not None:
                    p = tl.load(rows_of(dout, row, dout_row, n), mask=ok, other=0.0).to(tl.float32)
                    p *= tl.load(pick(m.out_gammas, i, COUNT) + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
                    _, mean_p, product = moments(start, mean_y, mean_p, product, y, p, ok, fresh)
                mean_y, _, deviation = moments(start, mean_y, mean_y, deviation, y, y, ok, fresh)
        if GROUP[OUT_NORM]:
            rstd_y = tl.rsqrt(deviation / width + pick(m.out_eps, i, COUNT))
            tl.store(results + i * all_rows + row, mean_y, mask=row_ok)
            tl.store(results + (COUNT + i) * all_rows + row, rstd_y, mask=row_ok)
            if dout is not None:
                tl.store(results + (2 * COUNT + i) * all_rows + row, mean_p, mask=row_ok)
                tl.store(results + (3 * COUNT + i) * all_rows + row, product / width * rstd_y, mask=row_ok)


@triton.jit
def member_kernel(
    m, hidden, statistics, outcomes, results, dout, dout_row, rows, width,
    GROUPS: tl.constexpr, EVERY_OUTCOME: tl.constexpr, COUNT: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For an adapter and ROWS rows: z, (mean, rstd) of its tap; y, of all adapters or of those with LN_out, and for those
    the rows' (mean y, rstd_y) and, where dout is given, (mean p, mean p o yhat).

    hidden None: nothing is kept for a backward.
    """
    i = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for g in tl.static_range(len(GROUPS)):
        if (i >= GROUPS[g][FIRST]) & (i < GROUPS[g][LAST]):
            member_rows(
                m, i, hidden, statistics, outcomes, results, dout, dout_row, rows, width, row, row < rows,
                member_group(GROUPS, g), EVERY_OUTCOME or GROUPS[g][OUT_NORM], COUNT, HIDDEN, ROWS, COLUMNS, DEPTH, PRECISION,
            )  # fmt: skip


@triton.jit
def combine_kernel(
    m, outcomes, results, bases, base_rows, out, rows, width,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, BASES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile of out, from the results of all adapters and the statistics of those with LN_out."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, n_ok = row < rows, n < width
    all_rows = tl.cast(rows, tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for g in tl.static_range(len(GROUPS)):
        for i in range(GROUPS[g][FIRST], GROUPS[g][LAST]):
            tile = rows_of(outcomes + i * all_rows * width, row, width, n)
            y = tl.load(tile, mask=row_ok[:, None] & n_ok[None, :], other=0.0).to(tl.float32)
            if GROUPS[g][OUT_NORM]:
                mean = tl.load(results + i * all_rows + row, mask=row_ok, other=0.0)
                rstd = tl.load(results + (COUNT + i) * all_rows + row, mask=row_ok, other=0.0)
                y = (y - mean[:, None]) * rstd[:, None]
                y *= tl.load(pick(m.out_gammas, i, COUNT) + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
                has_beta = (pick(m.flags, i, COUNT) & OUT_NORM_BIAS) != 0
                y += tl.load(pick(m.out_betas, i, COUNT) + n, mask=n_ok & has_beta, other=0.0).to(tl.float32)[None, :]
            total += y
    total = add_bases(total, bases, base_rows, row, row_ok, n, n_ok, BASES)
    tl.store(rows_of(out, row, width, n), total.to(out.dtype.element_ty), mask=row_ok[:, None] & n_ok[None, :])
