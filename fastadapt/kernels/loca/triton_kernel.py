"""Local convolution adapter in Triton: the kernels of the forward, of which the backward runs the first two again.

Shapes and symbols are those of reference.py.  Rows are those of n, B (1 + H W) of them: every intermediate value has a row for
the class token too, which takes no part in any sum.  The bottleneck's C columns are held in two pieces, FIRST and REST wide, as
C = 288 is far from a power of two.  u has P + REDUCED columns, of which those past reduce's channels are zero, so that rows
start at multiples of 16 bytes.  Weights come in n's dtype.  "statistics" is (mean, rstd) of all channels, of point, reduce and
local one after another.

Every accumulator is float32; only operands of products have n's dtype.  Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import last_to_arrive


@triton.jit
def place(row, width, column):
    """Offsets of a tile of a contiguous matrix."""
    return row.to(tl.int64)[:, None] * width + column[None, :]


@triton.jit
def both(row_ok, column_ok):
    """The mask of a tile."""
    return row_ok[:, None] & column_ok[None, :]


@triton.jit
def widened(base, offset, ok):
    """A tile or vector in float32, zero where it is not `ok`."""
    return tl.load(base + offset, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def norm_of(statistics, gamma, beta, first, channels, c, ok):
    """(mean, rstd, gamma, beta) of the channels c of a convolution, whose channels are those from `first` on of `channels`."""
    mean = tl.load(statistics + first + c, mask=ok, other=0.0)
    rstd = tl.load(statistics + channels + first + c, mask=ok, other=0.0)
    return mean, rstd, widened(gamma, c, ok), widened(beta, c, ok)


@triton.jit
def normalised(x, norm):
    """xhat and BN(x; gamma, beta)."""
    mean, rstd, gamma, beta = norm
    xhat = (x - mean[None, :]) * rstd[None, :]
    return xhat, xhat * gamma[None, :] + beta[None, :]


@triton.jit
def neighbour(row, row_ok, tap, per_sample, height, width):
    """The row of every patch's neighbour number `tap` of nine, and whether there is one: none past borders, of class tokens."""
    patch = row % per_sample - 1
    i = patch // width + tap // 3 - 1
    j = patch % width + tap % 3 - 1
    ok = row_ok & (patch >= 0) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    return row + (tap // 3 - 1) * width + tap % 3 - 1, ok


@triton.jit
def patches_among(first, end, per_sample):
    """How many of the rows from `first` to `end` are patches."""
    return end - first - (tl.cdiv(end, per_sample) - tl.cdiv(first, per_sample))


@triton.jit
def store_moments(partials, x, counted, c, ok, channels):
    """A program's mean and sum of squared deviations of every channel of tile x, over the rows that are `counted`."""
    count = tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)
    mean = tl.sum(tl.where(counted[:, None], x, 0.0), 0) / count
    centred = tl.where(counted[:, None], x - mean[None, :], 0.0)
    partial = partials + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(partial, mean, mask=ok)
    tl.store(partial + channels, tl.sum(centred * centred, 0), mask=ok)


