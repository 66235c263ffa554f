"""Local convolution adapter in Triton: the forward as one kernel, and the one that prepares for it.

Shapes and symbols are those of reference.py.  Rows are those of x, B T of them, in tiles of ROWS.  A tile has two halves:
the first ends with its rows of u, which its neighbours in the image need; the second convolves and projects up.  A program does
the first half of one tile, and then the second half of every tile whose neighbours it was the last to complete: nothing is
computed twice, as a halo would be, and no program waits for another.

HIDDEN is h padded to a power of two, and every accumulator is float32; only operands of products, the two projections' weights
among them, have x's dtype.  Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import activate, last_to_arrive


@triton.jit
def tokens_of(base, row, tokens, batch_stride, token_stride, column):
    """Pointers to these columns of these rows of a tensor (B, T, columns)."""
    start = (row // tokens).to(tl.int64) * batch_stride + (row % tokens).to(tl.int64) * token_stride
    return base + start[:, None] + column[None, :]


@triton.jit
def across(row_ok, column_ok, EVEN: tl.constexpr):
    """The mask of a tile; where every step of columns is whole, EVEN, that of its rows alone."""
    if EVEN:
        return row_ok[:, None]
    else:
        return row_ok[:, None] & column_ok[None, :]


@triton.jit
def prepare_kernel(down, up, narrow_down, narrow_up, counters, down_size, up_size, count, BLOCK: tl.constexpr):
    """What adapter_kernel needs before it starts: `count` counters at zero, and if there is room for them, narrow weights."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counters + i, tl.zeros((BLOCK,), tl.int32), mask=i < count)
    if narrow_down is not None:
        down_ok, up_ok = i < down_size, i < up_size
        tl.store(narrow_down + i, tl.load(down + i, mask=down_ok).to(narrow_down.dtype.element_ty), mask=down_ok)
        tl.store(narrow_up + i, tl.load(up + i, mask=up_ok).to(narrow_up.dtype.element_ty), mask=up_ok)


@triton.jit
def hidden_tile(
    x, down, down_bias, u, tile, rows, tokens, depth, h, x_batch, x_token,
    EVEN_DEPTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's rows of u."""
    dtype: tl.constexpr = x.dtype.element_ty
    row, j = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, HIDDEN)
    row_ok, j_ok = row < rows, j < h
    acc = tl.zeros((ROWS, HIDDEN), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        values = tl.load(
            tokens_of(x, row, tokens, x_batch, x_token, k), mask=across(row_ok, k < depth, EVEN_DEPTH), other=0.0
        )
        weight = tl.load(down + k[:, None] + j[None, :] * depth, mask=(k < depth)[:, None] & j_ok[None, :], other=0.0)
        acc = tl.dot(values, weight, acc, input_precision=PRECISION)
    if down_bias is not None:
        acc += tl.load(down_bias + j, mask=j_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(u + row.to(tl.int64)[:, None] * h + j[None, :], acc.to(dtype), mask=row_ok[:, None] & j_ok[None, :])


@triton.jit
def convolved(
    u, taps, conv_bias, row, row_ok, j, j_ok, tokens, prefix, height, width, h, dilation,
    KH: tl.constexpr, KW: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """These rows of z, in float32; of u for prefix tokens.  taps: (KH, KW, h)."""
    patch = row % tokens - prefix
    is_patch = row_ok & (patch >= 0)
    i, at = patch // width, patch % width
    base = u + row.to(tl.int64)[:, None] * h + j[None, :]
    acc = tl.load(base, mask=(row_ok & (patch < 0))[:, None] & j_ok[None, :], other=0.0).to(tl.float32)
    if conv_bias is not None:
        bias = tl.load(conv_bias + j, mask=j_ok, other=0.0).to(tl.float32)
        acc += tl.where(is_patch[:, None], bias[None, :], 0.0)
    for tap in tl.range(0, KH * KW, loop_unroll_factor=UNROLL):
        down, right = (tap // KW - KH // 2) * dilation, (tap % KW - KW // 2) * dilation
        inside = is_patch & (i + down >= 0) & (i + down < height) & (at + right >= 0) & (at + right < width)
        step = (tl.cast(down, tl.int64) * width + right) * h
        values = tl.load(base + step, mask=inside[:, None] & j_ok[None, :], other=0.0).to(tl.float32)
        acc += values * tl.load(taps + tap * h + j, mask=j_ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def output_tile(
    u, taps, conv_bias, up, up_bias, scale, residual, y, tile, rows, tokens, prefix, height, width, h, features, residual_batch,
    residual_token, dilation, factor,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, EVEN_WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UNROLL: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's rows of y."""
    dtype: tl.constexpr = u.dtype.element_ty
    row, j = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, HIDDEN)
    row_ok, j_ok = row < rows, j < h
    z = convolved(
        u, taps, conv_bias, row, row_ok, j, j_ok, tokens, prefix, height, width, h, dilation, KH, KW, UNROLL
    )  # fmt: skip
    r = activate(z.to(dtype).to(tl.float32), ACTIVATION).to(dtype)
    if SCALE == "shared":
        factor *= tl.load(scale).to(tl.float32)
    for start in range(0, features, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        n_ok = n < features
        weight = tl.load(up + j[:, None] + n[None, :] * h, mask=across(j_ok, n_ok, EVEN_WIDTH), other=0.0)
        out = tl.dot(r, weight, input_precision=PRECISION)
        if up_bias is not None:
            out += tl.load(up_bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        out *= factor
        if SCALE == "rows":
            out *= tl.load(scale + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        ok = across(row_ok, n_ok, EVEN_WIDTH)
        if residual is not None:
            added = tl.load(tokens_of(residual, row, tokens, residual_batch, residual_token, n), mask=ok, other=0.0)
            out += added.to(tl.float32)
        tl.store(y + row.to(tl.int64)[:, None] * features + n[None, :], out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def adapter_kernel(
    x, down, down_bias, taps, conv_bias, up, up_bias, scale, residual, u, y, counters, rows, tokens, prefix, height, width,
    depth, h, features, x_batch, x_token, residual_batch, residual_token, dilation, reach, factor,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_WIDTH: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, UNROLL: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y and u; a row's neighbours are in tiles at most `reach` from its own.  counters: a zero for every tile."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    hidden_tile(
        x, down, down_bias, u, tile, rows, tokens, depth, h, x_batch, x_token, EVEN_DEPTH, HIDDEN, ROWS, DEPTH, PRECISION
    )  # fmt: skip
    for needing in range(tl.maximum(tile - reach, 0), tl.minimum(tile + reach + 1, tiles)):
        needed = tl.minimum(needing + reach + 1, tiles) - tl.maximum(needing - reach, 0)
        if last_to_arrive(counters + needing, needed):
            output_tile(
                u, taps, conv_bias, up, up_bias, scale, residual, y, needing, rows, tokens, prefix, height, width, h, features,
                residual_batch, residual_token, dilation, factor, ACTIVATION, SCALE, EVEN_WIDTH, KH, KW, UNROLL, HIDDEN, ROWS,
                COLUMNS, PRECISION,
            )  # fmt: skip
