"""loca: MaPPER's local convolution adapter, with the sum that it is part of, as one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import check_dtype, check_number, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.loca import reference
from fastadapt.kernels.loca.reference import NAMES, Operands, wider


class ConvNorm(NamedTuple):
    """The tensors of a convolution of c channels and of the batch norm behind it.

    weight and bias are nn.Conv2d's; norm_weight, norm_bias, running_mean and running_var (c,) are nn.BatchNorm2d's, of which
    the last two are None where statistics are the batch's.
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def loca(
    n: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    point: ConvNorm | Sequence[Tensor | None],
    reduce: ConvNorm | Sequence[Tensor | None],
    local: ConvNorm | Sequence[Tensor | None],
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    eps: float = 1e-3,
    layer_scale: Tensor | None = None,
    mlp: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply a local convolution adapter to a class token and a grid of patches, in one operation.

        h    = relu(n W1^T + b1)
        z1   = relu(BN(conv1x1(h_patch; A, a)))
        z2   = relu(BN(conv3x3(relu(BN(conv1x1(h_patch; R, r))); K, k)))
        y    = h + [z1 | z2] for patches, 2 h for the class token
        loca = y W2^T + b2
        out  = residual + layer_scale o (mlp + scale loca),  or loca alone where these three are None

    Args:
        n: (B, 1 + H W, D), the class token before the patches in raster order; in float32, float16, bfloat16 or
            float64, any strides.
        down_weight: W1 (C, D); in n's dtype or float32 (under autocast any).
        down_bias: b1 (C,) in down_weight's dtype, as all that follow.
        point: A (P, C, 1, 1), a and its batch norm's tensors, in the order of ConvNorm; a plain sequence will do.
        reduce: R (Q, C, 1, 1), r and its batch norm's.
        local: K (C - P, Q, 3, 3), k and its batch norm's.  All three have running statistics, of float32 or the weights' dtype,
            or none has; then those of the batch are used, as in training.
        up_weight: W2 (E, C).
        up_bias: b2 (E,).
        grid: (H, W); None for a square.
        eps: what the batch norms add to the variance.
        layer_scale: g (E,), of any floating dtype, which is frozen.
        mlp: (B, 1 + H W, E), in the dtype the adapter is computed in (under autocast any).
        residual: (B, 1 + H W, E), in the dtype the adapter is computed in or float32.
        scale: s, what multiplies loca; 1 without a residual.
        backend: None to choose (Triton on a GPU, else the reference), "reference" or "triton".

    Returns:
        out: (B, 1 + H W, E), in n's dtype (autocast's under autocast), in the residual's where there is one.
        moments: what running statistics move towards, (2, C + Q) in float32 (float64 for float64), without gradient: the mean
            of every channel of point, reduce and local, their biases included, and its unbiased variance over the B H W
            patches; None where running statistics are given.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or a single patch in training; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach n, all parameters, mlp and residual; n's is computed only where it is asked for.  The three biases of the
    convolutions cancel where statistics are the batch's: their gradient is exactly zero then.  n and two numbers a channel are
    kept for the backward, which computes h and the convolutions again.  Sums and batch norms are computed in float32 (in
    float64 for float64).  Deterministic: partial sums are added in a fixed order.

    Liu et al., "MaPPER: Multimodal Prior-guided Parameter Efficient Tuning for Referring Expression Comprehension", EMNLP 2024,
    section 3.3.
    """
    if not isinstance(n, Tensor) or n.ndim != 3:
        fail("n", "a tensor of three dimensions", f"shape {tuple(n.shape)}" if isinstance(n, Tensor) else type(n).__name__)
    check_tensor("n", n, (None, None, None), n.device)
    grid = square(n.shape[1] - 1) if grid is None else grid
    compute_dtype = autocast_dtype(n)
    if compute_dtype is not None:
        n, mlp = n.to(compute_dtype), mlp if mlp is None else mlp.to(compute_dtype)
    stages = [ConvNorm(*stage) for stage in (point, reduce, local)]
    convolutions = [tensor for stage in stages for tensor in stage[:4]]
    running = [tensor for stage in stages for tensor in stage[4:]]
    call = Operands(n, down_weight, down_bias, *convolutions, up_weight, up_bias, *running, layer_scale, mlp, residual)
    _check(call, grid, compute_dtype is not None)
    check_number("eps", eps)
    check_number("scale", scale)
    if residual is None and scale != 1:
        fail("scale", "1 without a residual", scale)
    out, _, *moments = _operation(call, *grid, float(eps), float(scale), choose("loca", backend, n, BACKENDS))
    return out, moments[0].detach() if moments else None


BACKENDS = ("reference", "triton")


def square(patches: int) -> tuple[int, int]:
    """The sides of a square grid of that many patches."""
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        fail("n", "one row for the class token and a square number of rows for the patches, or a grid", f"{patches + 1} rows")
    return side, side


def _check(call: Operands, grid: tuple[int, int], autocast: bool) -> None:
    n, device = call.n, call.n.device
    batch, rows, depth = n.shape
    if not isinstance(grid, tuple) or len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != rows - 1:
        fail("grid", f"(H, W) with H W = {rows - 1}, the patches of n", grid)
    check_tensor("down_weight", call.down_weight, (None, depth), device)
    hidden = call.down_weight.shape[0]
    check_tensor("point.weight", call.point_weight, (None, hidden, 1, 1), device)
    check_tensor("reduce.weight", call.reduce_weight, (None, hidden, 1, 1), device)
    point, reduce = call.point_weight.shape[0], call.reduce_weight.shape[0]
    if not 0 < point < hidden:
        fail("point.weight", f"1 to {hidden - 1} channels of the {hidden} of down_weight", point)
    if reduce == 0:
        fail("reduce.weight", "at least one channel", 0)
    check_tensor("local.weight", call.local_weight, (hidden - point, reduce, 3, 3), device)
    check_tensor("up_weight", call.up_weight, (None, hidden), device)
    width = call.up_weight.shape[0]
    check_tensor("down_bias", call.down_bias, (hidden,), device)
    check_tensor("up_bias", call.up_bias, (width,), device)
    own = (n.dtype, torch.float32) if n.dtype.itemsize == 2 else (n.dtype,)
    if not autocast:
        check_dtype("down_weight", call.down_weight, own)
    for stage, channels in (("point", point), ("reduce", reduce), ("local", hidden - point)):
        check_dtype(f"{stage}.weight", getattr(call, f"{stage}_weight"), (call.down_weight.dtype,))
        for role in ("bias", "norm_weight", "norm_bias"):
            _check_vector(call, stage, role, channels, (call.down_weight.dtype,))
        for role in ("running_mean", "running_var"):
            if call.training and getattr(call, f"{stage}_{role}") is not None:
                fail(f"{stage}.{role}", "None where point.running_mean is None", "a tensor")
            if not call.training:
                _check_vector(call, stage, role, channels, (call.down_weight.dtype, torch.float32))
    for name in ("down_bias", "up_weight", "up_bias"):
        check_dtype(name, getattr(call, name), (call.down_weight.dtype,))
    if call.training and batch * (rows - 1) < 2:
        fail("n", "at least two patches where statistics are the batch's", f"shape {tuple(n.shape)}")
    _check_site(call, (batch, rows, width), own)


def _check_vector(call: Operands, stage: str, role: str, channels: int, dtypes: tuple[torch.dtype, ...]) -> None:
    tensor = getattr(call, f"{stage}_{role}")
    check_tensor(f"{stage}.{role}", tensor, (channels,), call.n.device)
    check_dtype(f"{stage}.{role}", tensor, dtypes)


def _check_site(call: Operands, shape: tuple[int, int, int], own: tuple[torch.dtype, ...]) -> None:
    """layer_scale, mlp and residual, of which all are there or none."""
    if call.layer_scale is None and call.mlp is None and call.residual is None:
        return
    device = call.n.device
    check_tensor("layer_scale", call.layer_scale, shape[2:], device)
    check_tensor("mlp", call.mlp, shape, device)
    check_tensor("residual", call.residual, shape, device)
    check_dtype("mlp", call.mlp, (call.n.dtype,))
    check_dtype("residual", call.residual, own)
    if call.layer_scale.requires_grad and torch.is_grad_enabled():
        fail("layer_scale", "a tensor that requires no gradient", "one that does")


def _forward_fake(tensors: Tensors, height: int, width: int, eps: float, scale: float, backend: str) -> list[Tensor]:
    call = Operands(*tensors)
    dtype = call.n.dtype if call.residual is None else call.residual.dtype
    out = call.n.new_empty(*call.n.shape[:2], call.up_weight.shape[0], dtype=dtype)
    statistics = call.n.new_empty(2, sum(call.channels), dtype=wider(call.n.dtype))
    return [out, statistics, torch.empty_like(statistics)] if call.training else [out, statistics]


def _backward_fake(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], height: int, width: int, eps: float, scale: float, backend: str
) -> list[Tensor]:
    call, need = Operands(*saved[:-1]), Operands(*needs)
    own = call._replace(mlp=call.n.new_empty(grads[0].shape))
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(own, need) if needed]


_operation = Operation(
    name="loca",
    options_schema="int height, int width, float eps, float scale, str backend",
    **by_backend(reference, triton="fastadapt.kernels.loca.triton_launch"),
    forward_fake=_forward_fake,
    primary=lambda count: 1,
    save=reference.save,
    backward_fake=_backward_fake,
    added=lambda *options: (NAMES.index("residual"),),
)
