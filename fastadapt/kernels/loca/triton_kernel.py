"""Local convolution adapter in Triton: the kernels of the forward in training, of which the backward runs all but the last.

Shapes and symbols are those of reference.py.  Rows are those of n, B (1 + H W) of them: every intermediate value has a row for
the class token too, which takes no part in any sum.  The bottleneck's C columns are held in two pieces, FIRST and REST wide, as
C = 288 is far from a power of two.  u has P + REDUCED columns, of which those past reduce's channels are zero, so that rows
start at multiples of 16 bytes.  Behind prepare_kernel weights have n's dtype.  "statistics" is (mean, rstd) of all channels, of
point, reduce and local one after another.

Every accumulator is float32; only operands of products have n's dtype.  Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import last_to_arrive, pick


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
def columns_of_pieces(x0, x1):
    """The bottleneck's columns that each piece has."""
    return tl.arange(0, x0.shape[1]), tl.arange(0, x1.shape[1]) + x0.shape[1]


@triton.jit
def add_to_pieces(acc0, acc1, values, weight, weight_k, weight_j, k, k_ok, hidden, PRECISION: tl.constexpr):
    """Both pieces of acc + values times rows k of a weight, whose element (k, j) is at k weight_k + j weight_j."""
    j0, j1 = columns_of_pieces(acc0, acc1)
    w0 = tl.load(weight + k[:, None] * weight_k + j0[None, :] * weight_j, mask=both(k_ok, j0 < hidden), other=0.0)
    acc0 = tl.dot(values, w0, acc0, input_precision=PRECISION)
    w1 = tl.load(weight + k[:, None] * weight_k + j1[None, :] * weight_j, mask=both(k_ok, j1 < hidden), other=0.0)
    return acc0, tl.dot(values, w1, acc1, input_precision=PRECISION)


@triton.jit
def store_pieces(target, x0, x1, row, row_ok, hidden):
    """Both pieces to rows of `target`, in its dtype, for any thread to read."""
    j0, j1 = columns_of_pieces(x0, x1)
    dtype: tl.constexpr = target.dtype.element_ty
    tl.store(target + place(row, hidden, j0), x0.to(dtype), mask=both(row_ok, j0 < hidden))
    tl.store(target + place(row, hidden, j1), x1.to(dtype), mask=both(row_ok, j1 < hidden))
    tl.debug_barrier()


@triton.jit
def hidden_of(
    n, down, down_bias, row, row_ok, depth, hidden,
    FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both pieces of these rows of h, in n's dtype."""
    dtype: tl.constexpr = n.dtype.element_ty
    j0, j1 = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    acc0, acc1 = tl.zeros((ROWS, FIRST), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        values = tl.load(n + place(row, depth, k), mask=both(row_ok, k < depth), other=0.0)
        acc0, acc1 = add_to_pieces(acc0, acc1, values, down, 1, depth, k, k < depth, hidden, PRECISION)
    h0 = tl.maximum(acc0 + widened(down_bias, j0, j0 < hidden)[None, :], 0.0)
    h1 = tl.maximum(acc1 + widened(down_bias, j1, j1 < hidden)[None, :], 0.0)
    return h0.to(dtype), h1.to(dtype)


@triton.jit
def prepare_kernel(
    weights, narrow, sizes, counters, count, running, statistics, channels, total, eps,
    WEIGHTS: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is needed before the first kernel: `count` counters at zero, and if asked for, narrow weights and statistics.

    weights, narrow: WEIGHTS float32 tensors of these sizes, and the same in n's dtype.  running: for each of NORMS batch norms
    the running mean and variance and the convolution's bias, of as many channels as `channels` says, together `total`.
    """
    i, job = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    if job == WEIGHTS:
        tl.store(counters + i, tl.zeros((BLOCK,), tl.int32), mask=i < count)
        first = 0
        for stage in tl.static_range(NORMS):
            ok = i < channels[stage]
            mean, variance, bias = running[stage]
            tl.store(statistics + first + i, widened(mean, i, ok) - widened(bias, i, ok), mask=ok)
            tl.store(statistics + total + first + i, tl.rsqrt(widened(variance, i, ok) + eps), mask=ok)
            first += channels[stage]
    elif WEIGHTS > 0:
        target, ok = pick(narrow, job, WEIGHTS), i < pick(sizes, job, WEIGHTS)
        values = tl.load(pick(weights, job, WEIGHTS) + i, mask=ok)
        tl.store(target + i, values.to(target.dtype.element_ty), mask=ok)


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
    h0, h1 = hidden_of(n, down, down_bias, row, row_ok, depth, hidden, FIRST, REST, ROWS, DEPTH, PRECISION)
    store_pieces(h, h0, h1, row, row_ok, hidden)
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
def convolution(
    u, u_width, local, norm, row, row_ok, per_sample, height, width, reduced, locals_,
    REDUCED: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """These rows of v, in float32, zero for class tokens; u: from reduce's first channel on."""
    q, c = tl.arange(0, REDUCED), tl.arange(0, LOCAL)
    acc = tl.zeros((ROWS, LOCAL), tl.float32)
    for tap in range(9):
        near, near_ok = neighbour(row, row_ok, tap, per_sample, height, width)
        _, z = normalised(widened(u, place(near, u_width, q), near_ok[:, None]), norm)
        t = tl.where(near_ok[:, None], tl.maximum(z, 0.0), 0.0).to(u.dtype.element_ty)
        at = local + c[None, :] * reduced * 9 + q[:, None] * 9 + tap
        kernel = tl.load(at, mask=both(q < reduced, c < locals_), other=0.0)
        acc = tl.dot(t, kernel, acc, input_precision=PRECISION)
    return acc


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
    c_ok, channels = c < locals_, points + reduced + locals_
    norm = norm_of(statistics, reduce_gamma, reduce_beta, points, channels, q, q < reduced)
    acc = convolution(
        u + points, points + REDUCED, local, norm, row, row_ok, per_sample, height, width, reduced, locals_, REDUCED, LOCAL,
        ROWS, PRECISION,
    )  # fmt: skip
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
def store_site(acc, up_bias, layer_scale, mlp, residual, out, row, row_ok, column, column_ok, width, scale):
    """acc + b2, or the sum that it is part of, to a tile of out."""
    ok, at = both(row_ok, column_ok), place(row, width, column)
    acc += widened(up_bias, column, column_ok)[None, :]
    if residual is not None:
        update = widened(mlp, at, ok) + scale * acc
        acc = update * widened(layer_scale, column, column_ok)[None, :] + widened(residual, at, ok)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=ok)


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
    store_site(acc, up_bias, layer_scale, mlp, residual, out, row, row_ok, column, column_ok, width, scale)
