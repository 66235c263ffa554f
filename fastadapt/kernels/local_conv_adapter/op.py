"""local_conv_adapter: a bottleneck adapter with a depthwise convolution between its projections, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import check_dtype, check_input, check_number, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.local_conv_adapter import config, reference
from fastadapt.kernels.local_conv_adapter.config import KERNEL_SIZES
from fastadapt.kernels.local_conv_adapter.reference import ACTIVATIONS, Operands


def local_conv_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 1,
    dilation: int = 1,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a bottleneck adapter whose hidden tokens meet their neighbours in the image, in one operation.

        y = scale * (act(conv(x D^T + d)) U^T + b) + residual

    where conv is a depthwise convolution over the grid, as `fastadapt.local_dwconv` has it, which prefix tokens (CLS,
    registers) go by.

    Args:
        x: (B, p + H W, K), p prefix tokens and the grid in raster order; float32, float16, bfloat16 or float64, any strides.
        down_weight: D (h, K), h >= 1; in x's dtype or float32 (under autocast any).
        down_bias: d (h,) in down_weight's dtype, or None.
        weight: of the convolution, (h, kh, kw), kh and kw each 3, 5 or 7, in down_weight's dtype.  The kernel reads it as
            (kh, kw, h): one that does not lie like this in memory is copied in each call.
        conv_bias: (h,) in down_weight's dtype, or None.
        up_weight: U (N, h), in down_weight's dtype.
        up_bias: b (N,) in down_weight's dtype, or None.
        grid: (H, W), each at least 1.
        prefix_tokens: how many tokens are before the grid.
        dilation: the distance between taps, in tokens along both axes, at least 1.
        activation: "relu", "gelu" (exact), "quick_gelu" (z sigmoid(1.702 z)) or "identity".
        scale: a number, a tensor of shape () or one value a token, (B, p + H W); any floating dtype.
        residual: (B, p + H W, N), in the dtype the adapter is computed in or float32, or None.
        backend: None to choose (Triton on a GPU, else the reference), "reference" or "triton".

    Returns:
        (B, p + H W, N), contiguous, in x's dtype, under autocast in autocast's; in the residual's where there is one.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach every tensor that requires one, by torch's functions on every backend: what trains is better served by
    `fastadapt.LocalConvAdapter`, which runs this operation where `local_conv_adapter_path` says that it pays.  x and the hidden
    before the convolution, (B, p + H W, h), are kept for the backward.  Sums are accumulated in float32 (in float64 for
    float64); the hidden is rounded to the dtype of the call before and behind the convolution.  The forward is deterministic.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1, with the depthwise convolution of
    Howard et al., "MobileNets", 2017, section 3.1, equation 3.
    """
    check_input("x", x)
    compute_dtype = autocast_dtype(x)
    x = x if compute_dtype is None else x.to(compute_dtype)
    number = not isinstance(scale, Tensor)
    tensors = Operands(
        x, down_weight, down_bias, weight, conv_bias, up_weight, up_bias, None if number else scale, residual
    )
    _check_places(grid, dilation, prefix_tokens)
    if activation not in ACTIVATIONS:
        fail("activation", "one of " + ", ".join(ACTIVATIONS), repr(activation))
    _check_tensors(tensors, prefix_tokens + grid[0] * grid[1], compute_dtype is not None)
    if number:
        check_number("scale", scale)
    chosen = choose("local_conv_adapter", backend, x, BACKENDS)
    # at the larger side of the grid every tap but the middle one is outside it, and further out it cannot get
    options = (*grid, prefix_tokens, min(dilation, max(grid)), float(scale) if number else 1.0, activation, chosen)
    return _operation(tensors, *options)[0]


BACKENDS = ("reference", "triton")


