"""Calls of prior_attention as the tests make them, and the plain composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastadapt import prior_attention
from fastadapt.core.launch import interpreting

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
randn = partial(torch.randn, device=DEVICE)

BACKENDS = ("reference", "triton")
EVERYTHING = ("q", "k", "v")


@dataclass(frozen=True)
class Call:
    """Arguments of prior_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    num_heads: int
    mask: Tensor | None = None
    scale: float | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that a gradient can reach, by name."""
        return {name: getattr(self, name) for name in EVERYTHING}

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with q, k and v in this dtype or all tensors on this device; leaves that require what they did."""
        moved = {
            name: tensor.detach().to(target).requires_grad_(tensor.requires_grad) for name, tensor in self.tensors.items()
        }
        mask = self.mask if self.mask is None or isinstance(target, torch.dtype) else self.mask.to(target)
        return replace(self, **moved, mask=mask)

    def with_tensors(self, *tensors: Tensor) -> Call:
        """The same call on other q, k and v."""
        return replace(self, **dict(zip(EVERYTHING, tensors)))

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self


def make(
    batch: int = 2,
    queries: int = 9,
    keys: int = 5,
    num_heads: int = 2,
    head_width: int = 8,
    masked: bool = False,
    dtype: torch.dtype = torch.float64,
    needs: Sequence[str] = EVERYTHING,
) -> Call:
    """A call on random tensors; where keys are masked, every sample has a mask of its own and the last one has no key."""
    q, k, v = (randn(batch, rows, num_heads * head_width).to(dtype) for rows in (queries, keys, keys))
    mask = None
    if masked:
        mask = torch.rand(batch, keys, device=DEVICE) < 0.4
        mask[-1:] = True
    return Call(q, k, v, num_heads, mask).requiring(*needs)


LAYOUTS = {
    "tokens first": lambda randn, rows, width: randn(rows, 3, width).transpose(0, 1),
    "a slice of a packed projection": lambda randn, rows, width: randn(3, rows, 3 * width)[..., width : 2 * width],
    "every other row": lambda randn, rows, width: randn(6, 2 * rows, width)[::2, 1::2],
    "every other column": lambda randn, rows, width: randn(3, rows, 2 * width)[..., ::2],
    "width first": lambda randn, rows, width: randn(3, width, rows).transpose(1, 2),
    "one sample for all": lambda randn, rows, width: randn(1, rows, width).expand(3, rows, width),
}


def laid_out(layout: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random (3, rows, width) in one of LAYOUTS."""
    # not cast afterwards: a cast would lay it out anew
    return LAYOUTS[layout](partial(randn, dtype=dtype), rows, width)


Function = Callable[[Call], Tensor]


def fused(backend: str | None = None) -> Function:
    """The operation."""

    def function(call: Call) -> Tensor:
        options = {"num_heads": call.num_heads, "scale": call.scale, "backend": backend}
        return prior_attention(call.q, call.k, call.v, key_padding_mask=call.mask, **options)

    return function


def composed(call: Call) -> Tensor:
    """softmax(scale q k^T) v for every head; a sample of which every key is masked gives zeros."""
    head_width = call.q.shape[-1] // call.num_heads
    scale = head_width**-0.5 if call.scale is None else call.scale
    heads = []
    for q, k, v in zip(*(tensor.split(head_width, -1) for tensor in call.tensors.values())):
        scores = torch.matmul(scale * q, k.transpose(1, 2))
        if call.mask is None:
            heads.append(torch.matmul(torch.softmax(scores, -1), v))
            continue
        empty = call.mask.all(-1)[:, None, None]
        hidden = call.mask[:, None, :] & ~empty
        heads.append(torch.matmul(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), v).masked_fill(empty, 0.0))
    return torch.cat(heads, -1)


def results(function: Function, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The output, and for `grad` of it the gradient of every tensor that requires one."""
    out = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), few_bits(out) if grad is None else grad)
    return {"out": out.detach()} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)
