"""Bottleneck adapter in Triton: the kernels.

`forward_kernel` keeps the hidden of its rows on chip between the two products.  The backward is `hidden_grad_kernel`, which goes
from dy to dz and on to dx, and `weight_grad_kernel`, which reads x and dy once for every gradient that is a sum over rows.

Shapes and symbols are those of reference.py; HIDDEN is h padded to a power of two, and every accumulator is float32.  The shared
scale alpha multiplies results in float32, never an operand.  Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import activate, activation_slope, last_to_arrive


@triton.jit
def rows_of(base, row, row_stride, columns, column_stride):
    """Pointers to a (rows, columns) tile of a strided matrix."""
    return base + row.to(tl.int64)[:, None] * row_stride + columns[None, :] * tl.cast(column_stride, tl.int64)


@triton.jit
def across(row_ok, column_ok, EVEN: tl.constexpr):
    """The mask of a tile; where every step is whole, EVEN, that of its rows alone."""
    if EVEN:
        return row_ok[:, None]
    else:
        return row_ok[:, None] & column_ok[None, :]


@triton.jit
def down_from(row_ok, column_ok, EVEN: tl.constexpr):
    """The mask of a tile; where every step is whole, EVEN, that of its columns alone."""
    if EVEN:
        return column_ok[None, :]
    else:
        return row_ok[:, None] & column_ok[None, :]


@triton.jit
def row_statistics(x, row, row_ok, x_row, x_column, depth, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """(mu, rstd) of each row: means and squared deviations of the steps, combined (Chan, Golub, LeVeque 1979)."""
    steps = tl.arange(0, DEPTH)
    mean = tl.zeros((ROWS,), tl.float32)
    deviation = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, DEPTH):
        column = start + steps
        ok = row_ok[:, None] & (column < depth)[None, :]
        values = tl.load(rows_of(x, row, x_row, column, x_column), mask=ok, other=0.0).to(tl.float32)
        count = tl.minimum(depth - start, DEPTH).to(tl.float32)
        step_mean = tl.sum(values, 1) / count
        centred = tl.where(ok, values - step_mean[:, None], 0.0)
        apart = step_mean - mean
        share = count / (start + count)
        mean += apart * share
        deviation += tl.sum(centred * centred, 1) + apart * apart * start * share
    return mean, tl.rsqrt(deviation / depth + eps)


@triton.jit
def shared_factor(scale, factor, SCALE: tl.constexpr):
    """alpha: the number that multiplies every row."""
    if SCALE == "shared":
        factor *= tl.load(scale).to(tl.float32)
    return factor


@triton.jit
def forward_kernel(
    x, down, down_bias, up, up_bias, norm_weight, norm_bias, scale, residual, y, hidden, statistics, rows, depth, width, h,
    x_row, x_column, residual_row, residual_column, factor, eps,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of y; also of z and (mu, rstd) if KEEP."""
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, HIDDEN)
    row_ok, j_ok = row < rows, j < h
    if norm_weight is not None:
        mean, rstd = row_statistics(x, row, row_ok, x_row, x_column, depth, eps, ROWS, DEPTH)
        if KEEP:
            tl.store(statistics + row, mean, mask=row_ok)
            tl.store(statistics + rows.to(tl.int64) + row, rstd, mask=row_ok)
    z = tl.zeros((ROWS, HIDDEN), tl.float32)
    steps = tl.arange(0, DEPTH)
    for start in range(0, depth, DEPTH):
        k = start + steps
        k_ok = k < depth
        values = tl.load(rows_of(x, row, x_row, k, x_column), mask=across(row_ok, k_ok, EVEN_DEPTH), other=0.0)
        if norm_weight is not None:
            values = (values.to(tl.float32) - mean[:, None]) * rstd[:, None]
            values *= tl.load(norm_weight + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
            if norm_bias is not None:
                values += tl.load(norm_bias + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(down + k[:, None] + j[None, :] * depth, mask=down_from(k_ok, j_ok, EVEN_DEPTH), other=0.0)
        z = tl.dot(values.to(dtype), weight.to(dtype), z, input_precision=PRECISION)
    if down_bias is not None:
        z += tl.load(down_bias + j, mask=j_ok, other=0.0).to(tl.float32)[None, :]
    z = z.to(dtype)
    if KEEP:
        tl.store(rows_of(hidden, row, h, j, 1), z, mask=row_ok[:, None] & j_ok[None, :])
    r = activate(z.to(tl.float32), ACTIVATION).to(dtype)
    alpha = shared_factor(scale, factor, SCALE)
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        n_ok = n < width
        weight = tl.load(up + j[:, None] + n[None, :] * h, mask=across(j_ok, n_ok, EVEN_WIDTH), other=0.0)
        out = tl.dot(r, weight.to(dtype), input_precision=PRECISION)
        if up_bias is not None:
            out += tl.load(up_bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        out *= alpha
        if SCALE == "rows":
            out *= tl.load(scale + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        ok = across(row_ok, n_ok, EVEN_WIDTH)
        if residual is not None:
            out += tl.load(rows_of(residual, row, residual_row, n, residual_column), mask=ok, other=0.0).to(tl.float32)
        tl.store(rows_of(y, row, width, n, 1), out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def hidden_grad_kernel(
    dy, down, down_bias, up, up_bias, norm_weight, norm_bias, scale, x, hidden, statistics, dz, dx, dscale, counters, rows, depth,
    width, h, dy_row, dy_column, x_row, x_column, factor, tiles,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dz / alpha and, where there is room for them, of dx and of dscale (summed by nobody yet, if it is shared).

    LayerNorm's means over K need no pass over x: with c = z - d - D beta = (D o gamma) xhat, mean(p) = dz . (D gamma) / K and
    mean(p o xhat) = dz . c / K.  The first program also zeroes the counters of weight_grad_kernel.
    """
    dtype: tl.constexpr = hidden.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, HIDDEN)
    row_ok, j_ok = row < rows, j < h
    if tl.program_id(0) == 0:
        tile = tl.arange(0, TILES)
        tl.store(counters + tile, tl.zeros((TILES,), tl.int32), mask=tile < tiles)
    low = tl.zeros((ROWS, HIDDEN), tl.float32)
    per_row = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        n_ok = n < width
        grad = tl.load(rows_of(dy, row, dy_row, n, dy_column), mask=across(row_ok, n_ok, EVEN_WIDTH), other=0.0)
        weight = tl.load(up + n[:, None] * h + j[None, :], mask=down_from(n_ok, j_ok, EVEN_WIDTH), other=0.0)
        low = tl.dot(grad.to(dtype), weight.to(dtype), low, input_precision=PRECISION)
        if dscale is not None and up_bias is not None:
            bias = tl.load(up_bias + n, mask=n_ok, other=0.0).to(tl.float32)
            per_row += tl.sum(grad.to(tl.float32) * bias[None, :], 1)
    hidden_ok = row_ok[:, None] & j_ok[None, :]
    z = tl.load(rows_of(hidden, row, h, j, 1), mask=hidden_ok, other=0.0).to(tl.float32)
    if dscale is not None:
        per_row = factor * (per_row + tl.sum(low * activate(z, ACTIVATION), 1))
        tl.store(dscale + row, per_row.to(dscale.dtype.element_ty), mask=row_ok)
    low *= activation_slope(z, ACTIVATION)
    if SCALE == "rows":
        low *= tl.load(scale + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    grad_hidden = low.to(dtype)
    if dz is not None:
        tl.store(rows_of(dz, row, h, j, 1), grad_hidden, mask=hidden_ok)
    if dx is not None:
        alpha = shared_factor(scale, factor, SCALE)
        if norm_weight is not None:
            through_weight = tl.zeros((HIDDEN,), tl.float32)
            through_bias = tl.zeros((HIDDEN,), tl.float32)
            for start in range(0, depth, COLUMNS):
                k = start + tl.arange(0, COLUMNS)
                k_ok = k < depth
                weight = tl.load(down + j[:, None] * depth + k[None, :], mask=across(j_ok, k_ok, EVEN_DEPTH), other=0.0)
                gamma = tl.load(norm_weight + k, mask=k_ok, other=0.0).to(tl.float32)
                through_weight += tl.sum(weight.to(tl.float32) * gamma[None, :], 1)
                if norm_bias is not None:
                    beta = tl.load(norm_bias + k, mask=k_ok, other=0.0).to(tl.float32)
                    through_bias += tl.sum(weight.to(tl.float32) * beta[None, :], 1)
            kept = grad_hidden.to(tl.float32)
            # read again rather than kept in registers through the loop
            z = tl.load(rows_of(hidden, row, h, j, 1), mask=hidden_ok, other=0.0).to(tl.float32)
            if down_bias is not None:
                through_bias += tl.load(down_bias + j, mask=j_ok, other=0.0).to(tl.float32)
            mean_p = tl.sum(kept * through_weight[None, :], 1) / depth
            mean_px = tl.sum(kept * (z - through_bias[None, :]), 1) / depth
            mean = tl.load(statistics + row, mask=row_ok, other=0.0)
            rstd = tl.load(statistics + rows.to(tl.int64) + row, mask=row_ok, other=0.0)
        for start in range(0, depth, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            k_ok = k < depth
            weight = tl.load(down + j[:, None] * depth + k[None, :], mask=across(j_ok, k_ok, EVEN_DEPTH), other=0.0)
            grad = tl.dot(grad_hidden, weight.to(dtype), input_precision=PRECISION)
            ok = across(row_ok, k_ok, EVEN_DEPTH)
            if norm_weight is not None:
                values = tl.load(rows_of(x, row, x_row, k, x_column), mask=ok, other=0.0).to(tl.float32)
                xhat = (values - mean[:, None]) * rstd[:, None]
                grad *= tl.load(norm_weight + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
                grad = rstd[:, None] * (grad - mean_p[:, None] - xhat * mean_px[:, None])
            tl.store(rows_of(dx, row, depth, k, 1), (alpha * grad).to(dx.dtype.element_ty), mask=ok)


@triton.jit
def sums_before(
    x, dz, statistics, per_row, norm_weight, start, end, rows, h, x_row, x_column, j, column, column_ok,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over rows start to end: dz^T xhat (dz^T x without LayerNorm), the sum of dz, and of the rows' own gradients of the scale."""
    dtype: tl.constexpr = dz.dtype.element_ty
    product = tl.zeros((HIDDEN, COLUMNS), tl.float32)
    hidden_sum = tl.zeros((HIDDEN,), tl.float32)
    scale_sum = tl.zeros((ROWS,), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        row_ok = row < end
        left = tl.load(dz + row.to(tl.int64)[None, :] * h + j[:, None], mask=row_ok[None, :] & (j < h)[:, None], other=0.0)
        hidden_sum += tl.sum(left.to(tl.float32), 1)
        if x is not None:
            right = tl.load(rows_of(x, row, x_row, column, x_column), mask=row_ok[:, None] & column_ok[None, :], other=0.0)
            if norm_weight is not None:
                mean = tl.load(statistics + row, mask=row_ok, other=0.0)
                rstd = tl.load(statistics + tl.cast(rows, tl.int64) + row, mask=row_ok, other=0.0)
                right = ((right.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(dtype)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        if per_row is not None:
            scale_sum += tl.load(per_row + row, mask=row_ok, other=0.0)
    return product, hidden_sum, tl.sum(scale_sum, 0)


@triton.jit
def sums_after(
    dy, hidden, scale, start, end, h, dy_row, dy_column, j, column, column_ok, ACTIVATION: tl.constexpr, SCALE: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over rows start to end: r^T (g dy) and the sum of g dy."""
    dtype: tl.constexpr = hidden.dtype.element_ty
    product = tl.zeros((HIDDEN, COLUMNS), tl.float32)
    column_sum = tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        row_ok = row < end
        right = tl.load(rows_of(dy, row, dy_row, column, dy_column), mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        z = tl.load(hidden + row.to(tl.int64)[None, :] * h + j[:, None], mask=row_ok[None, :] & (j < h)[:, None], other=0.0)
        left = activate(z.to(tl.float32), ACTIVATION)
        if SCALE == "rows":
            gate = tl.load(scale + row, mask=row_ok, other=0.0).to(tl.float32)
            left *= gate[None, :]
            column_sum += tl.sum(right.to(tl.float32) * gate[:, None], 0)
        else:
            column_sum += tl.sum(right.to(tl.float32), 0)
        product = tl.dot(left.to(dtype), right.to(dtype), product, input_precision=PRECISION)
    return product, column_sum


@triton.jit
def weight_grad_kernel(
    x, dy, dz, hidden, statistics, down, norm_weight, norm_bias, scale, per_row, partials, counters, d_down, d_down_bias, d_up,
    d_up_bias, d_norm_weight, d_norm_bias, d_scale, rows, depth, width, h, x_row, x_column, dy_row, dy_column, rows_each, splits,
    before_tiles, factor,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, SPLIT: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of the gradients that are sums over rows: `before_tiles` tiles of those before the activation, then tiles
    of d_up and d_up_bias.

    Every program sums `rows_each` rows; the last of a tile to arrive adds the partial sums, in the order of the rows.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    j, inside = tl.arange(0, HIDDEN), tl.arange(0, COLUMNS)
    before = tile < before_tiles
    column = tl.where(before, tile, tile - before_tiles) * COLUMNS + inside
    column_ok = column < tl.where(before, depth, width)
    start = split * rows_each
    end = tl.minimum(start + rows_each, rows)
    hidden_sum = tl.zeros((HIDDEN,), tl.float32)
    column_sum = tl.zeros((COLUMNS,), tl.float32)
    scale_sum = 0.0
    if before:
        product, hidden_sum, scale_sum = sums_before(
            x, dz, statistics, per_row, norm_weight, start, end, rows, h, x_row, x_column, j, column, column_ok, HIDDEN, ROWS,
            COLUMNS, PRECISION,
        )  # fmt: skip
    else:
        product, column_sum = sums_after(
            dy, hidden, scale, start, end, h, dy_row, dy_column, j, column, column_ok, ACTIVATION, SCALE, HIDDEN, ROWS, COLUMNS,
            PRECISION,
        )  # fmt: skip
    place = j[:, None] * COLUMNS + inside[None, :]
    if SPLIT:
        size: tl.constexpr = HIDDEN * COLUMNS + HIDDEN + COLUMNS + 16
        first = partials + tile.to(tl.int64) * splits * size
        partial = first + split * size
        tl.store(partial + place, product)
        tl.store(partial + HIDDEN * COLUMNS + j, hidden_sum)
        tl.store(partial + HIDDEN * COLUMNS + HIDDEN + inside, column_sum)
        tl.store(partial + HIDDEN * COLUMNS + HIDDEN + COLUMNS, scale_sum)
        if not last_to_arrive(counters + tile, splits):
            return
        product, hidden_sum, column_sum, scale_sum = product * 0.0, hidden_sum * 0.0, column_sum * 0.0, scale_sum * 0.0
        for i in range(splits):
            partial = first + i * size
            product += tl.load(partial + place, cache_modifier=".cg")
            hidden_sum += tl.load(partial + HIDDEN * COLUMNS + j, cache_modifier=".cg")
            column_sum += tl.load(partial + HIDDEN * COLUMNS + HIDDEN + inside, cache_modifier=".cg")
            scale_sum += tl.load(partial + HIDDEN * COLUMNS + HIDDEN + COLUMNS, cache_modifier=".cg")
    alpha = shared_factor(scale, factor, SCALE)
    product *= alpha
    hidden_sum *= alpha
    ok = (j < h)[:, None] & column_ok[None, :]
    if before:
        at = j[:, None] * depth + column[None, :]
        if norm_weight is not None:
            weight = tl.load(down + at, mask=ok, other=0.0).to(tl.float32)
            if d_norm_weight is not None:
                total = tl.sum(weight * product, 0)
                tl.store(d_norm_weight + column, total.to(d_norm_weight.dtype.element_ty), mask=column_ok)
            if d_norm_bias is not None:
                total = tl.sum(weight * hidden_sum[:, None], 0)
                tl.store(d_norm_bias + column, total.to(d_norm_bias.dtype.element_ty), mask=column_ok)
            product *= tl.load(norm_weight + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
            if norm_bias is not None:
                bias = tl.load(norm_bias + column, mask=column_ok, other=0.0).to(tl.float32)
                product += hidden_sum[:, None] * bias[None, :]
        if d_down is not None:
            tl.store(d_down + at, product.to(d_down.dtype.element_ty), mask=ok)
        if tile == 0:
            if d_down_bias is not None:
                tl.store(d_down_bias + j, hidden_sum.to(d_down_bias.dtype.element_ty), mask=j < h)
            if d_scale is not None:
                tl.store(d_scale, scale_sum.to(d_scale.dtype.element_ty))
    else:
        if d_up is not None:
            tl.store(d_up + column[None, :] * h + j[:, None], product.to(d_up.dtype.element_ty), mask=ok)
        if d_up_bias is not None:
            tl.store(d_up_bias + column, (alpha * column_sum).to(d_up_bias.dtype.element_ty), mask=column_ok)
