"""Dropout masks as a pure function of a seed: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The mask of an operation is never stored.  Element (row, column) of member g of a call is kept when

    piece(row, column, g) >= threshold,       threshold = round(p * 65536)

where piece is one of the eight 16-bit numbers of Philox with key = seed and counter = (row, column // 8, g, 0): number
e = column % 8 is the low (e even) or high (e odd) half of the call's 32-bit word e // 2.  Every backend computes this same mask,
so forward, backward, recomputation, compilation and graph replay agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.core import backend

PIECES = 8
_RESOLUTION = 65536
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

native.load()  # now: torch.compile can trace the question whether it is loaded, but not the loading

library = torch.library.Library("fastadapt", "FRAGMENT")
library.define("draw_seed(Tensor slot) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _draw(device: torch.device, count: int = 1) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


library.impl("draw_seed", lambda slot: _draw(slot.device, slot.numel()), "CompositeExplicitAutograd")
torch.library.register_fake("fastadapt::draw_seed", torch.empty_like, lib=library)


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """Draw `count` times 64 random bits from torch's default generator of `device`, as an int64 tensor of shape (count,) on it.

    The draw advances the generator as any random torch function does, so torch.manual_seed, checkpointing's saved random state
    and CUDA graphs' generator offsets all govern the masks.  It stays on the device: no synchronisation.
    """
    if torch.compiler.is_compiling():
        # graph compilers merge equal nodes, random custom ops too, but never torch.empty: the slot keeps every draw its own
        return torch.ops.fastadapt.draw_seed(torch.empty(count, dtype=torch.int64, device=device))
    return _draw(device, count)


def draw_seeds(device: torch.device, count: int) -> list[Tensor]:
    """`count` seeds as `draw_seed` gives them, drawn at once."""
    drawn = draw_seed(device, 2 * count)  # every second one: kernels are compiled for pointers to multiples of 16 bytes
    return list(drawn.view(count, 2)[:, :1].unbind())


def threshold(p: float) -> int:
    """The 16-bit number below which an element is dropped: dropout probability in steps of 2^-16, at most 1 - 2^-16."""
    return min(round(p * _RESOLUTION), _RESOLUTION - 1)


def inv_keep(p: float) -> float:
    """1 / (1 - p) for the probability that `threshold` realises, so that dropout is unbiased."""
    return _RESOLUTION / (_RESOLUTION - threshold(p))


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit random words (as int64 tensors) for each counter: Philox4x32 with ten rounds.

    counter: four int64 tensors (broadcastable) of 32-bit values; key: two 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # the 64-bit products wrap around in int64, which keeps both halves right
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, cols: int, p: float, member: int = 0) -> Tensor:
    """Bool tensor (rows, cols), True where dropout with probability `p` keeps the element.

    seed: int64 (1,), from `draw_seed`; member: which of a group's masks.  Deterministic; equal on every device.
    """
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange(-(-cols // PIECES), device=device).unsqueeze(0)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((row, group, zero + member, zero), (seed & _LOW, (seed >> 32) & _LOW))
    pieces = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return (torch.stack(torch.broadcast_tensors(*pieces), dim=-1) >= threshold(p)).flatten(1)[:, :cols]


def masked(x: Tensor, seed: Tensor, p: float, member: int = 0) -> Tensor:
    """x (rows, cols) with the dropped elements set to zero and the others as they are (not rescaled); differentiable."""
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if x.device.type == "cpu" and not differentiated and native.load():
        return torch.ops.fastadapt_native.masked(x, seed, threshold(p), member)
    if x.device.type in backend.ACCELERATORS and not differentiated and not torch.compiler.is_compiling():
        if not backend.why_not_triton(x.device, x.dtype):
            from fastadapt.core import masked_kernel

            return masked_kernel.masked(x, seed, threshold(p), member)
    return torch.where(keep_mask(seed, *x.shape, p, member), x, 0)
