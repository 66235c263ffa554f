"""Device functions that the Triton kernels of several operations share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of tile number `pid`, ordered in bands of GROUP rows so that neighbours in time share operands in L2."""
    band = pid // (GROUP * column_tiles)
    first = band * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = pid % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def pick(items, index, COUNT: tl.constexpr):
    """items[index] for a tuple of pointers or integers of one type and an index known at run time only."""
    chosen = items[0]
    for i in tl.static_range(1, COUNT):
        if index == i:
            chosen = items[i]
    return chosen


@triton.jit
def keep_tile(seed, rows, first_column, member, threshold, COLUMNS: tl.constexpr):
    """Dropout's mask (fastadapt.core.philox) of some rows and of COLUMNS columns from `first_column`, a multiple of 8, on.

    seed: the 64-bit seed's value; rows: (ROWS,) row numbers.  Returns bool (ROWS, COLUMNS).  One Philox call serves eight
    neighbouring columns, which the joins below put side by side in one thread's registers.
    """
    counter0 = rows.to(tl.uint32)[:, None] + tl.zeros((1, COLUMNS // 8), tl.uint32)
    counter1 = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :] + tl.zeros_like(counter0)
    zero = tl.zeros_like(counter0)
    w0, w1, w2, w3 = tl.philox(seed, counter0, counter1, zero + member, zero)
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    pieces = tl.reshape(tl.join(low, high), (counter0.shape[0], COLUMNS))
    return pieces >= threshold


@triton.jit
def activate(z, KIND: tl.constexpr):
    """An activation of a float32 tile, by the name it has in the operations' references."""
    if KIND == "relu":
        return tl.maximum(z, 0.0)
    elif KIND == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == "quick_gelu":
        return z * tl.sigmoid(1.702 * z)
    else:
        tl.static_assert(KIND == "identity", "an activation without a name")
        return z


@triton.jit
def activation_slope(z, KIND: tl.constexpr):
    """The derivative of `activate`."""
    if KIND == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif KIND == "quick_gelu":
        gate = tl.sigmoid(1.702 * z)
        return gate * (1.0 + 1.702 * z * (1.0 - gate))
    else:
        tl.static_assert(KIND == "identity", "an activation without a name")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def last_to_arrive(counter, count):
    """Whether this program is the last of `count` that come here; it then sees all that they stored before.

    counter: int32, zero before the first comes.  The order of arrival decides nothing but who goes on, so what the last one adds
    up in a fixed order is deterministic.
    """
    tl.debug_barrier()  # every thread's stores, before one thread announces them
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
