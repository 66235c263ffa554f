"""Light interaction in Triton: the kernels.

Heads may be 8 wide, less than a tensor core takes, so they are not cut out: for head h the words' tensors keep all d columns,
with zeros in those of other heads.  Then q k_h^T sums over h's columns alone, and P_h v_h falls into h's columns alone, where
the heads' results add up side by side.  The words are few, so masking them costs nothing, and a tile of x needs no shuffling.

A program holds ROWS rows of one sample's x and all its words.  Over the words it is complete.  What the words find in x is
found tile by tile and put together by the kernels that finish: forward, from each tile's result and log-sum-exp; backward, as
a sum in a fixed order.  Probabilities are computed where they are used and never stored.

Symbols are those of reference.py; 0 marks the direction x over y, 1 the direction y over x.  Queries carry the factor c.
Softmax and accumulators are float32, operands of products have x's dtype.  Samples and rows are addressed with 64-bit
offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import pick


@triton.jit
def load_rows(tensor, strides, sample, row, ok, WIDTH: tl.constexpr):
    """Rows of one sample of a (B, T, WIDTH) tensor with adjacent columns, zeros where not `ok`."""
    place = sample * strides[0] + row.to(tl.int64)[:, None] * strides[1] + tl.arange(0, WIDTH)[None, :]
    return tl.load(tensor + place, mask=ok[:, None], other=0.0)


@triton.jit
def store_rows(tensor, sample, length, row, ok, values, WIDTH: tl.constexpr):
    """Store rows of one sample of a contiguous (B, length, WIDTH) tensor, in its dtype, where the two-dimensional `ok` is."""
    place = (sample * length + row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(tensor + place, values.to(tensor.dtype.element_ty), mask=ok)


@triton.jit
def project(rows, weight, bias, part, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """rows W^T + b in float32, of part 0, 1, ... of the (WIDTH, WIDTH) matrices stacked in `weight`."""
    column = tl.arange(0, WIDTH)
    turned = tl.load(weight + (part * WIDTH + column)[None, :] * WIDTH + column[:, None]).to(rows.dtype)
    shift = tl.load(bias + part * WIDTH + column).to(tl.float32)
    return tl.dot(rows, turned, input_precision=PRECISION) + shift[None, :]


@triton.jit
def project_back(grads, weight, part, acc, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """acc + grads W, the gradient of `project`'s rows."""
    column = tl.arange(0, WIDTH)
    matrix = tl.load(weight + (part * WIDTH + column)[:, None] * WIDTH + column[None, :]).to(grads.dtype)
    return tl.dot(grads, matrix, acc, input_precision=PRECISION)


@triton.jit
def attended(mask, sample, word, words):
    """Which words x attends to."""
    ok = word < words
    if mask is not None:
        ok = ok & (tl.load(mask + sample * words + word, mask=ok, other=1) == 0)
    return ok


