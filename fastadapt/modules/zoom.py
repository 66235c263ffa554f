"""How a Bridger's stage reads a wide visual stream as narrow tokens, and adds to the stream what became of them.

A zoom has two methods: zoom_in(visual) -> tokens (B, N, ladder_dim), and zoom_out(tokens, visual) -> the updated stream, a new
tensor in visual's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_tensor, fail


class TokenZoom(nn.Module):
    """The zoom of a ViT stage: tokens (B, 1 + N, dim), of which the first, the class token, has no part in it.

        zoom_in(x)     = relu(norm(x_1.. W_in^T)),               W_in  (ladder_dim, dim)
        zoom_out(v, x) = x_0, x_1.. + relu(norm(v W_out^T)),     W_out (dim, ladder_dim)

    This is the released 1x1 convolutions, plain and transposed, with BatchNorm2d and ReLU, on tokens as they lie in memory.
    """

    def __init__(self, dim: int, ladder_dim: int, **like: Any) -> None:
        super().__init__()
        self.inward, self.outward = LinearNormReLU(dim, ladder_dim, **like), LinearNormReLU(ladder_dim, dim, **like)

    def zoom_in(self, visual: Tensor) -> Tensor:
        """Narrow tokens (B, N, ladder_dim) from visual (B, 1 + N, dim)."""
        weight = self.inward.weight
        check_tensor("visual", visual, (None, None, weight.shape[1]), weight.device)
        return self.inward(visual, skip=1)

    def zoom_out(self, tokens: Tensor, visual: Tensor) -> Tensor:
        """visual (B, 1 + N, dim) with the update of tokens (B, N, ladder_dim)."""
        update = self.outward(tokens)
        if torch.compiler.is_compiling():  # which fuses this, and cannot trace a sum that is written into a view
            return visual + F.pad(update, (0, 0, 1, 0))
        return _AddToPatches.apply(visual, update)


class ConvZoom(nn.Module):
    """The zoom of a ResNet stage: a map (B, channels, H, W), by convolutions without bias, norm and activation.

        zoom_in(x)     = conv_in(x) as tokens, row by row
        zoom_out(v, x) = x + conv_out(v as a map)

    Kernels are as large as their strides.  A map of a finer stride than the bridge's is shrunk by a convolution and the update
    enlarged by a transposed one; for a coarser map it is the other way round.

    Args:
        channels: of the map.
        ladder_dim: width of the tokens.
        stride, bridge_stride: of the map and of the tokens over the image; one divides the other.
        device, dtype: of the parameters.

    Raises:
        ValueError: neither stride divides the other; in zoom_in, a map whose sides are not multiples of what it is shrunk by.
    """

    def __init__(self, channels: int, ladder_dim: int, stride: int, bridge_stride: int, **like: Any) -> None:
        super().__init__()
        self.shrink, self.enlarge = max(bridge_stride // stride, 1), max(stride // bridge_stride, 1)
        if stride * self.shrink != bridge_stride * self.enlarge:
            fail("strides", f"a divisor or a multiple of bridge_stride = {bridge_stride}", stride)
        kinds = (nn.Conv2d, nn.ConvTranspose2d) if self.enlarge == 1 else (nn.ConvTranspose2d, nn.Conv2d)
        kernel = self.shrink * self.enlarge
        self.inward = kinds[0](channels, ladder_dim, kernel, kernel, bias=False, **like)
        self.outward = kinds[1](ladder_dim, channels, kernel, kernel, bias=False, **like)
        for convolution in (self.inward, self.outward):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")

    def zoom_in(self, visual: Tensor) -> Tensor:
        """Tokens (B, N, ladder_dim) from visual (B, channels, H, W)."""
        check_tensor("visual", visual, (None, self.inward.in_channels, None, None), self.inward.weight.device)
        if any(side % self.shrink for side in visual.shape[2:]):
            fail("visual", f"height and width that are multiples of {self.shrink}", f"shape {tuple(visual.shape)}")
        # once, rather than in every product that reads the tokens
        return self.inward(visual).flatten(2).transpose(1, 2).contiguous()

    def zoom_out(self, tokens: Tensor, visual: Tensor) -> Tensor:
        """visual (B, channels, H, W) with the update of tokens (B, N, ladder_dim)."""
        height, width = (side * self.enlarge // self.shrink for side in visual.shape[2:])
        return visual + self.outward(tokens.transpose(1, 2).unflatten(2, (height, width)))


class LinearNormReLU(nn.Module):
    """relu(norm(x W^T)) on tokens: a 1x1 convolution without bias, BatchNorm2d and ReLU (Ioffe and Szegedy, 2015).

    norm is an nn.BatchNorm1d over batch and tokens together.  Where x is narrower than y, x alone is kept for the backward,
    which computes the product and the norm again; nothing of y's size is kept.  A wider x, a norm of another class such as
    nn.SyncBatchNorm, and torch.compile, which decides by itself what to keep, run the norm as a module.

    `fold` makes one linear with a bias of the two, for inference:

        y = relu(x W'^T + b'),      W' = W gamma / sqrt(var + eps),      b' = beta - mean gamma / sqrt(var + eps)
    """

    def __init__(self, in_features: int, out_features: int, **like: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **like))
        self.norm: nn.Module | None = nn.BatchNorm1d(out_features, **like)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """y (B, N - skip, out_features) from x (B, N, in_features); the first `skip` tokens have no y, nor part in the norm."""
        norm, (out_features, in_features) = self.norm, self.weight.shape
        if norm is None:
            return F.linear(x, self.weight, self.bias)[:, skip:].relu()
        if in_features < out_features and type(norm) is nn.BatchNorm1d and not torch.compiler.is_compiling():
            return self._recomputed(x[:, skip:])
        # the skipped tokens are dropped after the linear, where that copies less
        z = F.linear(x, self.weight)[:, skip:]
        return norm(z.flatten(0, 1)).relu_().view(z.shape)

    def _recomputed(self, x: Tensor) -> Tensor:
        """y, of which the backward keeps x alone; the norm's running statistics move as in its own forward."""
        norm, dtype = self.norm, autocast_dtype(x) or self.weight.dtype
        if norm.training:
            norm.num_batches_tracked += 1
        statistics = norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
        return _LinearNormReLU.apply(x.to(dtype), self.weight.to(dtype), norm.weight, norm.bias, *statistics)

    @torch.no_grad()
    def fold(self) -> None:
        """Make W' and b' of the running statistics the parameters; there is no way back.

        They are computed in float32 (float64 for float64) and rounded once.

        Raises:
            RuntimeError: the module is in training mode.
        """
        if self.training:
            raise RuntimeError("a batch norm in training mode cannot be folded: call eval() first")
        if (norm := self.norm) is not None:
            dtype = self.weight.dtype
            wide = torch.promote_types(dtype, torch.float32)
            scale = norm.weight * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
            folded = scale[:, None] * self.weight, norm.bias - norm.running_mean * scale
            self.weight, self.bias = (nn.Parameter(tensor.to(dtype), requires_grad=False) for tensor in folded)
            self.norm = None

    def train(self, mode: bool = True) -> LinearNormReLU:
        if mode and self.norm is None:
            raise RuntimeError("a folded batch norm is for inference only: train the module that it was folded from")
        return super().train(mode)


