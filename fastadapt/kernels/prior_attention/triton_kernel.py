"""Cross-attention over few keys in Triton: the kernels.

A program holds all keys and values of one head of one sample on chip, so the softmax needs one pass and the backward computes
the probabilities again from q and k alone.  Programs are numbered with heads varying fastest: those that run together read and
write the same lines of memory, of which a head narrower than 64 has only a part.

Symbols are those of reference.py; q, k, v, the gradients and the results share a 16-bit or float32 dtype, scores and sums are
float32.  Masked keys are loaded as zeros, whatever memory holds.  Samples and rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import pick


@triton.jit
def head_of(tensor, batch_stride, b, h, WIDTH: tl.constexpr):
    """Where head h of sample b begins."""
    return tensor + tl.cast(b, tl.int64) * batch_stride + h * WIDTH


@triton.jit
def tile_at(head, rows, row_stride, columns):
    """Pointers to these rows and columns of a head."""
    return head + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]


@triton.jit
def attended(mask, b, mask_batch, mask_key, keys, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Which of KEYS key numbers are keys of sample b that are not masked."""
    key = tl.arange(0, KEYS)
    kept = key < keys
    if MASKED:
        ignored = tl.load(mask + tl.cast(b, tl.int64) * mask_batch + key.to(tl.int64) * mask_key, mask=kept, other=1)
        kept = kept & (ignored == 0)
    return kept


@triton.jit
def powers_and_sums(scores, scale, kept, AXIS: tl.constexpr):
    """exp(scale scores - its maximum) along the keys' AXIS, zeros where not `kept`, and its sums, which keep that axis."""
    scores = tl.where(kept, scores * (scale * 1.4426950408889634), -float("inf"))
    highest = tl.maximum(tl.max(scores, AXIS, keep_dims=True), -3.4e38)  # finite where every key is masked
    powers = tl.exp2(scores - highest)
    # the highest score adds 1, so the bound is felt only where every key is masked
    return powers, tl.maximum(tl.sum(powers, AXIS, keep_dims=True), 1.0)


@triton.jit
def forward_kernel(
    q, k, v, mask, out, q_batch, q_row, k_batch, k_row, v_batch, v_row, mask_batch, mask_key, queries, keys, scale,
    MASKED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = P V for ROWS queries of one head of one sample."""
    tiles = tl.cdiv(queries, ROWS)
    h, b = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS // tiles
    row = tl.program_id(0) // HEADS % tiles * ROWS + tl.arange(0, ROWS)
    key, column = tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    column_ok = (column < WIDTH)[None, :]
    kept = attended(mask, b, mask_batch, mask_key, keys, KEYS, MASKED)
    row_ok, key_ok = (row < queries)[:, None] & column_ok, kept[:, None] & column_ok
    q_tile = tl.load(tile_at(head_of(q, q_batch, b, h, WIDTH), row, q_row, column), mask=row_ok, other=0.0)
    k_tile = tl.load(tile_at(head_of(k, k_batch, b, h, WIDTH), key, k_row, column), mask=key_ok, other=0.0)
    v_tile = tl.load(tile_at(head_of(v, v_batch, b, h, WIDTH), key, v_row, column), mask=key_ok, other=0.0)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    powers, sums = powers_and_sums(scores, scale, kept[None, :], 1)
    acc = tl.dot(powers.to(v_tile.dtype), v_tile, input_precision=PRECISION) / sums
    width = HEADS * WIDTH
    tile = tile_at(head_of(out, tl.cast(queries, tl.int64) * width, b, h, WIDTH), row, width, column)
    tl.store(tile, acc.to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def backward_kernel(
    q, k, v, mask, grad, dq, dk, dv, q_batch, q_row, k_batch, k_row, v_batch, v_row, grad_batch, grad_row, mask_batch,
    mask_key, batch, queries, keys, rows_each, splits, scale,
    MASKED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq for `rows_each` queries of one head of one sample, and their contribution to its dk and dv."""
    h, b = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS // splits
    split = tl.program_id(0) // HEADS % splits
    key, column = tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    column_ok = (column < WIDTH)[None, :]
    kept = attended(mask, b, mask_batch, mask_key, keys, KEYS, MASKED)
    key_ok = kept[:, None] & column_ok
    k_tile = tl.load(tile_at(head_of(k, k_batch, b, h, WIDTH), key, k_row, column), mask=key_ok, other=0.0)
    if NEED_Q or NEED_K:
        v_tile = tl.load(tile_at(head_of(v, v_batch, b, h, WIDTH), key, v_row, column), mask=key_ok, other=0.0)
    width = HEADS * WIDTH
    q_head, grad_head = head_of(q, q_batch, b, h, WIDTH), head_of(grad, grad_batch, b, h, WIDTH)
    if NEED_Q:
        dq_head = head_of(dq, tl.cast(queries, tl.int64) * width, b, h, WIDTH)
    dk_tile, dv_tile = tl.zeros((KEYS, COLUMNS), tl.float32), tl.zeros((KEYS, COLUMNS), tl.float32)
    end = tl.minimum((split + 1) * rows_each, queries)
    for start in range(split * rows_each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        row_ok = (row < end)[:, None] & column_ok
        q_tile = tl.load(tile_at(q_head, row, q_row, column), mask=row_ok, other=0.0)
        grad_tile = tl.load(tile_at(grad_head, row, grad_row, column), mask=row_ok, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        powers, sums = powers_and_sums(scores, scale, kept[:, None], 0)
        weights = powers * (1.0 / sums)
        if NEED_V:
            dv_tile = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv_tile, input_precision=PRECISION)
        if NEED_Q or NEED_K:
            dweights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            dscores = (weights * (dweights - tl.sum(weights * dweights, 0, keep_dims=True))).to(q_tile.dtype)
        if NEED_Q:
            dq_tile = tl.trans(tl.dot(tl.trans(k_tile), dscores, input_precision=PRECISION)) * scale
            tl.store(tile_at(dq_head, row, width, column), dq_tile.to(dq.dtype.element_ty), mask=row_ok)
        if NEED_K:
            dk_tile = tl.dot(dscores, q_tile, dk_tile, input_precision=PRECISION)
    first = head_of(0, tl.cast(keys, tl.int64) * width, split * batch + b, h, WIDTH)
    place = tile_at(first, key, width, column)
    stored = (key < keys)[:, None] & column_ok
    if NEED_K:
        tl.store(dk + place, (dk_tile * scale).to(dk.dtype.element_ty), mask=stored)
    if NEED_V:
        tl.store(dv + place, dv_tile.to(dv.dtype.element_ty), mask=stored)


@triton.jit
def sum_kernel(partials, gradients, size, splits, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Each gradient is the sum of its (splits, size) partial sums, always in the order of the splits."""
    which = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    partial = pick(partials, which, COUNT) + i
    for split in range(splits):
        acc += tl.load(partial + tl.cast(split, tl.int64) * size, mask=i < size, other=0.0)
    gradient = pick(gradients, which, COUNT)
    tl.store(gradient + i, acc.to(gradient.dtype.element_ty), mask=i < size)
