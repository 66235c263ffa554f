"""Small kernels to prove the provers on; some are broken on purpose."""

import triton
import triton.language as tl


@triton.jit
def cast(x, y, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < n
    tl.store(y + lanes, tl.load(x + lanes, mask=inside).to(y.dtype.element_ty), mask=inside)


@triton.jit
def cast_rounding(x, y, MODE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y + lanes, tl.load(x + lanes).to(tl.bfloat16, fp_downcast_rounding=MODE))


@triton.jit
def arithmetic(a, b, out, BLOCK: tl.constexpr):
    """Rows of `out`: a + b, a - b, a * b, a * 1.7, -a, |a|, max(a, b), (a < b), where(a < b, a, b)."""
    lanes = tl.arange(0, BLOCK)
    x = tl.load(a + lanes)
    y = tl.load(b + lanes)
    tl.store(out + 0 * BLOCK + lanes, x + y)
    tl.store(out + 1 * BLOCK + lanes, x - y)
    tl.store(out + 2 * BLOCK + lanes, x * y)
    tl.store(out + 3 * BLOCK + lanes, x * 1.7)
    tl.store(out + 4 * BLOCK + lanes, -x)
    tl.store(out + 5 * BLOCK + lanes, tl.abs(x))
    tl.store(out + 6 * BLOCK + lanes, tl.maximum(x, y))
    tl.store(out + 7 * BLOCK + lanes, (x < y).to(tl.bfloat16))
    tl.store(out + 8 * BLOCK + lanes, tl.where(x < y, x, y))


@triton.jit
def fused_multiply_add(a, b, c, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out + lanes, tl.fma(tl.load(a + lanes), tl.load(b + lanes), tl.load(c + lanes)))


@triton.jit
def constant(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.full((BLOCK,), 1.7, tl.bfloat16))


@triton.jit
def sums(x, by_row, by_column, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    block = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(by_row + rows, tl.sum(block, axis=1))
    tl.store(by_column + columns[None, :], tl.sum(block, axis=0, keep_dims=True))
    tl.store(total, tl.sum(block))


@triton.jit
def row_max(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    block = tl.load(x + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out + rows, tl.max(block, axis=1))


@triton.jit
def matmul(x, w, y, M, N, K, x_row, x_col, w_row, y_row, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = x w^T for a row-major w; x has any strides."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        x_mask = (rows[:, None] < M) & (ks[None, :] < K)
        w_mask = (columns[:, None] < N) & (ks[None, :] < K)
        x_tile = tl.load(x + rows[:, None] * x_row + ks[None, :] * x_col, mask=x_mask, other=0.0)
        w_tile = tl.load(w + columns[:, None] * w_row + ks[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile.T, acc)
    y_mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y + rows[:, None] * y_row + columns[None, :], acc.to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def matmul_one_column_too_many(x, w, y, M, N, K, x_row, w_row, y_row, BM: tl.constexpr, BN: tl.constexpr):
    """Broken on purpose: the store's mask says `<=` where it means `<`."""
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    ks = tl.arange(0, 16)
    x_mask = (rows[:, None] < M) & (ks[None, :] < K)
    x_tile = tl.load(x + rows[:, None] * x_row + ks[None, :], mask=x_mask, other=0.0)
    w_mask = (columns[:, None] < N) & (ks[None, :] < K)
    w_tile = tl.load(w + columns[:, None] * w_row + ks[None, :], mask=w_mask, other=0.0)
    y_mask = (rows[:, None] < M) & (columns[None, :] <= N)
    tl.store(y + rows[:, None] * y_row + columns[None, :], tl.dot(x_tile, w_tile.T), mask=y_mask)


@triton.jit
def copy(x, y, load_lanes, store_lanes, shift, BLOCK: tl.constexpr):
    """y[i] = x[i + shift], with one mask for the load and another for the store."""
    lanes = tl.arange(0, BLOCK)
    value = tl.load(x + lanes + shift, mask=lanes < load_lanes, other=0)
    tl.store(y + lanes, value, mask=lanes < store_lanes)


@triton.jit
def copy_2d(x, y, rows, columns, x_row, x_col, BR: tl.constexpr, BC: tl.constexpr):
    """Contiguous y = x (rows, columns), for any strides of x that fit an int64 together with the block's indices."""
    r = tl.arange(0, BR)[:, None]
    c = tl.arange(0, BC)[None, :]
    mask = (r < rows) & (c < columns)
    value = tl.load(x + r.to(tl.int64) * x_row + c * x_col, mask=mask)
    tl.store(y + r * columns + c, value, mask=mask)


@triton.jit
def copy_2d_int32(x, y, rows, columns, x_row, x_col, BR: tl.constexpr, BC: tl.constexpr):
    """Broken on purpose: copy_2d with row offsets in int32."""
    r = tl.arange(0, BR)[:, None]
    c = tl.arange(0, BC)[None, :]
    mask = (r < rows) & (c < columns)
    tl.store(y + r * columns + c, tl.load(x + r * x_row + c * x_col, mask=mask), mask=mask)


@triton.jit
def copy_chosen(sources, bias, y, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """y = sources[WHICH] + bias (or None), over a tuple of tensors."""
    lanes = tl.arange(0, BLOCK)
    value = tl.load(sources[WHICH] + lanes, mask=lanes < n)
    if bias is not None:
        value += tl.load(bias + lanes, mask=lanes < n)
    tl.store(y + lanes, value, mask=lanes < n)


@triton.jit
def count(total, SLOT: tl.constexpr):
    tl.atomic_add(total + SLOT, 1)


@triton.jit
def _shifted_load(x, lanes):
    return tl.load(x + lanes + 1)


@triton.jit
def copy_through_helper(x, y, BLOCK: tl.constexpr):
    """Broken on purpose, inside a device function: reads one element past the end."""
    lanes = tl.arange(0, BLOCK)
    tl.store(y + lanes, _shifted_load(x, lanes))


@triton.jit
def changes_type(x, n):
    """Broken on purpose: the loop turns an integer it carries into a float, which only a compiler notices."""
    total = 0
    for _ in range(n):
        total = total + tl.load(x)
    tl.store(x, total)