@triton.jit
def finish_moments(
    partials, bias, statistics, moments, begin, own, stride, first, channels, rows, per_sample, eps,
    ROWS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The statistics and moments of `own` channels from all programs' (Chan, Golub, LeVeque 1979).

    begin: their first among the `stride` of the partial sums; first: their first among all `channels`.
    """
    programs = tl.num_programs(0)
    total = (rows - rows // per_sample).to(tl.float32)
    for start in range(0, own, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        ok = c < own
        mean, deviation = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
        for p0 in range(0, programs, GROUP):
            p = p0 + tl.arange(0, GROUP)
            count = patches_among(tl.minimum(p * ROWS, rows), tl.minimum((p + 1) * ROWS, rows), per_sample).to(tl.float32)
            at = partials + p.to(tl.int64)[:, None] * 2 * stride + begin + c[None, :]
            means = tl.load(at, mask=both(p < programs, ok), other=0.0, cache_modifier=".cg")
            mean += tl.sum(means * count[:, None], 0) / total
        for p0 in range(0, programs, GROUP):
            p = p0 + tl.arange(0, GROUP)
            count = patches_among(tl.minimum(p * ROWS, rows), tl.minimum((p + 1) * ROWS, rows), per_sample).to(tl.float32)
            at = partials + p.to(tl.int64)[:, None] * 2 * stride + begin + c[None, :]
            apart = tl.load(at, mask=both(p < programs, ok), other=0.0, cache_modifier=".cg") - mean[None, :]
            within = tl.load(at + stride, mask=both(p < programs, ok), other=0.0, cache_modifier=".cg")
            deviation += tl.sum(within + count[:, None] * apart * apart, 0)
        tl.store(statistics + first + c, mean, mask=ok)
        tl.store(statistics + channels + first + c, tl.rsqrt(deviation / total + eps), mask=ok)
        tl.store(moments + first + c, mean + widened(bias, c, ok), mask=ok)
        tl.store(moments + channels + first + c, deviation / (total - 1.0), mask=ok)


@triton.jit
def product(
    left, row, row_ok, depth, weight, weight_k, weight_c, c, c_ok,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns c of left (rows, depth) times a weight, whose element (k, c) is at k weight_k + c weight_c."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        values = tl.load(left + place(row, depth, k), mask=both(row_ok, k < depth), other=0.0)
        factors = tl.load(weight + k[:, None] * weight_k + c[None, :] * weight_c, mask=both(k < depth, c_ok), other=0.0)
        acc = tl.dot(values, factors, acc, input_precision=PRECISION)
    return acc


@triton.jit
def hidden_kernel(
    n, down, down_bias, point, reduce, point_bias, reduce_bias, h, u, statistics, moments, partials, counter, rows, per_sample,
    depth, hidden, points, reduced, channels, eps,
    STATISTICS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, REDUCED: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of h and u; with STATISTICS the last program adds up those of point and reduce."""
    dtype: tl.constexpr = n.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    j0, j1 = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    acc0, acc1 = tl.zeros((ROWS, FIRST), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        values = tl.load(n + place(row, depth, k), mask=both(row_ok, k < depth), other=0.0)
        w0 = tl.load(down + j0[None, :] * depth + k[:, None], mask=both(k < depth, j0 < hidden), other=0.0)
        acc0 = tl.dot(values, w0, acc0, input_precision=PRECISION)
        w1 = tl.load(down + j1[None, :] * depth + k[:, None], mask=both(k < depth, j1 < hidden), other=0.0)
        acc1 = tl.dot(values, w1, acc1, input_precision=PRECISION)
    h0 = tl.maximum(acc0 + widened(down_bias, j0, j0 < hidden)[None, :], 0.0).to(dtype)
    h1 = tl.maximum(acc1 + widened(down_bias, j1, j1 < hidden)[None, :], 0.0).to(dtype)
    tl.store(h + place(row, hidden, j0), h0, mask=both(row_ok, j0 < hidden))
    tl.store(h + place(row, hidden, j1), h1, mask=both(row_ok, j1 < hidden))
    tl.debug_barrier()  # other threads read these values below
    counted = row_ok & (row % per_sample > 0)
    u_width = points + REDUCED
    for start in range(0, points, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        c_ok = c < points
        some = product(h, row, row_ok, hidden, point, 1, hidden, c, c_ok, ROWS, DEPTH, COLUMNS, PRECISION).to(dtype)
        tl.store(u + place(row, u_width, c), some, mask=both(row_ok, c_ok))
        if STATISTICS:
            store_moments(partials, some.to(tl.float32), counted, c, c_ok, u_width)
    c = tl.arange(0, REDUCED)
    some = product(h, row, row_ok, hidden, reduce, 1, hidden, c, c < reduced, ROWS, DEPTH, REDUCED, PRECISION).to(dtype)
    tl.store(u + place(row, u_width, points + c), some, mask=row_ok[:, None])
    if STATISTICS:
        store_moments(partials, some.to(tl.float32), counted, points + c, c < reduced, u_width)
    if STATISTICS:
        if last_to_arrive(counter, tl.num_programs(0)):
            finish_moments(
                partials, point_bias, statistics, moments, 0, points, u_width, 0, channels, rows, per_sample, eps, ROWS, GROUP,
                COLUMNS,
            )  # fmt: skip
            finish_moments(
                partials, reduce_bias, statistics, moments, points, reduced, u_width, points, channels, rows, per_sample, eps,
                ROWS, GROUP, COLUMNS,
            )  # fmt: skip


@triton.jit
def local_kernel(
    u, local, local_bias, reduce_gamma, reduce_beta, v, statistics, moments, partials, counter, rows, per_sample, height, width,
    points, reduced, locals_, eps,
    STATISTICS: tl.constexpr, REDUCED: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of v, zero for class tokens; with STATISTICS the last program adds up local's."""
    dtype: tl.constexpr = u.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    q, c = tl.arange(0, REDUCED), tl.arange(0, LOCAL)
    q_ok, c_ok = q < reduced, c < locals_
    channels = points + reduced + locals_
    norm = norm_of(statistics, reduce_gamma, reduce_beta, points, channels, q, q_ok)
    acc = tl.zeros((ROWS, LOCAL), tl.float32)
    for tap in range(9):
        near, near_ok = neighbour(row, row_ok, tap, per_sample, height, width)
        _, z = normalised(widened(u, place(near, points + REDUCED, points + q), near_ok[:, None]), norm)
        t = tl.where(near_ok[:, None], tl.maximum(z, 0.0), 0.0).to(dtype)
        kernel = tl.load(local + c[None, :] * reduced * 9 + q[:, None] * 9 + tap, mask=both(q_ok, c_ok), other=0.0)
        acc = tl.dot(t, kernel, acc, input_precision=PRECISION)
    acc = acc.to(dtype)
    tl.store(v + place(row, locals_, c), acc, mask=both(row_ok, c_ok))
    if STATISTICS:
        store_moments(partials, acc.to(tl.float32), row_ok & (row % per_sample > 0), c, c_ok, locals_)
        if last_to_arrive(counter, tl.num_programs(0)):
            finish_moments(
                partials, local_bias, statistics, moments, 0, locals_, locals_, points + reduced, channels, rows, per_sample,
                eps, ROWS, GROUP, COLUMNS,
            )  # fmt: skip


@triton.jit
def output_step(
    acc, h, x, x_width, c, own, first, row, row_ok, is_patch, norm, up, column, column_ok, hidden, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + y_c W2_c^T for columns `first` + c of y, whose convolution's channels c are columns of x."""
    ok = both(row_ok, c < own)
    value = widened(h, place(row, hidden, first + c), ok)
    _, z = normalised(widened(x, place(row, x_width, c), ok), norm)
    y = tl.where(is_patch[:, None], value + tl.maximum(z, 0.0), 2.0 * value)
    y = tl.where(ok, y, 0.0).to(h.dtype.element_ty)
    weight = tl.load(up + column[None, :] * hidden + first + c[:, None], mask=both(c < own, column_ok), other=0.0)
    return tl.dot(y, weight, acc, input_precision=PRECISION)


@triton.jit
def output_kernel(
    h, u, v, statistics, point_gamma, point_beta, local_gamma, local_beta, up, up_bias, layer_scale, mlp, residual, out, rows,
    per_sample, hidden, points, reduced, width, scale,
    REDUCED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile of out."""
    column_tiles = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok, is_patch = row < rows, column < width, row % per_sample > 0
    locals_ = hidden - points
    channels = hidden + reduced
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, points, DEPTH):
        c = start + tl.arange(0, DEPTH)
        norm = norm_of(statistics, point_gamma, point_beta, 0, channels, c, c < points)
        acc = output_step(
            acc, h, u, points + REDUCED, c, points, 0, row, row_ok, is_patch, norm, up, column, column_ok, hidden, PRECISION
        )  # fmt: skip
    for start in range(0, locals_, DEPTH):
        c = start + tl.arange(0, DEPTH)
        norm = norm_of(statistics, local_gamma, local_beta, points + reduced, channels, c, c < locals_)
        acc = output_step(
            acc, h, v, locals_, c, locals_, points, row, row_ok, is_patch, norm, up, column, column_ok, hidden, PRECISION
        )  # fmt: skip
    acc += widened(up_bias, column, column_ok)[None, :]
    ok, at = both(row_ok, column_ok), place(row, width, column)
    if residual is not None:
        update = widened(mlp, at, ok) + scale * acc
        acc = update * widened(layer_scale, column, column_ok)[None, :] + widened(residual, at, ok)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=ok)