class _LinearNormReLU(torch.autograd.Function):
    """relu(batch_norm(x W^T)), of which x, the parameters and the statistics are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        z = F.linear(x, weight)
        y, mean, invstd = torch.native_batch_norm(
            z.flatten(0, -2), gamma, beta, running_mean, running_var, training, momentum, eps
        )
        # in training mode the running statistics have no part in the result
        running = (None, None) if training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, gamma, beta, mean, invstd, *running)
        ctx.training, ctx.eps = training, eps
        return y.relu_().view(z.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, beta, mean, invstd, *running = ctx.saved_tensors
        z = F.linear(x, weight).flatten(0, -2)
        used = (mean, invstd.pow(-2) - ctx.eps) if ctx.training else running
        y, _, _ = torch.native_batch_norm(z, gamma, beta, *used, False, 0.0, ctx.eps)
        grad = torch.ops.aten.threshold_backward(grad.flatten(0, -2), y, 0)
        for_x, for_weight, for_gamma, for_beta, *_ = ctx.needs_input_grad
        wanted = [for_x or for_weight, for_gamma, for_beta]
        for_z, *for_norm = torch.ops.aten.native_batch_norm_backward(
            grad, z, gamma, *running, mean, invstd, ctx.training, ctx.eps, wanted
        )
        for_x = (for_z @ weight).view(x.shape) if for_x else None
        for_weight = for_z.T @ x.flatten(0, -2) if for_weight else None
        return for_x, for_weight, *for_norm, None, None, None, None, None


class _AddToPatches(torch.autograd.Function):
    """visual with `update` added to all tokens but the first: each is read once, and gradients pass without a copy."""

    @staticmethod
    def forward(ctx: Any, visual: Tensor, update: Tensor) -> Tensor:
        updated = torch.empty_like(visual, dtype=torch.promote_types(visual.dtype, update.dtype))
        torch.add(visual[:, 1:], update, out=updated[:, 1:])
        updated[:, :1].copy_(visual[:, :1])
        return updated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad[:, 1:]
