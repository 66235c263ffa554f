"""side_fusion: the sum of all side adapters of a frozen tower, and of what it is added to, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import FLOATS, check_dtype, check_input, check_number, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.side_fusion import reference
from fastadapt.kernels.side_fusion.reference import ACTIVATIONS, EACH, Operands, result_dtype


class SideTap(NamedTuple):
    """One side adapter of `side_fusion`, y = LN_out(scale * (act(LN(tap) D^T + d) [U; S]^T + [u, s])).

    tap: (..., K); float32, float16, bfloat16 or float64, any strides.  It requires no gradient: it is a frozen tower's.
    down_weight: D (h, K), h >= 1; in tap's dtype or float32 (under autocast any).
    down_bias: d (h,), or None; in down_weight's dtype, as U, u, S and s.
    up_weight: U (n, h), the adapter's own up-projection, which makes the first n of the N columns, or None.
    up_bias: u (n,), or None.
    shared_weight: S (m, h), which makes the last m columns, or None.  Other adapters, also of another tower, may be given the
        same tensor; nothing else makes it shared.  Without U and S y = LN_out(scale * act(LN(tap) D^T + d)), and h is N.
    shared_bias: s (m,), or None.
    norm_weight: LayerNorm's weight (K,), in tap's dtype or float32 (under autocast any); None for no LayerNorm.
    norm_bias: LayerNorm's bias (K,) in norm_weight's dtype, or None.
    out_norm_weight: LN_out's weight (N,), of any floating dtype and frozen, as it is the tower's; None for no LN_out.
    out_norm_bias: LN_out's bias (N,) in out_norm_weight's dtype, frozen, or None.
    activation: "relu", "gelu" (exact), "quick_gelu" (z sigmoid(1.702 z)) or "identity".
    scale: a number.
    norm_eps, out_norm_eps: what LayerNorm and LN_out add to the variance.
    """

    tap: Tensor
    down_weight: Tensor
    down_bias: Tensor | None = None
    up_weight: Tensor | None = None
    up_bias: Tensor | None = None
    shared_weight: Tensor | None = None
    shared_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    out_norm_weight: Tensor | None = None
    out_norm_bias: Tensor | None = None
    activation: str = "relu"
    scale: float = 1.0
    norm_eps: float = 1e-5
    out_norm_eps: float = 1e-5


def side_fusion(adapters: Sequence[SideTap], bases: Sequence[Tensor] = (), *, backend: str | None = None) -> Tensor:
    """Sum the side adapters of a frozen tower in one operation.

        out = sum_b base_b + sum_i LN_out,i(scale_i * (act_i(LN_i(tap_i) D_i^T + d_i) [U_i; S_i]^T + [u_i, s_i]))

    Args:
        adapters: at least one SideTap.  Their taps have the same leading shape and the same dtype (under autocast any), and
            their results the same width N; K, h and what is left out may differ.
        bases: (..., N) each, what the sum is added to; in the taps' dtype (under autocast autocast's) or float32.
        backend: None to choose, "reference", "native" (C++ on a CPU), "triton" or "cuda" (CUDA C++).

    Returns:
        (..., N) in the taps' dtype, under autocast in autocast's; in the widest base's where there are bases.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, a tap or an LN_out that requires a gradient; the
            message names it, as in adapters[2].down_weight.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    What runs where `backend` is None, which is no fallback but a table: on a CPU the C++ where it is built, else the reference;
    on a GPU "cuda" where its library is loaded and its kernels take this call, else "triton", else, with a warning, the
    reference.

    Gradients reach the adapters' tensors but for the taps and LN_out's, and the bases, whose gradient is out's own, not a copy;
    none is computed that is not asked for.  Only taps and parameters are kept for the backward, which computes the rest again.
    Sums are accumulated in float32 (in float64 for float64), those over adapters and bases included, and rounded once; a
    parameter's gradient has its dtype.  Deterministic: partial sums are added in a fixed order.

    Liu et al., "M2IST: Multi-Modal Interactive Side-Tuning for Efficient Referring Expression Comprehension", 2024.
    """
    if len(adapters) == 0:
        fail("adapters", "at least one SideTap", "none")
    adapters = [SideTap(*adapter) for adapter in adapters]
    for i, adapter in enumerate(adapters):
        check_input(f"adapters[{i}].tap", adapter.tap)
    compute_dtype = autocast_dtype(adapters[0].tap)
    if compute_dtype is not None:
        adapters = [adapter._replace(tap=adapter.tap.to(compute_dtype)) for adapter in adapters]
    for i, adapter in enumerate(adapters):
        if not _plain(adapter):
            _check_adapter(f"adapters[{i}].", adapter, compute_dtype is not None)
    _check_together(adapters, bases)
    tensors = [*bases, *(tensor for adapter in adapters for tensor in adapter[:EACH])]
    options = list(zip(*((a.activation, float(a.scale), float(a.norm_eps), float(a.out_norm_eps)) for a in adapters)))
    return _operation(tensors, len(bases), *map(list, options), _choose(tensors, len(bases), backend))[0]


BACKENDS = ("reference", "native", "triton", "cuda")


def _choose(tensors: Tensors, base_count: int, requested: str | None) -> str:
    """The backend for a call; what its CUDA kernels do not take is asked only where they could run."""
    tap, reasons = tensors[base_count], ()
    if requested == "cuda" or (requested is None and tap.device.type == "cuda" and native.status().cuda):
        from fastadapt.kernels.side_fusion import cuda_kernel

        reasons = cuda_kernel.why_not(tensors, base_count)
    return choose("side_fusion", requested, tap, BACKENDS, cuda_reasons=reasons)


def _plain(call: SideTap) -> bool:
    """Whether an adapter is good in the commonest way; `_check_adapter` costs the host several times as much."""
    try:
        tap, down, down_bias, up, up_bias, shared, shared_bias, gamma, beta, out_gamma, out_beta, *numbers = call
        (hidden, depth), dtype, device = down.shape, down.dtype, down.device
        own, others = (0 if weight is None else weight.shape[0] for weight in (up, shared))
        width, out_dtype = own + others or hidden, dtype if out_gamma is None else out_gamma.dtype
        frozen = not any([t is not None and t.requires_grad for t in (tap, out_gamma, out_beta)])
        return (
            frozen
            and tap.shape[-1] == depth > 0 < hidden
            and tap.device == device
            and out_dtype in FLOATS
            and (dtype is tap.dtype or (dtype is torch.float32 and tap.dtype.itemsize == 2))
            and (up is None) is (own == 0)
            and (shared is None) is (others == 0)
            and all([weight is not None or bias is None for weight, bias in zip(call[3:EACH:2], call[4:EACH:2])])
            and all(
                [
                    t is None or (t.shape == shape and t.device == device and t.dtype is like)
                    for t, shape, like in (
                        (down_bias, (hidden,), dtype),
                        (up, (own, hidden), dtype),
                        (up_bias, (own,), dtype),
                        (shared, (others, hidden), dtype),
                        (shared_bias, (others,), dtype),
                        (gamma, (depth,), dtype),
                        (beta, (depth,), dtype),
                        (out_gamma, (width,), out_dtype),
                        (out_beta, (width,), out_dtype),
                    )
                ]
            )
            and call.activation in ACTIVATIONS
            and all([type(number) is float and -inf < number < inf for number in numbers[1:]])
        )
    except (AttributeError, ValueError, TypeError, IndexError):
        return False


def _check_adapter(name: str, call: SideTap, autocast: bool) -> None:
    device, depth = call.tap.device, call.tap.shape[-1]
    if depth == 0:
        fail(f"{name}tap", "at least one column", f"shape {tuple(call.tap.shape)}")
    check_tensor(f"{name}down_weight", call.down_weight, (None, depth), device)
    hidden = call.down_weight.shape[0]
    if hidden == 0:
        fail(f"{name}down_weight", "a hidden width of at least 1", f"shape {tuple(call.down_weight.shape)}")
    for weight in ("up_weight", "shared_weight"):
        if getattr(call, weight) is not None:
            check_tensor(name + weight, getattr(call, weight), (None, hidden), device)
            if getattr(call, weight).shape[0] == 0:
                fail(name + weight, "at least one column of the result", f"shape {tuple(getattr(call, weight).shape)}")
    operands = Operands(*call[:EACH])
    vectors = {
        "down_bias": ("down_weight", hidden),
        "up_bias": ("up_weight", None if call.up_weight is None else call.up_weight.shape[0]),
        "shared_bias": ("shared_weight", None if call.shared_weight is None else call.shared_weight.shape[0]),
        "norm_weight": ("tap", depth),
        "norm_bias": ("norm_weight", depth),
        "out_norm_weight": ("tap", operands.width),
        "out_norm_bias": ("out_norm_weight", operands.width),
    }
    for vector, (owner, size) in vectors.items():
        if getattr(call, vector) is None:
            continue
        if getattr(call, owner) is None:
            fail(name + owner, f"a tensor where {vector} is given", "None")
        check_tensor(name + vector, getattr(call, vector), (size,), device)
    own = (call.tap.dtype, torch.float32) if call.tap.dtype.itemsize == 2 else (call.tap.dtype,)
    if not autocast:
        check_dtype(f"{name}down_weight", call.down_weight, own)
        check_dtype(f"{name}norm_weight", call.norm_weight, own)
    for other in ("down_bias", "up_weight", "up_bias", "shared_weight", "shared_bias"):
        check_dtype(name + other, getattr(call, other), (call.down_weight.dtype,))
    if call.norm_bias is not None:
        check_dtype(f"{name}norm_bias", call.norm_bias, (call.norm_weight.dtype,))
    if call.out_norm_bias is not None:
        check_dtype(f"{name}out_norm_bias", call.out_norm_bias, (call.out_norm_weight.dtype,))
    if call.activation not in ACTIVATIONS:
        fail(f"{name}activation", "one of " + ", ".join(ACTIVATIONS), repr(call.activation))
    for number in ("scale", "norm_eps", "out_norm_eps"):
        check_number(name + number, getattr(call, number))
    if torch.is_grad_enabled():
        if call.tap.requires_grad:
            fail(f"{name}tap", "a tensor that requires no gradient (detach it: a tap gets none)", "one that does")
        for frozen in ("out_norm_weight", "out_norm_bias"):
            if getattr(call, frozen) is not None and getattr(call, frozen).requires_grad:
                fail(name + frozen, "a tensor that requires no gradient", "one that does")


def _check_together(adapters: Sequence[SideTap], bases: Sequence[Tensor]) -> None:
    """Every adapter agrees with the first, and the bases with their sum."""
    first = adapters[0].tap
    leading, width = first.shape[:-1], Operands(*adapters[0][:EACH]).width
    for i, adapter in enumerate(adapters):
        if adapter.tap.shape[:-1] != leading or adapter.tap.device != first.device:
            check_tensor(f"adapters[{i}].tap", adapter.tap, (*leading, None), first.device)
        check_dtype(f"adapters[{i}].tap", adapter.tap, (first.dtype,))
        found = Operands(*adapter[:EACH]).width
        if found != width:
            fail(f"adapters[{i}]", f"a result of {width} columns, as adapters[0]'s", found)
    for i, base in enumerate(bases):
        check_tensor(f"bases[{i}]", base, (*leading, width), first.device)
        check_dtype(f"bases[{i}]", base, (first.dtype, torch.float32) if first.dtype.itemsize == 2 else (first.dtype,))


def _forward_fake(tensors: Tensors, base_count: int, *options: Sequence | str) -> list[Tensor]:
    call = Operands(*tensors[base_count : base_count + EACH])
    return [call.tap.new_empty(*call.tap.shape[:-1], call.width, dtype=result_dtype(tensors, base_count))]


def _backward_fake(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], base_count: int, *options: Sequence | str
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(saved, needs) if need]


_operation = Operation(
    name="side_fusion",
    options_schema="int base_count, str[] activations, float[] scales, float[] norm_eps, float[] out_norm_eps, str backend",
    **by_backend(
        reference,
        native="fastadapt.kernels.side_fusion.native_kernel",
        triton="fastadapt.kernels.side_fusion.triton_launch",
        cuda="fastadapt.kernels.side_fusion.cuda_kernel",
    ),
    forward_fake=_forward_fake,
    primary=lambda count: 1,
    save=reference.save,
    backward_fake=_backward_fake,
    added=lambda base_count, *options: range(base_count),
)
