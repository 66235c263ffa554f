"""Local convolution adapter in Triton: the kernels of the backward, in the order in which they run.

Shapes, symbols and layouts are those of triton_kernel.py.  "sums" is (dbeta, dgamma) of all channels, "vectors" (dbeta,
dgamma, dbias) in the parameters' dtype, and `inverse` is 1 / N, or 0 in eval, where the statistics are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import last_to_arrive, pick
from fastadapt.kernels.loca.triton_kernel import (
    add_to_pieces,
    both,
    neighbour,
    norm_of,
    normalised,
    place,
    product,
    store_pieces,
    widened,
)


@triton.jit
def norm_grad(dy, dy_width, dy_first, x, x_width, x_first, c, row, ok, norm):
    """dz of relu(BN(x)), zero where it is not `ok`, xhat and BN(x): columns c of x from `x_first`, of dy from `dy_first` on."""
    xhat, z = normalised(widened(x, place(row, x_width, x_first + c), ok), norm)
    dz = tl.where(ok & (z > 0), widened(dy, place(row, dy_width, dy_first + c), ok), 0.0)
    return dz, xhat, z


@triton.jit
def through_norm(dz, xhat, norm, sums, first, channels, c, c_ok, ok, inverse):
    """The gradient of x; inverse: 1 / N, or 0 in eval."""
    _, rstd, gamma, _ = norm
    dbeta = tl.load(sums + first + c, mask=c_ok, other=0.0) * inverse
    dgamma = tl.load(sums + channels + first + c, mask=c_ok, other=0.0) * inverse
    return tl.where(ok, (gamma * rstd)[None, :] * (dz - dbeta[None, :] - xhat * dgamma[None, :]), 0.0)


@triton.jit
def store_sums(partials, dz, xhat, c, ok, channels):
    """A program's sums over rows of dz and dz xhat."""
    partial = partials + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(partial, tl.sum(dz, 0), mask=ok)
    tl.store(partial + channels, tl.sum(dz * xhat, 0), mask=ok)


