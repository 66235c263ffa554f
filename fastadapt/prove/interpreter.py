"""Triton's interpreter made a verifier: bfloat16 rounds as on a GPU, and no access leaves the kernel's arguments.

As shipped, the interpreter holds a bfloat16 as the uint16 of its bits, adds and multiplies those integers, truncates
when it casts to bfloat16, and reads or writes wherever a pointer happens to point.  `install` replaces its builder,
executor and reduction by the subclasses below; every kernel interpreted afterwards is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle


def install() -> None:
    """Make every Triton kernel interpreted in this process round bfloat16 as a GPU does and stay inside its arguments.

    Calling it again changes nothing.  A load, store or atomic of an active lane outside every tensor argument (a view
    counts only the elements it has, not the gaps between them) raises IndexError naming the nearest argument.

    Numerics: casts to bfloat16 round to nearest even; + - * and fma widen to float32 and round once; tl.dot accumulates
    exact products in float32; tl.sum rounds every partial sum of a binary tree.

    Raises:
        RuntimeError: if triton.language was imported without TRITON_INTERPRET=1.
    """
    if not isinstance(tl.zeros, interpreter.InterpretedFunction):
        raise RuntimeError("install: expected TRITON_INTERPRET=1 set before triton was first imported; it was not")
    # The builder is one object that already rewritten kernels hold on to, so it changes class instead of identity.
    interpreter.interpreter_builder.__class__ = _Builder
    interpreter.GridExecutor = _Executor
    interpreter.ReduceOps = _Reduce
    interpreter._patch_lang = _patch_lang


# ---------------------------------------------------------------------------------------------------------- bfloat16


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 `values` rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_to_bfloat16(handle.data), tl.bfloat16)


def _rounded_like(operand: TensorHandle, result: TensorHandle) -> TensorHandle:
    """`result`, computed on widened operands, in the type of `operand`; a comparison's booleans stay as they are."""
    return _narrow(result) if _is_bfloat16(operand) and result.data.dtype != np.bool_ else result


class _Builder(InterpreterBuilder):
    """The interpreter's builder with a GPU's bfloat16 and with bounds: `views` are the tensors the kernel was given."""

    views: tuple[_View, ...] = ()

    def get_bf16(self, value: float) -> TensorHandle:
        return self.cast_impl(self.get_fp32(value), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        target = dst_type.scalar
        if target == src.dtype.scalar == tl.bfloat16:
            return src
        if target == tl.bfloat16:
            return _narrow(super().cast_impl(src, tl.float32))
        return super().cast_impl(_widen(src), dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        # Called for a rounding mode given by name, and for float8, which has no numpy type to go through.
        to_nearest = rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        if to_nearest and 8 not in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        return _rounded_like(lhs, super().binary_op(_widen(lhs), _widen(rhs), op))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return _rounded_like(z, super().create_fma(_widen(x), _widen(y), _widen(z)))

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any) -> TensorHandle:
        return super().create_dot(_widen(a), _widen(b), d, *precision)

    def create_masked_load(self, ptrs: TensorHandle, mask: Any, *args: Any, **kwargs: Any) -> TensorHandle:
        self._check("load", ptrs, mask.data)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *args: Any) -> None:
        self._check("store", ptrs, mask.data)
        super().create_masked_store(ptrs, value, mask, *args)

    def create_atomic_rmw(self, op: Any, ptr: TensorHandle, val: Any, mask: Any, *args: Any) -> TensorHandle:
        self._check("atomic", ptr, mask.data)
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def create_atomic_cas(self, ptr: TensorHandle, *args: Any) -> TensorHandle:
        self._check("atomic", ptr, True)
        return super().create_atomic_cas(ptr, *args)

    def _check(self, action: str, ptrs: TensorHandle, mask: Any) -> None:
        """Raise IndexError unless every lane of `ptrs` that `mask` leaves active is inside one of the views."""
        lanes = ptrs.data[np.broadcast_to(np.asarray(mask, dtype=bool), ptrs.data.shape)].astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        outside = lanes
        for view in self.views:
            if not outside.size:
                return
            outside = outside[~view.contains(outside, size)]
        if outside.size:
            address = int(outside[0])
            nearest = min(self.views, key=lambda view: view.distance(address))
            raise IndexError(
                f"{action} in program {self.grid_idx}: {outside.size} of {lanes.size} active lanes are outside every "
                f"tensor argument; the first is {nearest.locate(address)}"
            )


