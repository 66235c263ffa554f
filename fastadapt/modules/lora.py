"""LoRA as modules: a linear with a low-rank update, and dropout whose mask is a function of a seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import lora_linear
from fastadapt.core import philox
from fastadapt.core.checks import check_probability, fail


class LoraLinear(nn.Module):
    """A frozen linear with a trainable low-rank update, computed as one operation.

        y = x W^T + b + s dropout(x) A^T B^T,      s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

    `weight` (out_features, in_features) and `bias` (out_features,) are frozen, and named as in nn.Linear, so that its
    checkpoints load with strict=False; `lora_A` (r, in_features) and `lora_B` (out_features, r) train.  A starts as
    nn.Linear's weight would, B at zero, so the layer starts as the linear it replaces.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear; dtype is the frozen weights'.  Adapters of a
            float16 or bfloat16 weight are float32, others have its dtype.
        r: rank, at least 1.
        lora_alpha: numerator of the scale s.
        lora_dropout: probability in [0, 1) with which an element of x is dropped before A, while training.
        use_rslora: divide by sqrt(r) instead of r (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning
            with LoRA", 2023).

    Raises:
        ValueError: r below 1 or lora_dropout outside [0, 1).

    A merged layer's state_dict holds W + s B A as its weight: unmerge before saving to keep the two apart.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            fail("r", "a rank of at least 1", r)
        check_probability("lora_dropout", lora_dropout)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.merged = False
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype).requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        like = {"device": device, "dtype": torch.float32 if half else self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **like))
        self.reset_lora_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **lora: Any) -> LoraLinear:
        """A LoraLinear around the very parameters of `linear`, which it freezes; lora: r, lora_alpha and so on."""
        if not isinstance(linear, nn.Linear):
            fail("linear", "a torch.nn.Linear", type(linear).__name__)
        weight, bias = linear.weight.requires_grad_(False), linear.bias
        shape = linear.in_features, linear.out_features
        layer = cls(*shape, bias is not None, device="meta", dtype=weight.dtype, **lora).to_empty(device=weight.device)
        layer.weight, layer.bias = weight, bias if bias is None else bias.requires_grad_(False)
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """Start the update anew: A uniform as nn.Linear's weight (Kaiming, a = sqrt 5), B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        dropout_p = self.lora_dropout if self.training else 0.0
        weights = self.weight, self.bias, self.lora_A, self.lora_B
        return lora_linear(x, *weights, scale=self.scaling, dropout_p=dropout_p)

    def merge(self) -> None:
        """Add s B A to the weight, so that the layer costs a plain linear; a merged layer stays as it is."""
        if not self.merged:
            self._shift_weight(self.scaling)
            self.merged = True

    def unmerge(self) -> None:
        """Take s B A off the weight again, to within a rounding of its dtype; an unmerged layer stays as it is."""
        if self.merged:
            self._shift_weight(-self.scaling)
            self.merged = False

    @torch.no_grad()
    def _shift_weight(self, scale: float) -> None:
        # the sum is taken in the adapters' dtype, which is never the coarser one, and rounded once
        self.weight.copy_(torch.addmm(self.weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=scale))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        )


class PhiloxDropout(nn.Module):
    """nn.Dropout with the mask of fastadapt's operations: put into an eager model, it drops what the fused one would.

        y = x keep / (1 - p) while training, x otherwise

    The mask comes from a 64-bit seed drawn from torch's generator of x's device, row by row over x's flattened leading
    dimensions; only the seed is kept for backward.  p, in [0, 1), acts in steps of 2^-16.

    Raises:
        ValueError: p outside [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_probability("p", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or philox.threshold(self.p) == 0:
            return x
        return _SeededMask.apply(x, philox.draw_seed(x.device), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _SeededMask(torch.autograd.Function):
    """Multiplication by keep / (1 - p): linear, and its own transpose."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return (philox.masked(rows, seed, p) * philox.inv_keep(p)).view(x.shape)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, seed, ctx.p = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return _SeededMask.apply(grad, seed, ctx.p), None, None
