"""LoRA linear in Triton: the kernels.

The base product and the low-rank product read the same tile once: `accumulate` adds src W to one accumulator and mask(src) F to
a narrow one, `low_rank_update` multiplies the narrow one up.  The forward is that with (x, W^T, A^T, B^T) for each member; the
input gradient is that with (dy_g, W_g, B_g, A_g), summed over the members.  What is left of the backward, dA and dB, is one kernel
that reads x and dy once and a reduction of its partial sums in a fixed order.

Shapes and symbols are those of reference.py; x and the outputs share a 16-bit or float32 dtype, every accumulator is float32.
Members come as tuples of pointers and integers.  Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import keep_tile, pick, tile_of


@triton.jit
def accumulate(
    acc, low, src, src_row, src_depth, rows, row_ok, weight, weight_depth, weight_column, columns, column_ok,
    factor, factor_depth, factor_rank, ranks, rank_ok, depth, seed, member, threshold,
    BASE: tl.constexpr, LOW: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + src @ weight if BASE and low + mask(src) @ factor if LOW, over `depth` in steps of DEPTH, in src's dtype."""
    steps = tl.arange(0, DEPTH)
    src_depth = tl.cast(src_depth, tl.int64)
    src_tile = src + rows.to(tl.int64)[:, None] * src_row + steps[None, :] * src_depth
    weight_tile = weight + steps[:, None] * weight_depth + columns[None, :] * weight_column
    factor_tile = factor + steps[:, None] * factor_depth + ranks[None, :] * factor_rank
    for start in range(0, depth, DEPTH):
        if EVEN:
            src_ok, weight_ok, factor_ok = row_ok[:, None], column_ok[None, :], rank_ok[None, :]
        else:
            inside = start + steps < depth
            src_ok = row_ok[:, None] & inside[None, :]
            weight_ok = column_ok[None, :] & inside[:, None]
            factor_ok = rank_ok[None, :] & inside[:, None]
        values = tl.load(src_tile, mask=src_ok, other=0.0)
        if BASE:
            acc = tl.dot(values, tl.load(weight_tile, mask=weight_ok, other=0.0), acc, input_precision=PRECISION)
        if LOW:
            if DROPOUT:
                values = tl.where(keep_tile(seed, rows, start, member, threshold, DEPTH), values, 0.0)
            factors = tl.load(factor_tile, mask=factor_ok, other=0.0).to(values.dtype)
            low = tl.dot(values, factors, low, input_precision=PRECISION)
        src_tile += DEPTH * src_depth
        weight_tile += DEPTH * weight_depth
        factor_tile += DEPTH * factor_depth
    return acc, low


