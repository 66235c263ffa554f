"""bottleneck_adapter: LayerNorm, down-projection, activation, up-projection, scale and residual as one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import check_dtype, check_input, check_number, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.bottleneck_adapter import reference
from fastadapt.kernels.bottleneck_adapter.reference import ACTIVATIONS, Operands


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a bottleneck adapter in one operation.

        y = scale * (act(LN(x) D^T + d) U^T + u) + residual

    Args:
        x: (..., K); float32, float16, bfloat16 or float64, any strides.
        down_weight: D (h, K), h >= 1; in x's dtype or float32 (under autocast any).
        down_bias: d (h,) in down_weight's dtype, or None.
        up_weight: U (N, h), in down_weight's dtype.
        up_bias: u (N,) in down_weight's dtype, or None.
        norm_weight: LayerNorm's weight (K,), in x's dtype or float32; None for no LayerNorm.
        norm_bias: LayerNorm's bias (K,) in norm_weight's dtype, or None.
        norm_eps: what LayerNorm adds to the variance.
        activation: "relu", "gelu" (exact), "quick_gelu" (z sigmoid(1.702 z)) or "identity".
        scale: a number, a tensor of shape () or one value a row, of x's shape without its last dimension; any floating dtype.
        residual: (..., N), in the dtype the adapter is computed in or float32, or None.
        backend: None to choose (Triton on a GPU, else the reference), "reference" or "triton".

    Returns:
        (..., N) in x's dtype, under autocast in autocast's; in the residual's where there is one.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach every tensor that requires one, and none is computed that is not asked for: an x that requires none costs
    no input gradient, and LayerNorm's affine gradients come out of the weight gradient's product.  x, the hidden z (rows, h) and,
    with LayerNorm, two float32 numbers a row are kept for the backward.  Sums are accumulated in float32 (in float64 for
    float64); a number or shape-() scale multiplies in float32 after the products, where it cannot overflow float16.
    Deterministic: partial sums are added in a fixed order.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1.
    """
    check_input("x", x)
    compute_dtype = autocast_dtype(x)
    x = x if compute_dtype is None else x.to(compute_dtype)
    number = not isinstance(scale, Tensor)
    tensors = Operands(
        x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, None if number else scale, residual
    )
    _check(tensors, compute_dtype is not None)
    check_number("norm_eps", norm_eps)
    if number:
        check_number("scale", scale)
    if activation not in ACTIVATIONS:
        fail("activation", "one of " + ", ".join(ACTIVATIONS), repr(activation))
    chosen = choose("bottleneck_adapter", backend, x, BACKENDS)
    return _operation(tensors, float(scale) if number else 1.0, activation, float(norm_eps), chosen)[0]


BACKENDS = ("reference", "triton")


def _check(call: Operands, autocast: bool) -> None:
    x, device = call.x, call.x.device
    check_tensor("down_weight", call.down_weight, (None, x.shape[-1]), device)
    hidden = call.down_weight.shape[0]
    if hidden == 0:
        fail("down_weight", "a hidden width of at least 1", f"shape {tuple(call.down_weight.shape)}")
    check_tensor("up_weight", call.up_weight, (None, hidden), device)
    width = call.up_weight.shape[0]
    optional = {
        "down_bias": (hidden,),
        "up_bias": (width,),
        "norm_weight": (x.shape[-1],),
        "norm_bias": (x.shape[-1],),
        "residual": (*x.shape[:-1], width),
    }
    for name, shape in optional.items():
        tensor = getattr(call, name)
        if tensor is not None:
            check_tensor(name, tensor, shape, device)
    if call.norm_bias is not None and call.norm_weight is None:
        fail("norm_weight", "a tensor where norm_bias is given", "None")
    if call.scale is not None:
        check_tensor("scale", call.scale, () if call.scale.ndim == 0 else x.shape[:-1], device)
    own = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    if not autocast:
        check_dtype("down_weight", call.down_weight, own)
        check_dtype("norm_weight", call.norm_weight, own)
    for name in ("down_bias", "up_weight", "up_bias"):
        check_dtype(name, getattr(call, name), (call.down_weight.dtype,))
    if call.norm_weight is not None:
        check_dtype("norm_bias", call.norm_bias, (call.norm_weight.dtype,))
    check_dtype("residual", call.residual, own)


def _forward_fake(tensors: Tensors, factor: float, activation: str, norm_eps: float, backend: str) -> list[Tensor]:
    call = Operands(*tensors)
    rows = call.x.shape[:-1].numel()
    dtype = call.x.dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(*call.x.shape[:-1], call.up_weight.shape[0], dtype=dtype)
    hidden = call.x.new_empty(rows, call.down_weight.shape[0])
    statistics = call.x.new_empty(2, rows, dtype=reference.wider(call.x.dtype))
    return [y, hidden] if call.norm_weight is None else [y, hidden, statistics]


def _backward_fake(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], factor: float, activation: str, norm_eps: float, backend: str
) -> list[Tensor]:
    call, need = Operands(*saved[:9]), Operands(*needs)
    own = [torch.empty_like(t, memory_format=torch.contiguous_format) for t, wanted in zip(call[1:], need[1:]) if wanted]
    if not need.x:
        return own
    return [saved[9].new_empty(*grads[0].shape[:-1], call.down_weight.shape[1]), *own]


_operation = Operation(
    name="bottleneck_adapter",
    options_schema="float factor, str activation, float norm_eps, str backend",
    **by_backend(reference, triton="fastadapt.kernels.bottleneck_adapter.triton_launch"),
    forward_fake=_forward_fake,
    primary=lambda count: 1,
    save=reference.save,
    backward_fake=_backward_fake,
    added=lambda *options: (Operands._fields.index("residual"),),
)
