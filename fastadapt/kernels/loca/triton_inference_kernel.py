"""Local convolution adapter in Triton: the forward in eval, where statistics are constants, as one kernel.

Shapes, symbols and layouts are those of triton_kernel.py.  A tile of rows goes through two halves: the first ends with u_R,
which its neighbours in the image need, and h + z1; the second convolves.  A program does the first half of one tile, and then
the second half of every tile whose rows and neighbours it was the last to complete: nothing is computed twice, as a halo would
be, and no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import last_to_arrive
from fastadapt.kernels.loca.triton_kernel import (
    both,
    columns_of_pieces,
    convolution,
    hidden_of,
    norm_of,
    place,
    product,
    store_pieces,
    store_site,
    widened,
)


@triton.jit
def times_columns(x0, x1, weight, c, c_ok, hidden, PRECISION: tl.constexpr):
    """Columns c of x weight^T, for both pieces of x and a weight (channels, hidden)."""
    j0, j1 = columns_of_pieces(x0, x1)
    w0 = tl.load(weight + c[None, :] * hidden + j0[:, None], mask=both(j0 < hidden, c_ok), other=0.0)
    w1 = tl.load(weight + c[None, :] * hidden + j1[:, None], mask=both(j1 < hidden, c_ok), other=0.0)
    return tl.dot(x1, w1, tl.dot(x0, w0, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def add_branch(y, x, statistics, gamma, beta, first, channels, c, c_ok, row, row_ok, is_patch, j, hidden):
    """Columns j of y, which are h's, plus relu(BN(x)) of channels c, folded to a product and a sum; the class token's twice."""
    mean, rstd, gamma, beta = norm_of(statistics, gamma, beta, first, channels, c, c_ok)
    factor = rstd * gamma
    z = x * factor[None, :] + (beta - mean * factor)[None, :]
    ok, at = both(row_ok, c_ok), place(row, hidden, j)
    h = tl.load(y + at, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
    value = tl.where(is_patch[:, None], h + tl.maximum(z, 0.0), 2.0 * h)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def first_half(
    tile, n, down, down_bias, point, reduce, statistics, point_gamma, point_beta, u, y, rows, per_sample, depth, hidden, points,
    reduced,
    FIRST: tl.constexpr, REST: tl.constexpr, REDUCED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of u_R, and of y as far as it is without z2."""
    row = tile * ROWS + tl.arange(0, ROWS)
    row_ok, is_patch = row < rows, row % per_sample > 0
    h0, h1 = hidden_of(n, down, down_bias, row, row_ok, depth, hidden, FIRST, REST, ROWS, DEPTH, PRECISION)
    store_pieces(y, h0, h1, row, row_ok, hidden)
    q = tl.arange(0, REDUCED)
    some = times_columns(h0, h1, reduce, q, q < reduced, hidden, PRECISION)
    tl.store(u + place(row, REDUCED, q), some.to(u.dtype.element_ty), mask=row_ok[:, None])
    for start in range(0, points, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        own = times_columns(h0, h1, point, c, c < points, hidden, PRECISION)
        add_branch(
            y, own, statistics, point_gamma, point_beta, 0, hidden + reduced, c, c < points, row, row_ok, is_patch, c, hidden
        )  # fmt: skip


@triton.jit
def second_half(
    tile, local, statistics, reduce_gamma, reduce_beta, local_gamma, local_beta, up, up_bias, layer_scale, mlp, residual, u, y,
    out, rows, per_sample, height, width, hidden, points, reduced, features, scale,
    REDUCED: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of out."""
    row = tile * ROWS + tl.arange(0, ROWS)
    row_ok, is_patch = row < rows, row % per_sample > 0
    q, c = tl.arange(0, REDUCED), tl.arange(0, LOCAL)
    channels, locals_ = hidden + reduced, hidden - points
    norm = norm_of(statistics, reduce_gamma, reduce_beta, points, channels, q, q < reduced)
    v = convolution(
        u, REDUCED, local, norm, row, row_ok, per_sample, height, width, reduced, locals_, REDUCED, LOCAL, ROWS, PRECISION
    )  # fmt: skip
    add_branch(
        y, v, statistics, local_gamma, local_beta, points + reduced, channels, c, c < locals_, row, row_ok, is_patch,
        points + c, hidden,
    )  # fmt: skip
    tl.debug_barrier()  # other threads read these values below
    for start in range(0, features, WIDE):
        column = start + tl.arange(0, WIDE)
        column_ok = column < features
        acc = product(y, row, row_ok, hidden, up, 1, hidden, column, column_ok, ROWS, DEPTH, WIDE, PRECISION)
        store_site(acc, up_bias, layer_scale, mlp, residual, out, row, row_ok, column, column_ok, features, scale)


@triton.jit
def inference_kernel(
    n, down, down_bias, point, reduce, local, statistics, point_gamma, point_beta, reduce_gamma, reduce_beta, local_gamma,
    local_beta, up, up_bias, layer_scale, mlp, residual, u, y, out, counters, rows, per_sample, height, width, depth, hidden,
    points, reduced, features, scale, reach,
    FIRST: tl.constexpr, REST: tl.constexpr, REDUCED: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out; a row's neighbours are in tiles at most `reach` from its own.  u: (rows, REDUCED); y: (rows, hidden), first h."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    first_half(
        tile, n, down, down_bias, point, reduce, statistics, point_gamma, point_beta, u, y, rows, per_sample, depth, hidden,
        points, reduced, FIRST, REST, REDUCED, ROWS, DEPTH, COLUMNS, PRECISION,
    )  # fmt: skip
    for needing in range(tl.maximum(tile - reach, 0), tl.minimum(tile + reach + 1, tiles)):
        needed = tl.minimum(needing + reach + 1, tiles) - tl.maximum(needing - reach, 0)
        if last_to_arrive(counters + needing, needed):
            second_half(
                needing, local, statistics, reduce_gamma, reduce_beta, local_gamma, local_beta, up, up_bias, layer_scale, mlp,
                residual, u, y, out, rows, per_sample, height, width, hidden, points, reduced, features, scale, REDUCED, LOCAL,
                ROWS, DEPTH, 2 * COLUMNS, PRECISION,
            )  # fmt: skip
