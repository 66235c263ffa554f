"""lora_linear: a frozen linear layer plus its low-rank update, alone or for several layers that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import FLOATS, check_dtype, check_input, check_number, check_probability, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.core.philox import draw_seed, threshold
from fastadapt.kernels.lora_linear import config, native_kernel, reference


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Apply a linear layer and its LoRA update in one operation.

        y = x W^T + b + scale * dropout(x) A^T B^T

    Args:
        x: (..., K); float32, float16, bfloat16 or float64, any strides.
        weight: (N, K), in x's dtype; under autocast in any of these dtypes.
        bias: (N,) in weight's dtype, or None.
        lora_a: (r, K), r >= 1; in x's dtype or float32 (under autocast any).
        lora_b: (N, r), in lora_a's dtype.
        scale: lora_alpha / r, or what else multiplies the update.
        dropout_p: probability of dropping an element of x before A, in steps of 2^-16; 0 <= dropout_p < 1.
        training: whether dropout is applied.
        backend: None to choose (Triton on a GPU, C++ on a CPU, else the reference), "reference", "native" (the C++) or "triton".

    Returns:
        (..., N) in x's dtype; under autocast in autocast's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach x, lora_a, lora_b and, where they require it, weight and bias; none is computed that is not asked for.
    Sums are accumulated in float32 (in float64 for float64).  Deterministic: no atomics; the dropout mask is a function of a seed
    drawn from torch's generator (fastadapt.core.philox) and is recomputed, never stored.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3.
    """
    return _apply(x, (weight, bias, lora_a, lora_b), (scale,), dropout_p, training, backend, _NAMES)[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *,
    scales: Sequence[float],
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Apply several LoRA linear layers, such as query, key and value, that read the same x.

        y_g = x W_g^T + b_g + scale_g * dropout_g(x) A_g^T B_g^T

    The sequences have one entry a member; N_g and r_g may differ between members, the dropout masks are independent, and one
    seed serves the whole group.  x is read once, and its gradient is summed over the members before it is written.  Arguments,
    errors and numerics are otherwise those of `lora_linear`; the names in messages carry the member's index.
    """
    sequences = {"weights": weights, "biases": biases, "lora_as": lora_as, "lora_bs": lora_bs, "scales": scales}
    for name, sequence in sequences.items():
        if len(sequence) != len(weights) or len(weights) == 0:
            fail(name, f"{max(len(weights), 1)} entries, one a member", f"{len(sequence)}")
    flat = tuple(tensor for member in zip(weights, biases, lora_as, lora_bs) for tensor in member)
    return tuple(_apply(x, flat, scales, dropout_p, training, backend, _GROUP_NAMES))


# what messages call a member's tensors and scale
_NAMES = ("weight", "bias", "lora_a", "lora_b", "scale")
_GROUP_NAMES = ("weights[{}]", "biases[{}]", "lora_as[{}]", "lora_bs[{}]", "scales[{}]")


def lora_linear_path(
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    dropout_p: float,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> str:
    """Say what a forward pass of `lora_linear` would run: the backend, and with Triton's the algorithm, as in "triton, fused".

    Args:
        rows: product of x's leading dimensions.
        dtype: what is computed in: x's, under autocast autocast's.
        weight_dtype: the weight's.
        backend: as for `lora_linear`.

    Raises:
        BackendError: no such call can run.
    """
    chosen = choose("lora_linear", backend, torch.empty(0, dtype=dtype, device=device))
    if chosen != "triton":
        return chosen
    dropout = threshold(dropout_p) > 0
    problem = config.problem(rows, in_features, out_features, rank, dropout, dtype, weight_dtype, device)
    return f"triton, {config.algorithm(problem)}"


def _apply(
    x: Tensor,
    flat: tuple[Tensor | None, ...],
    scales: Sequence[float],
    dropout_p: float,
    training: bool,
    backend: str | None,
    names: Sequence[str],
) -> Sequence[Tensor]:
    check_input("x", x)
    check_probability("dropout_p", dropout_p)
    compute_dtype = autocast_dtype(x)
    for g, scale in enumerate(scales):
        member = flat[reference.EACH * g : reference.EACH * (g + 1)]
        if not _plain(x, *member, scale):
            _check_member(x, *member, scale, [name.format(g) for name in names], compute_dtype is not None)
    if compute_dtype is not None:
        x = x.to(compute_dtype)
    chosen = choose("lora_linear", backend, x)
    seed, probability = (draw_seed(x.device), float(dropout_p)) if training and threshold(dropout_p) else (None, 0.0)
    return run((x, seed, *flat), [float(scale) for scale in scales], probability, chosen)


def run(tensors: Tensors, scales: Sequence[float], dropout_p: float, backend: str) -> Sequence[Tensor]:
    """The outputs of checked arguments, differentiable in the way that costs the host least."""
    if backend == "native" and native.differentiable() and not torch.compiler.is_compiling():
        return native_kernel.apply(tensors, scales, dropout_p)[: len(scales)]
    return operation(tensors, scales, dropout_p, backend)[: len(scales)]


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> bool:
    """Whether the arguments are good in the commonest way; `_check_member` costs the host ten times as much."""
    try:
        outputs, inputs = weight.shape
        rank = lora_a.shape[0]
        return (
            x.shape[-1] == inputs
            and lora_a.shape == (rank, inputs)
            and lora_b.shape == (outputs, rank)
            and (bias is None or (bias.shape == (outputs,) and bias.dtype is x.dtype and bias.device == x.device))
            and x.dtype is weight.dtype is lora_a.dtype is lora_b.dtype
            and x.device == weight.device == lora_a.device == lora_b.device
            and rank > 0
            and x.dtype in FLOATS
            and type(scale) is float
            and -inf < scale < inf  # math.isfinite cannot be traced where a compiler makes the scale symbolic
        )
    except (AttributeError, ValueError, TypeError, IndexError):
        return False


def _check_member(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    names: Sequence[str],
    autocast: bool,
) -> None:
    check_tensor(names[0], weight, (None, x.shape[-1]), x.device)
    if bias is not None:
        check_tensor(names[1], bias, (weight.shape[0],), x.device)
    check_tensor(names[2], lora_a, (None, x.shape[-1]), x.device)
    if lora_a.shape[0] == 0:
        fail(names[2], "a rank of at least 1", f"shape {tuple(lora_a.shape)}")
    check_tensor(names[3], lora_b, (weight.shape[0], lora_a.shape[0]), x.device)
    check_number(names[4], scale)
    if not autocast:
        adapter_dtypes = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
        check_dtype(names[0], weight, (x.dtype,))
        check_dtype(names[1], bias, (x.dtype,))
        check_dtype(names[2], lora_a, adapter_dtypes)
    check_dtype(names[3], lora_b, (lora_a.dtype,))


def _forward_fake(tensors: Tensors, scales: Sequence[float], dropout_p: float, backend: str) -> list[Tensor]:
    x, group = tensors[0], reference.members(tensors)
    rows = prod(x.shape[:-1])
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight, _, _, _ in group]
    return outputs + [x.new_empty(rows, lora_a.shape[0]) for _, _, lora_a, _ in group]


def _backward_fake(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], scales: Sequence[float], dropout_p: float, backend: str
) -> list[Tensor]:
    flat, _ = reference.split_saved(saved)
    own = [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(flat[1:], needs[1:]) if need]
    weight = flat[reference.HEAD]
    return [grads[0].new_empty(*grads[0].shape[:-1], weight.shape[1]), *own] if needs[0] else own


operation = Operation(
    name="lora_linear",
    options_schema="float[] scales, float dropout_p, str backend",
    **by_backend(
        reference,
        native="fastadapt.kernels.lora_linear.native_kernel",
        triton="fastadapt.kernels.lora_linear.triton_launch",
    ),
    forward_fake=_forward_fake,
    primary=lambda count: count // 2,
    save=reference.save,
    backward_fake=_backward_fake,
)