@triton.jit
def finish_sums(
    partials, statistics, gamma, sums, vectors, begin, own, stride, first, channels, inverse,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dbeta and dgamma of `own` channels from all programs' sums, as finish_moments, and with dbias as the result has them."""
    dtype: tl.constexpr = vectors.dtype.element_ty
    programs = tl.num_programs(0)
    for start in range(0, own, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        ok = c < own
        dbeta, dgamma = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
        for p0 in range(0, programs, GROUP):
            p = p0 + tl.arange(0, GROUP)
            at = partials + p.to(tl.int64)[:, None] * 2 * stride + begin + c[None, :]
            some = both(p < programs, ok)
            dbeta += tl.sum(tl.load(at, mask=some, other=0.0, cache_modifier=".cg"), 0)
            dgamma += tl.sum(tl.load(at + stride, mask=some, other=0.0, cache_modifier=".cg"), 0)
        rstd = tl.load(statistics + channels + first + c, mask=ok, other=0.0)
        tl.store(sums + first + c, dbeta, mask=ok)
        tl.store(sums + channels + first + c, dgamma, mask=ok)
        dbias = tl.where(inverse > 0, 0.0, widened(gamma, c, ok) * rstd * dbeta)  # in training it cancels
        tl.store(vectors + first + c, dbeta.to(dtype), mask=ok)
        tl.store(vectors + channels + first + c, dgamma.to(dtype), mask=ok)
        tl.store(vectors + 2 * channels + first + c, dbias.to(dtype), mask=ok)


@triton.jit
def output_grad_kernel(
    dout, layer_scale, up, u, v, statistics, point_gamma, point_beta, local_gamma, local_beta, dloca, dy, sums, vectors,
    partials, counter, rows, per_sample, hidden, points, reduced, width, scale, inverse,
    FIRST: tl.constexpr, REST: tl.constexpr, REDUCED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dy, and of dloca where there is a layer_scale; the last program adds up the sums of point and local."""
    dtype: tl.constexpr = u.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    acc0, acc1 = tl.zeros((ROWS, FIRST), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, width, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_ok = k < width
        grad = tl.load(dout + place(row, width, k), mask=both(row_ok, k_ok), other=0.0)
        if layer_scale is not None:
            grad = (grad.to(tl.float32) * widened(layer_scale, k, k_ok)[None, :]).to(dtype)
            tl.store(dloca + place(row, width, k), grad, mask=both(row_ok, k_ok))
        acc0, acc1 = add_to_pieces(acc0, acc1, grad, up, hidden, 1, k, k_ok, hidden, PRECISION)
    store_pieces(dy, scale * acc0, scale * acc1, row, row_ok, hidden)
    counted = row_ok & (row % per_sample > 0)
    channels, locals_ = hidden + reduced, hidden - points
    for start in range(0, points, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        norm = norm_of(statistics, point_gamma, point_beta, 0, channels, c, c < points)
        dz, xhat, _ = norm_grad(dy, hidden, 0, u, points + REDUCED, 0, c, row, both(counted, c < points), norm)
        store_sums(partials, dz, xhat, c, c < points, hidden)
    for start in range(0, locals_, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        norm = norm_of(statistics, local_gamma, local_beta, points + reduced, channels, c, c < locals_)
        dz, xhat, _ = norm_grad(dy, hidden, points, v, locals_, 0, c, row, both(counted, c < locals_), norm)
        store_sums(partials, dz, xhat, points + c, c < locals_, hidden)
    if last_to_arrive(counter, tl.num_programs(0)):
        finish_sums(partials, statistics, point_gamma, sums, vectors, 0, points, hidden, 0, channels, inverse, GROUP, COLUMNS)
        finish_sums(
            partials, statistics, local_gamma, sums, vectors, points, locals_, hidden, points + reduced, channels, inverse,
            GROUP, COLUMNS,
        )  # fmt: skip


@triton.jit
def local_grad_kernel(
    dy, u, v, local, statistics, reduce_gamma, reduce_beta, local_gamma, local_beta, sums, vectors, dv, dt, partials,
    counter, rows, per_sample, height, width, points, reduced, locals_, inverse,
    REDUCED: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dv and of dt o [t > 0]; the last program adds up the sums of reduce."""
    dtype: tl.constexpr = u.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    q, c = tl.arange(0, REDUCED), tl.arange(0, LOCAL)
    q_ok, c_ok = q < reduced, c < locals_
    below = points + reduced
    channels = below + locals_
    norm = norm_of(statistics, local_gamma, local_beta, below, channels, c, c_ok)
    acc = tl.zeros((ROWS, REDUCED), tl.float32)
    for tap in range(9):
        near, near_ok = neighbour(row, row_ok, 8 - tap, per_sample, height, width)
        ok = both(near_ok, c_ok)
        dz, xhat, _ = norm_grad(dy, points + locals_, points, v, locals_, 0, c, near, ok, norm)
        grad = through_norm(dz, xhat, norm, sums, below, channels, c, c_ok, ok, inverse).to(dtype)
        if tap == 4:
            tl.store(dv + place(row, locals_, c), grad, mask=both(row_ok, c_ok))
        kernel = tl.load(local + c[:, None] * reduced * 9 + q[None, :] * 9 + tap, mask=both(c_ok, q_ok), other=0.0)
        acc = tl.dot(grad, kernel, acc, input_precision=PRECISION)
    norm = norm_of(statistics, reduce_gamma, reduce_beta, points, channels, q, q_ok)
    ok = (row_ok & (row % per_sample > 0))[:, None]
    xhat, z = normalised(widened(u, place(row, points + REDUCED, points + q), ok), norm)
    dz = tl.where(ok & (z > 0), acc, 0.0).to(dtype)
    tl.store(dt + place(row, REDUCED, q), dz, mask=row_ok[:, None])
    store_sums(partials, dz.to(tl.float32), xhat, q, q_ok, reduced)
    if last_to_arrive(counter, tl.num_programs(0)):
        finish_sums(
            partials, statistics, reduce_gamma, sums, vectors, 0, reduced, reduced, points, channels, inverse, GROUP, COLUMNS
        )  # fmt: skip


@triton.jit
def store_output(y, h, z, row, row_ok, is_patch, j, ok, hidden):
    """Columns j of y."""
    value = widened(h, place(row, hidden, j), both(row_ok, ok))
    value = tl.where(is_patch[:, None], value + tl.maximum(z, 0.0), 2.0 * value)
    tl.store(y + place(row, hidden, j), value.to(y.dtype.element_ty), mask=both(row_ok, ok))


@triton.jit
def masked_grad(acc, dy, h, row, row_ok, is_patch, j, hidden):
    """(acc + dy, for the class token 2 dy) o [h > 0] of columns j."""
    ok = both(row_ok, j < hidden)
    own = widened(dy, place(row, hidden, j), ok)
    acc += tl.where(is_patch[:, None], own, 2.0 * own)
    return tl.where(widened(h, place(row, hidden, j), ok) > 0, acc, 0.0).to(h.dtype.element_ty)


@triton.jit
def hidden_grad_kernel(
    dy, dt, h, u, v, down, point, reduce, statistics, point_gamma, point_beta, reduce_gamma, reduce_beta, local_gamma,
    local_beta, sums, du, y, dh, dn, rows, per_sample, depth, hidden, points, reduced, inverse,
    FIRST: tl.constexpr, REST: tl.constexpr, REDUCED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of du, y, dh and, where there is room for it, dn."""
    dtype: tl.constexpr = h.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok, is_patch = row < rows, row % per_sample > 0
    counted = row_ok & is_patch
    j0, j1 = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    acc0, acc1 = tl.zeros((ROWS, FIRST), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    u_width, channels, locals_ = points + REDUCED, hidden + reduced, hidden - points
    for start in range(0, points, DEPTH):
        c = start + tl.arange(0, DEPTH)
        c_ok = c < points
        ok = both(counted, c_ok)
        norm = norm_of(statistics, point_gamma, point_beta, 0, channels, c, c_ok)
        dz, xhat, z = norm_grad(dy, hidden, 0, u, u_width, 0, c, row, ok, norm)
        store_output(y, h, z, row, row_ok, is_patch, c, c_ok, hidden)
        grad = through_norm(dz, xhat, norm, sums, 0, channels, c, c_ok, ok, inverse).to(dtype)
        tl.store(du + place(row, u_width, c), grad, mask=both(row_ok, c_ok))
        acc0, acc1 = add_to_pieces(acc0, acc1, grad, point, hidden, 1, c, c_ok, hidden, PRECISION)
    for start in range(0, locals_, DEPTH):
        c = start + tl.arange(0, DEPTH)
        c_ok = c < locals_
        norm = norm_of(statistics, local_gamma, local_beta, points + reduced, channels, c, c_ok)
        _, z = normalised(widened(v, place(row, locals_, c), both(row_ok, c_ok)), norm)
        store_output(y, h, z, row, row_ok, is_patch, points + c, c_ok, hidden)
    for start in range(0, REDUCED, DEPTH):
        q = start + tl.arange(0, DEPTH)
        q_ok, ok = q < reduced, both(counted, q < REDUCED)
        norm = norm_of(statistics, reduce_gamma, reduce_beta, points, channels, q, q_ok)
        dz, xhat, _ = norm_grad(dt, REDUCED, 0, u, u_width, points, q, row, ok, norm)
        grad = through_norm(dz, xhat, norm, sums, points, channels, q, q_ok, ok, inverse).to(dtype)
        tl.store(du + place(row, u_width, points + q), grad, mask=both(row_ok, q < REDUCED))
        acc0, acc1 = add_to_pieces(acc0, acc1, grad, reduce, hidden, 1, q, q_ok, hidden, PRECISION)
    dh0 = masked_grad(acc0, dy, h, row, row_ok, is_patch, j0, hidden)
    dh1 = masked_grad(acc1, dy, h, row, row_ok, is_patch, j1, hidden)
    store_pieces(dh, dh0, dh1, row, row_ok, hidden)
    if dn is not None:
        for start in range(0, depth, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            k_ok = k < depth
            some = product(dh, row, row_ok, hidden, down, depth, 1, k, k_ok, ROWS, DEPTH, COLUMNS, PRECISION)
            tl.store(dn + place(row, depth, k), some.to(dtype), mask=both(row_ok, k_ok))


@triton.jit
def over_splits(acc, sums, partials, counter, split, splits, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Leave this program's sums; whether it is the last of a tile, and then the sums of all, in the order of the rows."""
    size: tl.constexpr = LEFT * RIGHT + LEFT
    a = tl.arange(0, LEFT)
    at = a[:, None] * RIGHT + tl.arange(0, RIGHT)[None, :]
    tl.store(partials + split * size + at, acc)
    tl.store(partials + split * size + LEFT * RIGHT + a, sums)
    last = last_to_arrive(counter, splits)
    if last:
        acc *= 0.0
        sums *= 0.0
        for i in range(splits):
            acc += tl.load(partials + i * size + at, cache_modifier=".cg")
            sums += tl.load(partials + i * size + LEFT * RIGHT + a, cache_modifier=".cg")
    return last, acc, sums


@triton.jit
def weight_grads_kernel(
    lefts, rights, weights, biases, heights, widths, alphas, partials, counters, rows, rows_each, splits,
    JOBS: tl.constexpr, BIASES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A (LEFT, RIGHT) tile of alpha left^T right for every job, and for the first BIASES of them of alpha times left's sums.

    Every program sums `rows_each` rows; the last of a tile to arrive adds the partial sums, in the order of the rows.
    """
    tile, job, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    height, width, alpha = pick(heights, job, JOBS), pick(widths, job, JOBS), pick(alphas, job, JOBS)
    tiles = tl.cdiv(width, RIGHT)
    if tile >= tl.cdiv(height, LEFT) * tiles:
        return
    a, b = tile // tiles * LEFT + tl.arange(0, LEFT), tile % tiles * RIGHT + tl.arange(0, RIGHT)
    left, right = pick(lefts, job, JOBS), pick(rights, job, JOBS)
    acc, columns = tl.zeros((LEFT, RIGHT), tl.float32), tl.zeros((LEFT, ROWS), tl.float32)
    end = tl.minimum((split + 1) * rows_each, rows)
    for start in range(split * rows_each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        narrow = tl.load(left + row.to(tl.int64)[None, :] * height + a[:, None], mask=both(a < height, row < end), other=0.0)
        wide = tl.load(right + place(row, width, b), mask=both(row < end, b < width), other=0.0)
        acc = tl.dot(narrow, wide, acc, input_precision=PRECISION)
        columns += narrow.to(tl.float32)
    number = job * tl.num_programs(0) + tile
    partials += number.to(tl.int64) * splits * (LEFT * RIGHT + LEFT)
    last, acc, sums = over_splits(acc, tl.sum(columns, 1), partials, counters + number, split, splits, LEFT, RIGHT)
    if last:
        weight = pick(weights, job, JOBS)
        tl.store(weight + place(a, width, b), (alpha * acc).to(weight.dtype.element_ty), mask=both(a < height, b < width))
        if (job < BIASES) & (tile % tiles == 0):
            bias = pick(biases, job, BIASES)
            tl.store(bias + a, (alpha * sums).to(bias.dtype.element_ty), mask=a < height)


@triton.jit
def local_weight_grad_kernel(
    dv, u, statistics, reduce_gamma, reduce_beta, weight, partials, counters, rows, rows_each, splits, per_sample, height,
    width, points, reduced, locals_,
    REDUCED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As weight_grads_kernel, dK as a (locals, 9 reduced) matrix: dv^T t, where column 9 q + tap of t has its rows shifted."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(9 * reduced, RIGHT)
    a, b = tile // tiles * LEFT + tl.arange(0, LEFT), tile % tiles * RIGHT + tl.arange(0, RIGHT)
    q, tap = b // 9, b % 9
    norm = norm_of(statistics, reduce_gamma, reduce_beta, points, points + reduced + locals_, q, q < reduced)
    acc, sums = tl.zeros((LEFT, RIGHT), tl.float32), tl.zeros((LEFT,), tl.float32)
    end = tl.minimum((split + 1) * rows_each, rows)
    for start in range(split * rows_each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        narrow = tl.load(dv + row.to(tl.int64)[None, :] * locals_ + a[:, None], mask=both(a < locals_, row < end), other=0.0)
        near, ok = neighbour(row[:, None], (row < end)[:, None], tap[None, :], per_sample, height, width)
        ok = ok & (q < reduced)[None, :]
        _, z = normalised(widened(u, near.to(tl.int64) * (points + REDUCED) + points + q[None, :], ok), norm)
        t = tl.where(ok, tl.maximum(z, 0.0), 0.0).to(narrow.dtype)
        acc = tl.dot(narrow, t, acc, input_precision=PRECISION)
    partials += tile.to(tl.int64) * splits * (LEFT * RIGHT + LEFT)
    last, acc, _ = over_splits(acc, sums, partials, counters + tile, split, splits, LEFT, RIGHT)
    if last:
        at = place(a, 9 * reduced, b)
        tl.store(weight + at, acc.to(weight.dtype.element_ty), mask=both(a < locals_, b < 9 * reduced))
