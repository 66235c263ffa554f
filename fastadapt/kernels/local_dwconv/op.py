"""local_dwconv: a depthwise convolution over the grid of an image's tokens, in their own layout, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import check_dtype, check_input, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.local_dwconv import reference
from fastadapt.kernels.local_dwconv.config import KERNEL_SIZES


def local_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 1,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel of an image's tokens with a kernel of its own, in one operation.

        y[b, p + i W + j, c] = bias[c] + sum_uv weight[c, u, v] x[b, p + (i + (u - (kh-1)/2) d) W + j + (v - (kw-1)/2) d, c]

    where p = prefix_tokens and d = dilation, and what lies outside the H x W grid is zero.  The first p tokens (CLS, registers)
    pass through as they are.

    Args:
        x: (B, p + H W, C), the grid in raster order; float32, float16, bfloat16 or float64, any strides.
        weight: (C, kh, kw), kh and kw each 3, 5 or 7; in x's dtype or float32 (under autocast any).  The kernels read it as
            (kh, kw, C): one that does not lie like this in memory, as taps.permute(2, 0, 1) does, is copied in each call.
        bias: (C,) in weight's dtype, or None.
        grid: (H, W), each at least 1.
        prefix_tokens: how many tokens are before the grid.
        dilation: the distance between taps, in tokens along both axes, at least 1.
        backend: None to choose (Triton on a GPU, else the reference), "reference" or "triton".

    Returns:
        y, contiguous, of x's shape and dtype; under autocast in autocast's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach x, weight and bias; none is computed that is not asked for.  x is kept for the backward only where weight
    requires a gradient.  The kernels accumulate in float32 and are deterministic: partial sums are added in a fixed order.

    Depthwise convolution: Howard et al., "MobileNets", 2017, section 3.1, equation 3; dilation: Yu and Koltun, "Multi-Scale
    Context Aggregation by Dilated Convolutions", ICLR 2016, equation 2.
    """
    check_input("x", x)
    compute_dtype = autocast_dtype(x)
    x = x if compute_dtype is None else x.to(compute_dtype)
    _check_places(grid, prefix_tokens, dilation)
    _check_tensors(x, weight, bias, prefix_tokens + grid[0] * grid[1], compute_dtype is not None)
    chosen = choose("local_dwconv", backend, x, BACKENDS)
    # at the larger side of the grid every tap but the middle one is outside it, and further out it cannot get
    return _operation((x, weight, bias), *grid, prefix_tokens, min(dilation, max(grid)), chosen)[0]


BACKENDS = ("reference", "triton")


def _check_places(grid: Any, prefix_tokens: Any, dilation: Any) -> None:
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(_is_count(size, 1) for size in grid):
        fail("grid", "a height and a width, integers of at least 1", repr(grid))
    if not _is_count(prefix_tokens, 0):
        fail("prefix_tokens", "an integer of at least 0", repr(prefix_tokens))
    if not _is_count(dilation, 1):
        fail("dilation", "an integer of at least 1", repr(dilation))


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, autocast: bool) -> None:
    check_tensor("x", x, (None, tokens, None), x.device)
    channels = x.shape[-1]
    if channels == 0:
        fail("x", "at least one channel", f"shape {tuple(x.shape)}")
    check_tensor("weight", weight, (channels, None, None), x.device)
    if any(size not in KERNEL_SIZES for size in weight.shape[1:]):
        fail("weight", "a kernel of 3, 5 or 7 by 3, 5 or 7", "one of {} by {}".format(*weight.shape[1:]))
    if not autocast:
        check_dtype("weight", weight, (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,))
    if bias is not None:
        check_tensor("bias", bias, (channels,), x.device)
        check_dtype("bias", bias, (weight.dtype,))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _forward_fake(tensors: Tensors, *options: Any) -> list[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape)]


def _backward_fake(saved: Tensors, grads: Tensors, needs: Sequence[bool], *options: Any) -> list[Tensor]:
    weight, grad = saved[1], grads[0]
    shapes = (grad.new_empty(grad.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0]))
    return [gradient for gradient, need in zip(shapes, needs) if need]


_operation = Operation(
    name="local_dwconv",
    options_schema="int height, int width, int prefix_tokens, int dilation, str backend",
    **by_backend(reference, triton="fastadapt.kernels.local_dwconv.triton_launch"),
    forward_fake=_forward_fake,
    primary=lambda count: 1,
    save=reference.save,
    backward_fake=_backward_fake,
)
