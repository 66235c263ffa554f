"""Activations that keep one tensor for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, the sigmoid approximation of GELU.

        y = x sigmoid(1.702 x)

    Args:
        x: a floating-point tensor of any shape.

    Returns:
        A tensor of x's shape and dtype, under autocast too.

    Only x is kept for the backward, which computes the sigmoid anew.  In float16 value and gradient are right where 1.702 x
    overflows, too.

    Raises:
        RuntimeError: a second derivative is asked for; there is none.

    Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, section 2.
    """
    return _QuickGelu.apply(x)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (_SLOPE * x).sigmoid_().mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        limit = torch.finfo(x.dtype).max
        scaled = (_SLOPE * x).clamp_(-limit, limit)  # infinity times the zero that the slope approaches is not a number
        return torch.ops.aten.silu_backward(grad, scaled)  # y = silu(1.702 x) / 1.702
