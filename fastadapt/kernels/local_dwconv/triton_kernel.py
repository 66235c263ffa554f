"""Depthwise convolution of tokens in Triton: the kernels.

A tile is ROWS rows of the grid, `dilation` apart, by COLUMNS adjacent columns, of CHANNELS channels of one sample: rows that
far apart are neighbours to the convolution, whatever the dilation.  For each column of the kernel, every row that the tile
reaches is loaded once and meets all KH taps in registers, where a row of a tile is a tensor of its own: an output costs
KW (ROWS + KH - 1) / ROWS loads instead of KH KW.

Symbols are those of reference.py.  Sums are float32; tokens are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copies(item, COUNT: tl.constexpr):
    """The tuple of COUNT times this item."""
    items = (item,)
    for _ in tl.static_range(COUNT - 1):
        items += (item,)
    return items


@triton.jit
def tile_at(tile, residues, column_tiles, dilation, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row and the columns of a sample's tile of this number; residues: how many rows differ modulo the dilation."""
    band = tile // column_tiles
    row = band // residues * ROWS * dilation + band % residues
    return row, tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def sample_of(tensor, b, batch_stride, token_stride, prefix):
    """Where sample b begins, behind as many tokens as `prefix`."""
    return tensor + tl.cast(b, tl.int64) * batch_stride + tl.cast(prefix, tl.int64) * token_stride


@triton.jit
def tokens_at(first, token, token_stride, channel):
    """Pointers to these channels of these tokens."""
    return first + token.to(tl.int64)[:, None] * token_stride + channel[None, :]