def local_conv_adapter_path(
    rows: int,
    in_features: int,
    hidden: int,
    out_features: int,
    *,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    dilation: int,
    gradients: bool,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> str:
    """Say what a forward pass of `LocalConvAdapter` runs: "fused" for `local_conv_adapter`, where it is predicted to be faster,
    or "parts" for the projections and `local_dwconv`, each by itself.

    Args:
        rows: tokens of all samples.
        grid, dilation: as for `local_conv_adapter`; kernel: (kh, kw).
        gradients: whether a gradient of x or of a parameter is wanted.
        dtype: what is computed in: x's, under autocast autocast's.
        backend: as for `local_conv_adapter`.

    Raises:
        ValueError: grid or dilation is not as above.
        BackendError: no such call can run.
    """
    _check_places(grid, dilation)
    if gradients or choose("local_conv_adapter", backend, torch.empty(0, dtype=dtype, device=device), BACKENDS) != "triton":
        return "parts"
    problem = config.problem(rows, in_features, hidden, out_features, grid, kernel, dilation, dtype, device)
    return "fused" if config.pays(problem, gradients) else "parts"


def _check_places(grid: Any, dilation: Any, prefix_tokens: Any = 0) -> None:
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(_is_count(size, 1) for size in grid):
        fail("grid", "a height and a width, integers of at least 1", repr(grid))
    if not _is_count(prefix_tokens, 0):
        fail("prefix_tokens", "an integer of at least 0", repr(prefix_tokens))
    if not _is_count(dilation, 1):
        fail("dilation", "an integer of at least 1", repr(dilation))


def _check_tensors(call: Operands, tokens: int, autocast: bool) -> None:
    x, device = call.x, call.x.device
    check_tensor("x", x, (None, tokens, None), device)
    check_tensor("down_weight", call.down_weight, (None, x.shape[-1]), device)
    hidden = call.down_weight.shape[0]
    if hidden == 0:
        fail("down_weight", "a hidden width of at least 1", f"shape {tuple(call.down_weight.shape)}")
    check_tensor("weight", call.weight, (hidden, None, None), device)
    if any(size not in KERNEL_SIZES for size in call.weight.shape[1:]):
        fail("weight", "a kernel of 3, 5 or 7 by 3, 5 or 7", "one of {} by {}".format(*call.weight.shape[1:]))
    check_tensor("up_weight", call.up_weight, (None, hidden), device)
    width = call.up_weight.shape[0]
    optional = {
        "down_bias": (hidden,),
        "conv_bias": (hidden,),
        "up_bias": (width,),
        "residual": (*x.shape[:-1], width),
    }
    for name, shape in optional.items():
        tensor = getattr(call, name)
        if tensor is not None:
            check_tensor(name, tensor, shape, device)
    if call.scale is not None:
        check_tensor("scale", call.scale, () if call.scale.ndim == 0 else x.shape[:-1], device)
    own = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    if not autocast:
        check_dtype("down_weight", call.down_weight, own)
    for name in ("down_bias", "weight", "conv_bias", "up_weight", "up_bias"):
        check_dtype(name, getattr(call, name), (call.down_weight.dtype,))
    check_dtype("residual", call.residual, own)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _forward_fake(tensors: Tensors, *options: Any) -> list[Tensor]:
    call = Operands(*tensors)
    tokens, dtype = call.x.shape[:2], call.x.dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(*tokens, call.up_weight.shape[0], dtype=dtype)
    return [y, call.x.new_empty(*tokens, call.down_weight.shape[0])]


def _backward_fake(saved: Tensors, grads: Tensors, needs: Sequence[bool], *options: Any) -> list[Tensor]:
    call, need = Operands(*saved[:9]), Operands(*needs)
    found = {name: torch.empty_like(getattr(call, name)) for name, wanted in need._asdict().items() if wanted and name != "x"}
    if need.x:
        found = {"x": saved[9].new_empty(*grads[0].shape[:-1], call.down_weight.shape[1])} | found
    return list(found.values())


_operation = Operation(
    name="local_conv_adapter",
    options_schema="int height, int width, int prefix_tokens, int dilation, float factor, str activation, str backend",
    **by_backend(reference, triton="fastadapt.kernels.local_conv_adapter.triton_launch"),
    forward_fake=_forward_fake,
    primary=lambda count: 1,
    save=reference.save,
    backward_fake=_backward_fake,
    added=lambda *options: (Operands._fields.index("residual"),),
)
