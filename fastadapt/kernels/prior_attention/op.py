"""prior_attention: cross-attention of many queries over few keys, such as a text or a prior, as one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.checks import check_dtype, check_heads, check_input, check_number, check_padding_mask, check_tensor
from fastadapt.core.operation import Operation, Tensors, by_backend
from fastadapt.kernels.prior_attention import config, reference


def prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Let every query attend to a few keys, in one operation.

        out_h = softmax(scale * q_h k_h^T) v_h          for each head h, over the keys

    Args:
        q: (B, Tq, D), D = num_heads * head width; float32, float16, bfloat16 or float64, any strides.
        k: (B, Tk, D), in q's dtype; under autocast in any of these dtypes.
        v: (B, Tk, D), in q's dtype; under autocast in any of these dtypes.
        num_heads: how many heads share D; they lie one after another in it.
        key_padding_mask: (B, Tk) bool, True for a key to ignore, as in torch's nn.MultiheadAttention; None to ignore none.
        scale: what multiplies the scores; None for head width ** -0.5.
        backend: None to choose (Triton on a GPU, else the reference), "reference" or "triton", which takes heads 8, 16, 32
            or 64 wide and up to 256 keys, fewer of wide heads in TF32 or before compute capability 9.0 (config.most_keys).

    Returns:
        (B, Tq, D) in q's dtype; under autocast in autocast's dtype.  Zeros, with zero gradients, for a sample with no key or
        with none that is not masked, where torch gives NaN.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        BackendError: the backend asked for cannot run this call; the message gives every reason.

    Gradients reach q, k and v; none is computed that is not asked for.  q, k, v and the mask are kept for the backward, which
    computes the probabilities again.  What a masked key holds, NaN included, reaches nothing.  The softmax and all sums are
    computed in float32 (in float64 for float64); probabilities are rounded to q's dtype where they are multiplied.
    Deterministic: no atomics, partial sums are added in a fixed order.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1 and section 3.2.2.
    """
    check_input("q", q)
    _check(q, k, v, num_heads, key_padding_mask)
    head_width = q.shape[-1] // num_heads
    if scale is None:
        scale = head_width**-0.5
    check_number("scale", scale)
    compute_dtype = autocast_dtype(q)
    if compute_dtype is None:
        check_dtype("k", k, (q.dtype,))
        check_dtype("v", v, (q.dtype,))
    else:
        q, k, v = q.to(compute_dtype), k.to(compute_dtype), v.to(compute_dtype)
    reasons = config.why_not_triton(head_width, k.shape[1], q.dtype, q.device)
    chosen = choose("prior_attention", backend, q, BACKENDS, reasons)
    return _operation((q, k, v, key_padding_mask), num_heads, float(scale), chosen)[0]


BACKENDS = ("reference", "triton")


def _check(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None) -> None:
    check_tensor("q", q, (None, None, None), q.device)
    batch, _, width = q.shape
    check_tensor("k", k, (batch, None, width), q.device)
    check_tensor("v", v, tuple(k.shape), q.device)
    check_heads("num_heads", num_heads, width, "q")
    check_padding_mask("key_padding_mask", mask, (batch, k.shape[1]), q.device)


def _forward_fake(tensors: Tensors, num_heads: int, scale: float, backend: str) -> list[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape)]


def _backward_fake(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], num_heads: int, scale: float, backend: str
) -> list[Tensor]:
    q, k, _, _ = saved
    return [like.new_empty(like.shape) for like, need in zip((q, k, k), needs) if need]


_operation = Operation(
    name="prior_attention",
    options_schema="int num_heads, float scale, str backend",
    **by_backend(reference, triton="fastadapt.kernels.prior_attention.triton_launch"),
    forward_fake=_forward_fake,
    primary=lambda count: 1,
    save=reference.save,
    backward_fake=_backward_fake,
)