@triton.jit
def load_row(columns, ok, row, height, row_stride):
    """One row of the grid at these columns, in float32; zeros outside the grid."""
    inside = ok & (row >= 0) & (row < height)
    return tl.load(columns + row.to(tl.int64) * row_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def copy_prefix(x, y, b, x_batch, x_token, y_batch, prefix, channels, channel, channel_ok, COLUMNS: tl.constexpr):
    """These channels of the prefix tokens of sample b."""
    source, target = sample_of(x, b, x_batch, x_token, 0), sample_of(y, b, y_batch, channels, 0)
    for start in range(0, prefix, COLUMNS):
        token = start + tl.arange(0, COLUMNS)
        ok = (token < prefix)[:, None] & channel_ok
        values = tl.load(tokens_at(source, token, x_token, channel), mask=ok)
        tl.store(tokens_at(target, token, channels, channel), values, mask=ok)


@triton.jit
def conv_kernel(
    x, taps, bias, y, x_batch, x_token, height, width, channels, prefix, dilation, residues, tiles, column_tiles, channel_tiles,
    FLIP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of y; with FLIP, of the gradient of x where x is that of y.  The first of a sample copies the prefix tokens.

    taps: (KH, KW, channels), contiguous.
    """
    pid = tl.program_id(0)
    tile, b = pid // channel_tiles % tiles, pid // channel_tiles // tiles
    first, column = tile_at(tile, residues, column_tiles, dilation, ROWS, COLUMNS)
    channel = pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    every_column = tl.zeros((COLUMNS, 1), tl.int32)
    channel_ok = (channel < channels)[None, :] & (every_column == 0)
    y_batch = (tl.cast(height, tl.int64) * width + prefix) * channels
    if tile == 0:  # first, as what it needs would crowd the registers of the loop below
        copy_prefix(x, y, b, x_batch, x_token, y_batch, prefix, channels, channel, channel_ok, COLUMNS)
    grid, row_stride = sample_of(x, b, x_batch, x_token, prefix), tl.cast(width, tl.int64) * x_token
    if bias is None:
        acc = copies(tl.zeros((COLUMNS, CHANNELS), tl.float32), ROWS)
    else:
        acc = copies(tl.load(bias + channel[None, :] + every_column, mask=channel_ok, other=0.0).to(tl.float32), ROWS)
    for v in range(KW):
        shifted = column + (v - KW // 2) * dilation
        columns = tokens_at(grid, shifted, x_token, channel)
        ok = ((shifted >= 0) & (shifted < width))[:, None] & channel_ok
        weights = ()
        for u in tl.static_range(KH):
            tap = (KH - 1 - u) * KW + KW - 1 - v if FLIP else u * KW + v
            weight = tl.load(taps + tap * channels + channel[None, :] + every_column, mask=channel_ok, other=0.0)
            weights += (weight.to(tl.float32),)
        for r in tl.static_range(ROWS + KH - 1):
            values = load_row(columns, ok, first + (r - KH // 2) * dilation, height, row_stride)
            for u in tl.static_range(KH):
                if r >= u and r - u < ROWS:
                    acc = acc[: r - u] + (acc[r - u] + weights[u] * values,) + acc[r - u + 1 :]
    result = tokens_at(sample_of(y, b, y_batch, channels, prefix), column, channels, channel)
    ok = (column < width)[:, None] & channel_ok
    for r in tl.static_range(ROWS):
        row = first + r * dilation
        place = result + row.to(tl.int64) * width * channels
        tl.store(place, acc[r].to(y.dtype.element_ty), mask=ok & (row < height))


@triton.jit
def weight_grad_kernel(
    x, grad, d_weight, d_bias, x_batch, x_token, grad_batch, grad_token, split_stride, u_stride, v_stride, c_stride, height,
    width, channels, prefix, dilation, residues, batch, tiles, column_tiles, tiles_each, groups,
    KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Over `tiles_each` tiles, the sums of dW for GROUP columns of the kernel, and of db with the first of them."""
    group, split = tl.program_id(0) % groups, tl.program_id(1)
    channel = tl.program_id(0) // groups * CHANNELS + tl.arange(0, CHANNELS)
    channel_ok = (channel < channels)[None, :]
    x_row, grad_row = tl.cast(width, tl.int64) * x_token, tl.cast(width, tl.int64) * grad_token
    sums = copies(tl.zeros((COLUMNS, CHANNELS), tl.float32), KH * GROUP)
    bias_sum = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, batch * tiles)):
        first, column = tile_at(tile % tiles, residues, column_tiles, dilation, ROWS, COLUMNS)
        grad_columns = tokens_at(sample_of(grad, tile // tiles, grad_batch, grad_token, prefix), column, grad_token, channel)
        grad_ok = (column < width)[:, None] & channel_ok
        grid = sample_of(x, tile // tiles, x_batch, x_token, prefix)
        grads = ()
        for r in tl.static_range(ROWS + KH - 1):
            if r < ROWS:
                grads += (load_row(grad_columns, grad_ok, first + r * dilation, height, grad_row),)
                if d_bias is not None:
                    bias_sum += grads[r]
            for i in tl.static_range(GROUP):
                shifted = column + (group * GROUP + i - KW // 2) * dilation
                columns = tokens_at(grid, shifted, x_token, channel)
                ok = ((shifted >= 0) & (shifted < width))[:, None] & channel_ok
                values = load_row(columns, ok, first + (r - KH // 2) * dilation, height, x_row)
                for u in tl.static_range(KH):
                    if r >= u and r - u < ROWS:
                        total = sums[i * KH + u] + grads[r - u] * values
                        sums = sums[: i * KH + u] + (total,) + sums[i * KH + u + 1 :]
    start = tl.cast(split, tl.int64) * split_stride
    for i in tl.static_range(GROUP):
        v = group * GROUP + i
        for u in tl.static_range(KH):
            place = d_weight + start + u * u_stride + v * v_stride + channel * c_stride
            summed = tl.sum(sums[i * KH + u], 0)
            tl.store(place, summed.to(d_weight.dtype.element_ty), mask=(channel < channels) & (v < KW))
    if d_bias is not None:
        if group == 0:
            summed = tl.sum(bias_sum, 0)
            tl.store(d_bias + start + channel, summed.to(d_bias.dtype.element_ty), mask=channel < channels)


@triton.jit
def sum_kernel(
    partials, d_weight, d_bias, splits, channels, c_stride, u_stride, v_stride,
    KH: tl.constexpr, KW: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tap of dW, or db behind the taps: the sum of the (splits, taps, channels) partial sums, always in the same order."""
    tap, rows = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_ok = channel < channels
    acc = tl.zeros((SPLITS, CHANNELS), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = partials + (split.to(tl.int64) * rows + tap)[:, None] * channels + channel[None, :]
        acc += tl.load(place, mask=(split < splits)[:, None] & channel_ok[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if tap < KH * KW:
        place = d_weight + tap // KW * u_stride + tap % KW * v_stride + channel * c_stride
        tl.store(place, total.to(d_weight.dtype.element_ty), mask=channel_ok)
    elif d_bias is not None:
        tl.store(d_bias + channel, total.to(d_bias.dtype.element_ty), mask=channel_ok)