@triton.jit
def columns_of(head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """(1, WIDTH): which columns are the head's."""
    return (tl.arange(0, WIDTH) // (WIDTH // HEADS) == head)[None, :]


@triton.jit
def of_head(words, head, HEADS: tl.constexpr):
    """The words' tensor with zeros in the columns of other heads."""
    return tl.where(columns_of(head, HEADS, words.shape[1]), words, 0.0)


@triton.jit
def softmax(scores, ok):
    """Softmax along the last axis where `ok`; zeros in a row with nothing that is."""
    scores = tl.where(ok, scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), -3.0e38)
    powers = tl.exp(scores - top[:, None])
    # the largest power is 1, so a sum below 1 is that of no word
    return powers / tl.maximum(tl.sum(powers, 1), 1.0)[:, None]


@triton.jit
def over_words(
    x, y, mask, in_weight, in_bias, out_weight, out_bias, result, context, x_strides, y_strides, tokens, words, scale, sample,
    row, row_ok, HEADS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x' = x o A_0(x, y) of a tile of x, and its o_0."""
    word = tl.arange(0, WORDS)
    word_ok = attended(mask, sample, word, words)
    rows = load_rows(x, x_strides, sample, row, row_ok, WIDTH)
    kept = load_rows(y, y_strides, sample, word, word_ok, WIDTH)
    query = (project(rows, in_weight, in_bias, 0, WIDTH, PRECISION) * scale).to(rows.dtype)
    key = project(kept, in_weight, in_bias, 1, WIDTH, PRECISION).to(rows.dtype)
    value = project(kept, in_weight, in_bias, 2, WIDTH, PRECISION).to(rows.dtype)
    found = tl.zeros(rows.shape, tl.float32)
    for head in range(HEADS):
        scores = tl.dot(query, tl.trans(of_head(key, head, HEADS)), input_precision=PRECISION)
        weights = softmax(scores, word_ok[None, :]).to(rows.dtype)
        found = tl.dot(weights, of_head(value, head, HEADS), found, input_precision=PRECISION)
    found = found.to(rows.dtype)
    store_rows(context, sample, tokens, row, row_ok[:, None], found, WIDTH)
    attention = project(found, out_weight, out_bias, 0, WIDTH, PRECISION)
    store_rows(result, sample, tokens, row, row_ok[:, None], rows.to(tl.float32) * attention, WIDTH)


@triton.jit
def over_tile(
    x, y, in_weight, in_bias, contexts, logsums, x_strides, y_strides, words, scale, sample, part, row, row_ok,
    HEADS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_1 of the words over one tile of x alone, and its log-sum-exp: entry `part` of contexts and logsums."""
    word = tl.arange(0, WORDS)
    word_ok = word < words
    rows = load_rows(x, x_strides, sample, row, row_ok, WIDTH)
    query = project(load_rows(y, y_strides, sample, word, word_ok, WIDTH), in_weight, in_bias, 0, WIDTH, PRECISION)
    query = (query * scale).to(rows.dtype)
    key = project(rows, in_weight, in_bias, 1, WIDTH, PRECISION).to(rows.dtype)
    value = project(rows, in_weight, in_bias, 2, WIDTH, PRECISION).to(rows.dtype)
    for head in range(HEADS):
        scores = tl.dot(key, tl.trans(of_head(query, head, HEADS)), input_precision=PRECISION)  # (ROWS, WORDS)
        scores = tl.where(row_ok[:, None], scores, float("-inf"))
        top = tl.max(scores, 0)
        powers = tl.exp(scores - top[None, :])
        total = tl.sum(powers, 0)
        found = tl.dot(tl.trans(powers.to(rows.dtype)), value, input_precision=PRECISION)
        ok = word_ok[:, None] & columns_of(head, HEADS, WIDTH)
        store_rows(contexts, part, words, word, ok, found / total[:, None], WIDTH)
        tl.store(logsums + (part * HEADS + head) * words + word, top + tl.log(total), mask=word_ok)


@triton.jit
def forward_kernel(
    x, y, mask, in_weights, in_biases, out_weight, out_bias, result, context, contexts, logsums, x_strides, y_strides, tokens,
    words, scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of x, one sample, one direction: a tile of x', or what the words find in the tile."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    row_ok = row < tokens
    if tl.program_id(2) == 0:
        over_words(
            x, y, mask, in_weights[0], in_biases[0], out_weight, out_bias, result, context, x_strides, y_strides, tokens, words,
            scale, sample, row, row_ok, HEADS, WORDS, WIDTH, PRECISION,
        )  # fmt: skip
    else:
        over_tile(
            x, y, in_weights[1], in_biases[1], contexts, logsums, x_strides, y_strides, words, scale, sample,
            sample * tl.num_programs(1) + tile, row, row_ok, HEADS, WORDS, WIDTH, PRECISION,
        )  # fmt: skip


@triton.jit
def words_kernel(
    y, out_weight, out_bias, contexts, logsums, result, context, logsum, y_strides, words, tiles,
    HEADS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y' = y o A_1(y, x) of one sample, o_1 and its log-sum-exp, from those of the tiles."""
    sample = tl.program_id(0).to(tl.int64)
    word, column = tl.arange(0, WORDS), tl.arange(0, WIDTH)
    word_ok = word < words
    ok = word_ok[:, None] & (column >= 0)[None, :]
    place = word[:, None] * WIDTH + column[None, :]
    by_head = (column // (WIDTH // HEADS))[None, :] * words + word[:, None]  # a number of (HEADS, words) for every column
    top = tl.full((WORDS, WIDTH), -3.0e38, tl.float32)
    for tile in range(tiles):
        part = sample * tiles + tile
        top = tl.maximum(top, tl.load(logsums + part * HEADS * words + by_head, mask=ok, other=0.0))
    total, found = tl.zeros((WORDS, WIDTH), tl.float32), tl.zeros((WORDS, WIDTH), tl.float32)
    for tile in range(tiles):
        part = sample * tiles + tile
        share = tl.exp(tl.load(logsums + part * HEADS * words + by_head, mask=ok, other=0.0) - top)
        total += share
        found += share * tl.load(contexts + part * words * WIDTH + place, mask=ok, other=0.0)
    total = tl.maximum(total, 1.0)  # as in softmax: less is the sum of no tile
    rows = load_rows(y, y_strides, sample, word, word_ok, WIDTH)
    found = found / total
    store_rows(context, sample, words, word, word_ok[:, None], found, WIDTH)
    first = ok & (column % (WIDTH // HEADS) == 0)[None, :]
    tl.store(logsum + sample * HEADS * words + by_head, top + tl.log(total), mask=first)
    attention = project(found.to(rows.dtype), out_weight, out_bias, 0, WIDTH, PRECISION)
    store_rows(result, sample, words, word, word_ok[:, None], rows.to(tl.float32) * attention, WIDTH)


@triton.jit
def over_image_backward_kernel(
    x, y, in_weight, in_bias, out_weight, context, logsum, dresult, dx, image_grads, word_parts, x_strides, y_strides,
    dresult_strides, tokens, words, scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The words over one tile of x: what they add to its rows of dx, and its share in dq_1, entry 0 of word_parts; for the
    weights' gradients its rows of dk_1 and dv_1, entries 1 and 2 of image_grads."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = tl.num_programs(0).to(tl.int64) * tokens * WIDTH
    row, word = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WORDS)
    row_ok, word_ok = row < tokens, word < words
    source = load_rows(y, y_strides, sample, word, word_ok, WIDTH)
    grad = load_rows(dresult, dresult_strides, sample, word, word_ok, WIDTH)
    dattention = (grad.to(tl.float32) * source.to(tl.float32)).to(source.dtype)
    zeros = tl.zeros(source.shape, tl.float32)
    dcontext = project_back(dattention, out_weight, 0, zeros, WIDTH, PRECISION).to(source.dtype)
    found = load_rows(context, (words * WIDTH, WIDTH), sample, word, word_ok, WIDTH)
    product = dcontext.to(tl.float32) * found
    query = (project(source, in_weight, in_bias, 0, WIDTH, PRECISION) * scale).to(source.dtype)
    rows = load_rows(x, x_strides, sample, row, row_ok, WIDTH)
    key = project(rows, in_weight, in_bias, 1, WIDTH, PRECISION).to(rows.dtype)
    value = project(rows, in_weight, in_bias, 2, WIDTH, PRECISION).to(rows.dtype)
    dkey, dvalue = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32)
    for head in range(HEADS):
        head_query, head_grad = of_head(query, head, HEADS), of_head(dcontext, head, HEADS)
        logs = tl.load(logsum + (sample * HEADS + head) * words + word, mask=word_ok, other=float("inf"))
        scores = tl.dot(key, tl.trans(head_query), input_precision=PRECISION)  # (ROWS, WORDS)
        weights = tl.where(row_ok[:, None], tl.exp(scores - logs[None, :]), 0.0)
        dweights = tl.dot(value, tl.trans(head_grad), input_precision=PRECISION)
        dscores = (weights * (dweights - tl.sum(of_head(product, head, HEADS), 1)[None, :])).to(rows.dtype)
        dkey = tl.dot(dscores, head_query, dkey, input_precision=PRECISION)
        dvalue = tl.dot(weights.to(rows.dtype), head_grad, dvalue, input_precision=PRECISION)
        dquery = tl.dot(tl.trans(dscores), key, input_precision=PRECISION) * scale
        ok = word_ok[:, None] & columns_of(head, HEADS, WIDTH)
        store_rows(word_parts, sample * tl.num_programs(1) + tile, words, word, ok, dquery, WIDTH)
    dkey, dvalue = dkey.to(rows.dtype), dvalue.to(rows.dtype)
    if WEIGHTS:
        store_rows(image_grads + size, sample, tokens, row, row_ok[:, None], dkey, WIDTH)
        store_rows(image_grads + 2 * size, sample, tokens, row, row_ok[:, None], dvalue, WIDTH)
    drows = project_back(dkey, in_weight, 1, tl.zeros(rows.shape, tl.float32), WIDTH, PRECISION)
    drows = project_back(dvalue, in_weight, 2, drows, WIDTH, PRECISION)
    store_rows(dx, sample, tokens, row, row_ok[:, None], drows, WIDTH)


@triton.jit
def over_words_backward_kernel(
    x, y, mask, in_weight, in_bias, out_weight, out_bias, context, dresult, dx, image_grads, word_parts, x_strides, y_strides,
    dresult_strides, tokens, words, scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of x over the words: what it adds to its rows of dx, and its share in dk_0 and dv_0, entries 1 and 2 of
    word_parts; for the weights' gradients its rows of dq_0 and da_0, entries 0 and 3 of image_grads."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = sample * tl.num_programs(1) + tile
    size = tl.num_programs(0).to(tl.int64) * tokens * WIDTH
    parts = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * words * WIDTH
    row, word = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WORDS)
    row_ok, word_ok = row < tokens, attended(mask, sample, word, words)
    target = load_rows(y, y_strides, sample, word, word_ok, WIDTH)
    key = project(target, in_weight, in_bias, 1, WIDTH, PRECISION).to(target.dtype)
    value = project(target, in_weight, in_bias, 2, WIDTH, PRECISION).to(target.dtype)
    rows = load_rows(x, x_strides, sample, row, row_ok, WIDTH)
    query = (project(rows, in_weight, in_bias, 0, WIDTH, PRECISION) * scale).to(rows.dtype)
    grad = load_rows(dresult, dresult_strides, sample, row, row_ok, WIDTH).to(tl.float32)
    dattention = (grad * rows.to(tl.float32)).to(rows.dtype)
    if WEIGHTS:
        store_rows(image_grads + 3 * size, sample, tokens, row, row_ok[:, None], dattention, WIDTH)
    dquery = tl.zeros(rows.shape, tl.float32)
    dcontext = project_back(dattention, out_weight, 0, dquery, WIDTH, PRECISION).to(rows.dtype)
    for head in range(HEADS):
        head_key = of_head(key, head, HEADS)
        weights = softmax(tl.dot(query, tl.trans(head_key), input_precision=PRECISION), word_ok[None, :])
        dweights = tl.dot(dcontext, tl.trans(of_head(value, head, HEADS)), input_precision=PRECISION)
        dscores = (weights * (dweights - tl.sum(weights * dweights, 1)[:, None])).to(rows.dtype)
        dquery = tl.dot(dscores, head_key, dquery, input_precision=PRECISION)
        ok = (word < words)[:, None] & columns_of(head, HEADS, WIDTH)
        dkey = tl.dot(tl.trans(dscores), query, input_precision=PRECISION)
        store_rows(word_parts + parts, part, words, word, ok, dkey, WIDTH)
        dvalue = tl.dot(tl.trans(weights.to(rows.dtype)), dcontext, input_precision=PRECISION)
        store_rows(word_parts + 2 * parts, part, words, word, ok, dvalue, WIDTH)
    dquery = (dquery * scale).to(rows.dtype)
    if WEIGHTS:
        store_rows(image_grads, sample, tokens, row, row_ok[:, None], dquery, WIDTH)
    found = load_rows(context, (tokens * WIDTH, WIDTH), sample, row, row_ok, WIDTH)
    grad = load_rows(dresult, dresult_strides, sample, row, row_ok, WIDTH).to(tl.float32)
    drows = grad * project(found, out_weight, out_bias, 0, WIDTH, PRECISION)
    drows = project_back(dquery, in_weight, 0, drows, WIDTH, PRECISION)
    drows += load_rows(dx, (tokens * WIDTH, WIDTH), sample, row, row_ok, WIDTH).to(tl.float32)
    store_rows(dx, sample, tokens, row, row_ok[:, None], drows, WIDTH)


@triton.jit
def sum_tiles(word_parts, sample, tiles, words, word, ok, WIDTH: tl.constexpr):
    """The sum of the tiles' shares of one sample, always in the same order."""
    total = tl.zeros((word.shape[0], WIDTH), tl.float32)
    for tile in range(tiles):
        total += load_rows(word_parts, (words * WIDTH, WIDTH), sample * tiles + tile, word, ok, WIDTH)
    return total


@triton.jit
def words_backward_kernel(
    y, in_weights, out_weight, out_bias, context, dresult, word_parts, dy, word_grads, y_strides, dresult_strides, words, tiles,
    WORDS: tl.constexpr, WIDTH: tl.constexpr, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy of one sample, from the tiles' shares in dq_1, dk_0 and dv_0; for the weights' gradients their sums, da_1 and o_1."""
    sample = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * words * WIDTH
    word = tl.arange(0, WORDS)
    ok = word < words
    rows = load_rows(y, y_strides, sample, word, ok, WIDTH)
    grad = load_rows(dresult, dresult_strides, sample, word, ok, WIDTH).to(tl.float32)
    found = load_rows(context, (words * WIDTH, WIDTH), sample, word, ok, WIDTH).to(rows.dtype)
    if WEIGHTS:
        store_rows(word_grads + 3 * size, sample, words, word, ok[:, None], grad * rows.to(tl.float32), WIDTH)
        store_rows(word_grads + 4 * size, sample, words, word, ok[:, None], found, WIDTH)
    drows = grad * project(found, out_weight, out_bias, 0, WIDTH, PRECISION)
    for entry in tl.static_range(3):
        total = sum_tiles(word_parts + entry * tiles * size, sample, tiles, words, word, ok, WIDTH).to(rows.dtype)
        if WEIGHTS:
            store_rows(word_grads + entry * size, sample, words, word, ok[:, None], total, WIDTH)
        if entry == 0:
            drows = project_back(total, in_weights[1], 0, drows, WIDTH, PRECISION)
        else:
            drows = project_back(total, in_weights[0], entry, drows, WIDTH, PRECISION)
    store_rows(dy, sample, words, word, ok[:, None], drows, WIDTH)


@triton.jit
def weight_grads_kernel(
    lefts, rights, sample_strides, row_strides, lengths, rows, rows_each, partials,
    JOBS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left^T right and the column sums of left over a run of `rows_each` rows, for every job.

    left: contiguous (rows, WIDTH); right: (B, length, WIDTH) with rows = B * length and adjacent columns.
    """
    job, split = tl.program_id(0), tl.program_id(1)
    left, right = pick(lefts, job, JOBS), pick(rights, job, JOBS)
    sample_stride, row_stride = pick(sample_strides, job, JOBS), pick(row_strides, job, JOBS)
    length, each, column = pick(lengths, job, JOBS), pick(rows_each, job, JOBS), tl.arange(0, WIDTH)
    acc, sums = tl.zeros((WIDTH, WIDTH), tl.float32), tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum((split + 1) * each, pick(rows, job, JOBS))
    for start in range(split * each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        ok = (row < end)[:, None]
        far = row.to(tl.int64)
        grads = tl.load(left + far[:, None] * WIDTH + column[None, :], mask=ok, other=0.0)
        place = (far // length * sample_stride + far % length * row_stride)[:, None] + column[None, :]
        values = tl.load(right + place, mask=ok, other=0.0)
        acc = tl.dot(tl.trans(grads), values, acc, input_precision=PRECISION)
        sums += tl.sum(grads.to(tl.float32), 0)
    partial = partials + (split.to(tl.int64) * JOBS + job) * (WIDTH + 1) * WIDTH
    tl.store(partial + column[:, None] * WIDTH + column[None, :], acc)
    tl.store(partial + WIDTH * WIDTH + column, sums)


@triton.jit
def sum_kernel(
    partials, weights, biases, splits, JOBS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of every job's weight and bias: the sum of its partial sums, always in the same order."""
    job = tl.program_id(1)
    SIZE: tl.constexpr = (WIDTH + 1) * WIDTH
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    place = (split[:, None].to(tl.int64) * JOBS + job) * SIZE + i[None, :]
    ok = (split < splits)[:, None] & (i < SIZE)[None, :]
    total = tl.sum(tl.load(partials + place, mask=ok, other=0.0), 0)
    weight, bias = pick(weights, job, JOBS), pick(biases, job, JOBS)
    is_weight = i < WIDTH * WIDTH
    tl.store(weight + i, total.to(weight.dtype.element_ty), mask=is_weight)
    tl.store(bias + i - WIDTH * WIDTH, total.to(bias.dtype.element_ty), mask=(i < SIZE) & (i >= WIDTH * WIDTH))
