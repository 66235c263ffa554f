"""The strongest published way to do LoRA without a kernel of its own: library products that accumulate in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AddmmLora(nn.Module):
    """A LoRA linear as one autograd function over in-place matrix products, with dropout's mask kept as bools.

    y = x W^T + b + scale * dropout(x) A^T B^T; the low-rank product is recomputed in the backward, x and the mask are
    kept.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.tensors, self.scale, self.dropout = (weight, bias, lora_a, lora_b), scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        tensors = (tensor.to(x.dtype) for tensor in self.tensors)  # as autocast would
        return _Addmm.apply(x, *tensors, self.scale, self.dropout if self.training else 0.0)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, p: float
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        ctx.scale, ctx.keep = scale, 1 - p
        ctx.save_for_backward(x, mask, weight, lora_a, lora_b)
        return F.linear(x, weight, bias).addmm_(dropped @ lora_a.t(), lora_b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, lora_a, lora_b = ctx.saved_tensors
        dropped = x if mask is None else x * mask / ctx.keep
        product_grad = (grad @ lora_b).mul_(ctx.scale)
        lora_a_grad = product_grad.t() @ dropped
        lora_b_grad = (grad.t() @ (dropped @ lora_a.t())).mul_(ctx.scale)
        x_grad = grad @ weight
        if mask is None:
            x_grad.addmm_(product_grad, lora_a)
        else:
            x_grad.add_((product_grad @ lora_a).mul_(mask).div_(ctx.keep))
        return x_grad, None, None, lora_a_grad, lora_b_grad, None, None
