"""light_interaction: two sequences that attend to each other, each multiplied by what it finds in the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import check_dtype, check_heads, check_input, check_padding_mask, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.light_interaction import config, reference
from fastadapt.kernels.light_interaction.reference import Direction

BACKENDS = ("reference", "triton")


def light_interaction(
    x: Tensor,
    y: Tensor,
    in_proj_weights: Sequence[Tensor],
    in_proj_biases: Sequence[Tensor],
    out_proj_weights: Sequence[Tensor],
    out_proj_biases: Sequence[Tensor],
    *,
    num_heads: int,
    y_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply x by its attention over y and y by its attention over x, in one operation.

        x' = x o MHA_0(query x, key and value y)          y' = y o MHA_1(query y, key and value x)

    Both directions read x and y as they came.  MHA is torch's nn.MultiheadAttention with dropout 0: per head
    softmax(w^-0.5 q k^T) v for head width w = d / num_heads, between the input and the output projection.

    Args:
        x: (B, Tx, d), such as image tokens; float32, float16, bfloat16 or float64, any strides.
        y: (B, Ty, d), such as words; in x's dtype, under autocast in any of these; any strides.
        in_proj_weights: of each direction, [0] for x' and [1] for y', (3d, d): Wq, Wk and Wv one after another; in x's dtype
            or float32 (under autocast any).
        in_proj_biases: of each direction (3d,), like the following in in_proj_weights[0]'s dtype.
        out_proj_weights: of each direction (d, d).
        out_proj_biases: of each direction (d,).
        num_heads: a divisor of d.
        y_padding_mask: (B, Ty) bool, True for a word that x does not attend to, as key_padding_mask in torch.  A masked word is
            a query all the same: its row of y' follows from what it holds.  Where a sample's words are all masked, attention
            is zero before its output projection, where torch gives NaN.
        backend: None to choose (Triton on a GPU, else the reference), "reference" or "triton", which takes d of 16, 32, 64 or,
            in 16 bits, 128, and up to 32 words.

    Returns:
        (x', y') in the shapes of x and y and in x's dtype; under autocast in autocast's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach x, y and all eight weights and biases; no weight gradient is computed that is not asked for.  x, y, the
    mask and, with Triton, the attention before its output projection are kept for the backward, which computes the
    probabilities again: nothing that is kept has a number for each query and key.  The softmax, all sums and the final
    multiplication are computed in float32 (in float64 for float64); what is multiplied by a matrix is rounded to x's dtype
    first.  Deterministic: no atomics, partial sums are added in a fixed order.

    Xu et al., "Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image Segmentation", ICCV 2023,
    section 3.2.
    """
    check_input("x", x)
    compute_dtype = autocast_dtype(x)
    sequences = {
        "in_proj_weights": in_proj_weights,
        "in_proj_biases": in_proj_biases,
        "out_proj_weights": out_proj_weights,
        "out_proj_biases": out_proj_biases,
    }
    for name, sequence in sequences.items():
        if len(sequence) != 2:
            fail(name, "2 entries, one a direction", len(sequence))
    both = [Direction(*tensors) for tensors in zip(*sequences.values())]
    _check_inputs(x, y, num_heads, y_padding_mask)
    for i, direction in enumerate(both):
        _check_direction(x, direction, both[0].in_weight, [f"{name}[{i}]" for name in sequences], compute_dtype is not None)
    if compute_dtype is None:
        check_dtype("y", y, (x.dtype,))
    else:
        x, y = x.to(compute_dtype), y.to(compute_dtype)
    chosen = choose("light_interaction", backend, x, BACKENDS, config.why_not_triton(x.shape[-1], y.shape[1], x.dtype))
    outputs = _operation((x, y, y_padding_mask, *both[0], *both[1]), num_heads, chosen)
    return outputs[0], outputs[1]


def _check_inputs(x: Tensor, y: Tensor, num_heads: int, mask: Tensor | None) -> None:
    check_tensor("x", x, (None, None, None), x.device)
    batch, _, width = x.shape
    check_tensor("y", y, (batch, None, width), x.device)
    check_heads("num_heads", num_heads, width, "x")
    check_padding_mask("y_padding_mask", mask, (batch, y.shape[1]), x.device)


def _check_direction(x: Tensor, direction: Direction, first: Tensor, names: Sequence[str], autocast: bool) -> None:
    width = x.shape[-1]
    for name, tensor, shape in zip(names, direction, ((3 * width, width), (3 * width,), (width, width), (width,))):
        check_tensor(name, tensor, shape, x.device)
    if not autocast:
        check_dtype(names[0], direction.in_weight, (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,))
    for name, tensor in zip(names, direction):
        check_dtype(name, tensor, (first.dtype,))


def _forward_fake(tensors: Tensors, num_heads: int, backend: str) -> list[Tensor]:
    x, y = tensors[:2]
    outputs = [x.new_empty(x.shape), y.new_empty(y.shape)]
    if backend == "reference":
        return outputs
    batch, words, _ = y.shape
    logsum = y.new_empty(batch, num_heads, words, dtype=torch.float32)
    return [*outputs, x.new_empty(x.shape), y.new_empty(y.shape, dtype=torch.float32), logsum]


def _backward_fake(saved: Tensors, grads: Tensors, needs: Sequence[bool], num_heads: int, backend: str) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(saved, needs) if need]


_operation = Operation(
    name="light_interaction",
    options_schema="int num_heads, str backend",
    **by_backend(reference, triton="fastadapt.kernels.light_interaction.triton_launch"),
    forward_fake=_forward_fake,
    primary=lambda count: 2,
    save=reference.save,
    backward_fake=_backward_fake,
)
