"""What an operation's cases.py holds, and the operations that have one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fastadapt import kernels
from fastadapt.prove.report import Budget

Tensors = dict[str, Tensor]

# dtype of the tensors, autocast's, and torch's float32_matmul_precision
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None, str]] = {
    "bf16": (torch.bfloat16, None, "highest"),
    "fp16": (torch.float16, None, "highest"),
    "fp32": (torch.float32, None, "highest"),
    "tf32": (torch.float32, None, "high"),
    "autocast": (torch.float32, torch.bfloat16, "highest"),
}


class Cases(Protocol):
    """The module fastadapt/kernels/NAME/cases.py: the calls of an operation that are proved, and how to make them.

    BACKENDS are those that the operation has beside the reference.

    A case is a frozen dataclass with a `name`.  SHIPPED are calls that users make: their kernels are compiled for every
    architecture and held to their budgets, and on a GPU they are run too.  EDGES are small calls that end in odd
    places, for the interpreter to run.
    """

    BACKENDS: Sequence[str]
    SHIPPED: Sequence[Any]
    EDGES: Sequence[Any]

    def inputs(self, case: Any, device: torch.device) -> Tensors:
        """The tensors of a call by name, random from torch's generator; those that require gradients get them."""

    def run(self, case: Any, tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        """Outputs and gradients by name, of tensors like those of `inputs` or of float64 copies of them."""

    def masks(self, device: torch.device, backend: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Each dropout mask that the backend applies, seen in its results, with the one that core.philox defines.

        Only an operation with dropout has it.
        """

    def budget(self, case: Any, kernel: str) -> Budget:
        """The bounds on the machine code that the case compiles this kernel to."""


def operations() -> dict[str, Cases]:
    """The cases of every operation, by its name."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]
    return {name: importlib.import_module(f"fastadapt.kernels.{name}.cases") for name in names}


@contextmanager
def computing(precision: str, x: Tensor) -> Iterator[None]:
    """Compute as this key of PRECISIONS says, on x's device."""
    _, autocast, setting = PRECISIONS[precision]
    device = "cuda" if x.is_cuda else "cpu"  # whose autocast meta tensors follow (core.backend)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with torch.autocast(device, autocast) if autocast else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def outputs_and_gradients(outputs: Tensors, inputs: Mapping[str, Tensor]) -> Tensors:
    """`outputs`, and the gradient of each of `inputs` that requires one, by name.

    The gradients of the outputs are random multiples of 1/4, which every dtype holds exactly.
    """
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = [
        (torch.randint(-8, 9, output.shape, device=output.device) / 4).to(output.dtype) for output in outputs.values()
    ]
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), grads)
    values = {name: output.detach() for name, output in outputs.items()}
    return values | {f"grad of {name}": grad for name, grad in zip(wanted, found)}
