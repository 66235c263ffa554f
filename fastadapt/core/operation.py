"""The one way an operation becomes differentiable, traceable and cheap to call.

An operation is a pair of functions on lists of tensors, described to PyTorch once:

    fastadapt::NAME(Tensor?[] tensors, OPTIONS) -> Tensor[]
    fastadapt::NAME_backward(Tensor?[] saved, Tensor?[] grads, bool[] needs, OPTIONS) -> Tensor[]

Under torch.compile the call goes through torch.ops, opaque and with a fake; in eager mode it goes through a plain
autograd.Function, which costs the host a third of what the dispatcher does.  Both run the same forward, save the same tensors and
run the same backward.  When the backward itself is differentiated, its plain torch reference runs instead, on any device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastadapt.core.philox import library

Tensors = Sequence["Tensor | None"]


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation: its functions and its registration with torch.library, made when the object is.

    name: the name in torch.ops.fastadapt.
    options_schema: the non-tensor arguments as torch writes them in a schema, such as "float[] scales, str backend".
    forward(tensors, *options) -> outputs.
    forward_fake(tensors, *options) -> outputs of the right shape, dtype and device with no values.
    primary(count) -> how many of `count` outputs are results; the others are intermediate values kept for the backward.
    save(tensors, outputs, needs) -> what the backward reads; needs says for each of `tensors` whether its gradient is wanted, and
        those that `added` names come as None.
    backward(saved, grads, needs, *options) -> the gradients of those tensors that `needs` marks, in order.  The gradient of a
        result is always a tensor; that of an intermediate value is None unless the backward itself is differentiated.
    reference_backward: the same with differentiable torch functions.
    backward_fake(saved, grads, needs, *options) -> like forward_fake.
    added(*options) -> the indices in `tensors` of those that are added to the first result and have its shape: their gradient is
        that result's, which the backward is not asked for.  Autograd itself casts it where the result's dtype is wider.
    """

    name: str
    options_schema: str
    forward: Callable[..., list[Tensor]]
    forward_fake: Callable[..., list[Tensor]]
    primary: Callable[[int], int]
    save: Callable[[Tensors, Sequence[Tensor], Sequence[bool]], Tensors]
    backward: Callable[..., list[Tensor]]
    reference_backward: Callable[..., list[Tensor]]
    backward_fake: Callable[..., list[Tensor]]
    added: Callable[..., Collection[int]] = lambda *options: ()
    _op: Any = field(init=False, default=None)
    _backward_op: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        name = f"fastadapt::{self.name}"
        library.define(f"{self.name}(Tensor?[] tensors, {self.options_schema}) -> Tensor[]")
        library.define(
            f"{self.name}_backward(Tensor?[] saved, Tensor?[] grads, bool[] needs, {self.options_schema}) -> Tensor[]"
        )
        for suffix, function, fake in (
            ("", self.forward, self.forward_fake),
            ("_backward", self.backward, self.backward_fake),
        ):
            library.impl(self.name + suffix, function, "CompositeExplicitAutograd")
            torch.library.register_fake(name + suffix, fake, lib=library)
        # not torch.library.register_autograd: it gives no gradient, silently, to a list of tensors with a None in it
        library.impl(self.name, self._differentiable, "Autograd")
        library.impl(f"{self.name}_backward", self._differentiable_backward, "Autograd")
        object.__setattr__(self, "_op", getattr(torch.ops.fastadapt, self.name))
        object.__setattr__(self, "_backward_op", getattr(torch.ops.fastadapt, f"{self.name}_backward"))

    def __call__(self, tensors: Tensors, *options: Any) -> Sequence[Tensor]:
        """Run the operation, recording for autograd what it needs to."""
        if torch.compiler.is_compiling():
            return self._op(list(tensors), *options)
        if torch.is_grad_enabled():
            return _Differentiable.apply(self, self.forward, self.backward, options, *tensors)
        return self.forward(tensors, *options)

    def keep(self, ctx: Any, tensors: Tensors, options: tuple, outputs: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Put on `ctx` all that `gradients` reads."""
        ctx.set_materialize_grads(False)
        ctx.options, ctx.needs = options, needs
        ctx.results = [(output.shape, output.dtype) for output in outputs[: self.primary(len(outputs))]]
        if added := self.added(*options):
            tensors = [None if i in added else tensor for i, tensor in enumerate(tensors)]
        ctx.save_for_backward(*self.save(tensors, outputs, needs))

    def gradients(self, ctx: Any, backward: Callable[..., list[Tensor]], grads: Tensors) -> Iterator[Tensor | None]:
        """The gradient of every tensor, None where none is wanted."""
        if torch.is_grad_enabled():
            backward = self.reference_backward
        for grad, _ in zip(grads, ctx.results):
            if grad is None:
                grads = materialise(grads, ctx.results)
                break
        added = self.added(*ctx.options)
        computed = [need and i not in added for i, need in enumerate(ctx.needs)]
        wanted = iter(backward(ctx.saved_tensors, grads, computed, *ctx.options) if grads and True in computed else ())
        for need, compute in zip(ctx.needs, computed):
            if need and grads:
                yield next(wanted) if compute else grads[0]
            else:
                yield None

    def _differentiable(self, tensors: list[Tensor | None], *options: Any) -> list[Tensor]:
        """What torch.ops runs where autograd is listening."""
        return list(_Differentiable.apply(self, self._below_autograd, self._backward_op, options, *tensors))

    def _differentiable_backward(self, *args: Any) -> list[Tensor]:
        """What torch.ops runs of the backward where autograd is listening: the reference, if it is to be differentiated."""
        if torch.is_grad_enabled():
            return self.reference_backward(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._backward_op(*args)

    def _below_autograd(self, tensors: Tensors, *options: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return self._op(list(tensors), *options)


def by_backend(reference: ModuleType, **others: str) -> dict[str, Callable[..., list[Tensor]]]:
    """An Operation's forward, backward and reference_backward, which its last option, the backend, chooses.

    reference: the module with forward(tensors, *options) and backward(saved, grads, needs, *options), of the other options;
        it serves the backend "reference".
    others: for every other backend, the full name of a module with the same two, which is imported when it first runs.
    """

    @lru_cache(maxsize=None)
    def module(backend: str) -> ModuleType:
        return reference if backend == "reference" else importlib.import_module(others[backend])

    return {
        "forward": lambda tensors, *options: module(options[-1]).forward(tensors, *options[:-1]),
        "backward": lambda saved, grads, needs, *options: module(options[-1]).backward(saved, grads, needs, *options[:-1]),
        "reference_backward": lambda saved, grads, needs, *options: reference.backward(saved, grads, needs, *options[:-1]),
    }


def materialise(grads: Tensors, results: Sequence[tuple[torch.Size, torch.dtype]]) -> Tensors:
    """`grads` with zeros in place of None for each of the first, the results', of this shape and dtype; empty if all are None."""
    given = next((grad for grad in grads if grad is not None), None)
    if given is None:
        return ()
    zeros = (given.new_zeros(size, dtype=dtype) if g is None else g for g, (size, dtype) in zip(grads, results))
    return (*zeros, *grads[len(results) :])


class _Differentiable(torch.autograd.Function):
    """One call: in eager mode of the plain functions, under torch.compile of the ops that are opaque to it."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, forward: Callable, backward: Callable, options: tuple, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs = forward(tensors, *options)
        ctx.operation, ctx.backward = operation, backward
        operation.keep(ctx, tensors, options, outputs, ctx.needs_input_grad[4:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *ctx.operation.gradients(ctx, ctx.backward, grads))