class _Reduce(ReduceOps):
    """Sums a bfloat16 block as a GPU does: pairwise, each partial rounded.  tl.max, tl.cumsum, ... widen themselves."""

    def sum(self, input: tl.tensor) -> tl.tensor:
        if input.dtype != tl.bfloat16:
            return super().sum(input)
        bits = input.handle.data
        axes = tuple(range(bits.ndim)) if self.axis is None else (self.axis,)
        for axis in axes:
            while bits.shape[axis] > 1:
                left, right = (TensorHandle(half, tl.bfloat16) for half in np.split(bits, 2, axis))
                bits = interpreter.interpreter_builder.create_fadd(left, right).data
        return self.to_tensor(bits if self.keep_dims else np.squeeze(bits, axes), tl.bfloat16)


# ------------------------------------------------------------------------------------------------------------ bounds


class _View:
    """The bytes a tensor argument has: runs of `run` bytes, repeated along the `outer` dimensions (stride, size)."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.start = tensor.data_ptr()
        self.outer: list[tuple[int, int]] = []
        extent = self.run = tensor.element_size() if tensor.numel() else 0
        dims = ((stride * extent, size) for stride, size in zip(tensor.stride(), tensor.shape) if stride and size > 1)
        for stride, size in sorted(dims):
            overlaps = stride < extent
            extent += stride * (size - 1)
            if overlaps:  # elements interleave, as sliding windows do: no gaps are worth telling apart
                self.run, self.outer = extent, []
            elif stride == self.run and not self.outer:
                self.run = extent
            else:
                self.outer.insert(0, (stride, size))
        self.end = self.start + extent

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which of the int64 `addresses` begin `size` bytes that all belong to the view."""
        offset = addresses - self.start
        inside = offset >= 0
        for stride, count in self.outer:
            index, offset = np.divmod(offset, stride)
            inside &= index < count
        return inside & (offset + size <= self.run)

    def distance(self, address: int) -> int:
        return max(self.start - address, address - self.end, 0)

    def locate(self, address: int) -> str:
        if address < self.start:
            where = f"{self.start - address} bytes before the start of"
        elif address >= self.end:
            where = f"{address - self.end} bytes past the end of"
        else:
            where = f"at byte {address - self.start}, which is no element, of"
        layout = f"shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()}, {self.tensor.dtype}"
        return f"{where} `{self.name}` ({layout})"


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a kernel argument, with its name: tuples are searched, wrappers and descriptors opened."""
    if isinstance(argument, torch.Tensor):
        yield name, argument
    elif isinstance(argument, (tuple, list)):
        for index, item in enumerate(argument):
            yield from _tensors(f"{name}[{index}]", item)
    elif hasattr(argument, "base"):
        yield from _tensors(name, argument.base)


_interpreters_patch_lang = interpreter._patch_lang
_patched: set[int] = set()


def _patch_lang(function: Any) -> Any:
    """The interpreter's own, but once in a launch for each module: it would look through triton.language again at every call of
    a device function, which takes a third of the time.
    """
    module = id(function.__globals__)
    if module in _patched:
        return None
    _patched.add(module)
    return _interpreters_patch_lang(function)


class _Executor(GridExecutor):
    """Runs a grid, telling the builder which tensors its programs may touch."""

    def _init_args_hst(self, args_dev: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = [*zip(self.arg_names, args), *kwargs.items()]
        interpreter.interpreter_builder.views = tuple(
            _View(name, tensor) for pair in named for name, tensor in _tensors(*pair)
        )
        return args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(*args, **kwargs)
        except InterpreterError as error:
            # The interpreter wraps whatever a kernel raises once per call level; ours is for the caller to see.
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, IndexError):
                raise cause
            raise
        finally:
            _patched.clear()