@triton.jit
def low_rank_update(
    acc, low, factor, factor_rank, factor_column, ranks, rank_ok, columns, column_ok, alpha, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + low @ (alpha factor); the scale is folded into the factor in float32, where it cannot overflow float16."""
    tile = factor + ranks[:, None] * factor_rank + columns[None, :] * factor_column
    factors = tl.load(tile, mask=rank_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
    return tl.dot(low, (factors * alpha).to(low.dtype), acc, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    x, seed, weights, biases, downs, ups, products, outputs, widths, ranks, alphas, rows, depth, x_row, x_depth, threshold,
    MEMBERS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, EVEN: tl.constexpr,
    CHUNKS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLUMNS) tile of y_g = x W_g^T + b_g + alpha_g s_g B_g^T; also s_g = mask(x) A_g^T if FUSED, else reads it."""
    seed_bits = tl.load(seed) if DROPOUT else 0
    g = tl.program_id(1)
    width, rank = pick(widths, g, MEMBERS), pick(ranks, g, MEMBERS)
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= row_tiles * column_tiles:
        return
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    row_ok, column_ok = row < rows, column < width
    acc, low = accumulate(
        tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, RANK), tl.float32), x, x_row, x_depth, row, row_ok,
        pick(weights, g, MEMBERS), 1, depth, column, column_ok, pick(downs, g, MEMBERS), 1, depth, r, r < rank, depth,
        seed_bits, g, threshold, True, FUSED, DROPOUT, EVEN, DEPTH, PRECISION,
    )  # fmt: skip
    product = pick(products, g, MEMBERS) + row.to(tl.int64)[:, None] * rank
    if FUSED:
        low = low.to(x.dtype.element_ty)
        if column_tile == 0:
            tl.store(product + r[None, :], low, mask=row_ok[:, None] & (r < rank)[None, :])
    up, alpha = pick(ups, g, MEMBERS), pick(alphas, g, MEMBERS)
    for chunk in tl.static_range(CHUNKS):
        some = chunk * RANK + r
        if not FUSED:
            low = tl.load(product + some[None, :], mask=row_ok[:, None] & (some < rank)[None, :], other=0.0)
        acc = low_rank_update(acc, low, up, 1, rank, some, some < rank, column, column_ok, alpha, PRECISION)
    if BIAS:
        acc += tl.load(pick(biases, g, MEMBERS) + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    output = pick(outputs, g, MEMBERS) + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(output, acc.to(x.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def grad_input_kernel(
    grads, seed, weights, downs, ups, lows, dx, widths, ranks, alphas, rows, depth, grad_rows, grad_columns, threshold,
    MEMBERS: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLUMNS) tile of dx = sum_g dy_g W_g + mask(alpha_g l_g A_g); also l_g = dy_g B_g if FUSED, else reads it."""
    seed_bits = tl.load(seed) if DROPOUT else 0
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(depth, COLUMNS)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    row_ok, column_ok = row < rows, column < depth
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for g in tl.static_range(MEMBERS):
        rank = ranks[g]
        acc, low = accumulate(
            acc, tl.zeros((ROWS, RANK), tl.float32), grads[g], grad_rows[g], grad_columns[g], row, row_ok,
            weights[g], depth, 1, column, column_ok, ups[g], rank, 1, r, r < rank, widths[g], seed_bits, g, threshold,
            True, FUSED, False, EVEN, DEPTH, PRECISION,
        )  # fmt: skip
        product = lows[g] + row.to(tl.int64)[:, None] * rank
        if FUSED:
            low = low.to(dx.dtype.element_ty)
            if column_tile == 0:
                tl.store(product + r[None, :], low, mask=row_ok[:, None] & (r < rank)[None, :])
        target = tl.zeros((ROWS, COLUMNS), tl.float32) if DROPOUT else acc
        for chunk in tl.static_range(CHUNKS):
            some = chunk * RANK + r
            if not FUSED:
                low = tl.load(product + some[None, :], mask=row_ok[:, None] & (some < rank)[None, :], other=0.0)
            target = low_rank_update(
                target, low, downs[g], depth, 1, some, some < rank, column, column_ok, alphas[g], PRECISION
            )  # fmt: skip
        if DROPOUT:
            kept = keep_tile(seed_bits, row, column_tile * COLUMNS, g, threshold, COLUMNS)
            acc += tl.where(kept, target, 0.0)
        else:
            acc = target
    tile = dx + row.to(tl.int64)[:, None] * depth + column[None, :]
    tl.store(tile, acc.to(dx.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def project_kernel(
    sources, seed, factors, products, source_rows, source_depths, factor_depths, factor_ranks, depths, ranks, rows, threshold,
    MEMBERS: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A skinny product, mask(source_g) @ factor_g: s_g = mask(x) A_g^T, or l_g = dy_g B_g.

    Chunks of RANK ranks, then members, vary fastest: programs that run together read the same rows of a shared source.
    """
    seed_bits = tl.load(seed) if DROPOUT else 0
    pid = tl.program_id(0)
    g = pid // CHUNKS % MEMBERS
    rank = pick(ranks, g, MEMBERS)
    row = pid // (CHUNKS * MEMBERS) * ROWS + tl.arange(0, ROWS)
    r = pid % CHUNKS * RANK + tl.arange(0, RANK)
    row_ok, rank_ok = row < rows, r < rank
    factor = pick(factors, g, MEMBERS)
    _, low = accumulate(
        0.0, tl.zeros((ROWS, RANK), tl.float32), pick(sources, g, MEMBERS), pick(source_rows, g, MEMBERS),
        pick(source_depths, g, MEMBERS), row, row_ok, factor, 0, 0, r, rank_ok, factor, pick(factor_depths, g, MEMBERS),
        pick(factor_ranks, g, MEMBERS), r, rank_ok, pick(depths, g, MEMBERS), seed_bits, g, threshold, False, True, DROPOUT,
        EVEN, DEPTH, PRECISION,
    )  # fmt: skip
    product = pick(products, g, MEMBERS)
    tile = product + row.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(tile, low.to(product.dtype.element_ty), mask=row_ok[:, None] & rank_ok[None, :])


@triton.jit
def factor_grads_kernel(
    lefts, rights, seed, partials, widths, ranks, owners, right_rows, right_columns, offsets, total, rows, rows_each, threshold,
    JOBS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums, over `rows_each` rows, of left^T right for every job: dA (left l_g, right mask(x)), then dB (s_g, dy_g).

    The first MASKED jobs are the dA, stored (rank, width); a dB is stored transposed, as lora_b is, (width, rank).
    """
    seed_bits = tl.load(seed) if DROPOUT else 0
    job, split = tl.program_id(1), tl.program_id(2)
    width, rank, owner = pick(widths, job, JOBS), pick(ranks, job, JOBS), pick(owners, job, JOBS)
    column_tiles = tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= column_tiles * tl.cdiv(rank, RANK):
        return
    column0 = tl.program_id(0) % column_tiles * COLUMNS
    column = column0 + tl.arange(0, COLUMNS)
    r = tl.program_id(0) // column_tiles * RANK + tl.arange(0, RANK)
    rank_ok, column_ok = r < rank, column < width
    left = pick(lefts, job, JOBS) + r[:, None]
    right = pick(rights, job, JOBS) + column[None, :] * tl.cast(pick(right_columns, job, JOBS), tl.int64)
    right_row = pick(right_rows, job, JOBS)
    acc = tl.zeros((RANK, COLUMNS), tl.float32)
    end = tl.minimum((split + 1) * rows_each, rows)
    for start in range(split * rows_each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        row_ok = row < end
        far = row.to(tl.int64)
        narrow = tl.load(left + far[None, :] * rank, mask=rank_ok[:, None] & row_ok[None, :], other=0.0)
        wide = tl.load(right + far[:, None] * right_row, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        if DROPOUT:
            kept = keep_tile(seed_bits, row, column0, owner, threshold, COLUMNS) | (job >= MASKED)
            wide = tl.where(kept, wide, 0.0)
        acc = tl.dot(narrow, wide, acc, input_precision=PRECISION)
    is_down = job < MASKED
    place = r[:, None] * tl.where(is_down, width, 1) + column[None, :] * tl.where(is_down, 1, rank)
    partial = partials + split.to(tl.int64) * total + pick(offsets, job, JOBS) + place
    tl.store(partial, acc, mask=rank_ok[:, None] & column_ok[None, :])


@triton.jit
def sum_kernel(
    partials, gradients, sizes, alphas, offsets, total, splits, JOBS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gradient_j = alpha_j times the sum of its partial sums, always in the order of the splits."""
    job = tl.program_id(1)
    size = pick(sizes, job, JOBS)
    if tl.program_id(0) * BLOCK >= size:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    partial = partials + pick(offsets, job, JOBS) + i
    for split in range(splits):
        acc += tl.load(partial + tl.cast(split, tl.int64) * total, mask=i < size, other=0.0)
    gradient = pick(gradients, job, JOBS)
    tl.store(gradient + i, (acc * pick(alphas, job, JOBS)).to(gradient.dtype.element_ty), mask=i < size)


@triton.jit
def merge_kernel(
    weight, down, up, merged, width, depth, rank, alpha,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """merged = weight + alpha up @ down, in float32, rounded once to merged's dtype: a cast that carries the update along."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < width, column < depth
    place = row.to(tl.int64)[:, None] * depth + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        ups = tl.load(up + row[:, None] * rank + r[None, :], mask=row_ok[:, None] & (r < rank)[None, :], other=0.0)
        downs = tl.load(down + r[:, None] * depth + column[None, :], mask=(r < rank)[:, None] & column_ok[None, :], other=0.0)
        update = tl.dot(ups.to(tl.float32), downs.to(tl.float32), update, input_precision="ieee")
    acc = tl.load(weight + place, mask=ok, other=0.0).to(tl.float32) + alpha * update
    tl.store(merged + place, acc.to(merged.dtype.element_ty), mask=ok)
