"""ETRIS's head: Projector turns a map and a sentence into the logits of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_tensor
from fastadapt.modules.convolution import ConvNormReLU

KERNEL = 3
TAPS = KERNEL * KERNEL


class Projector(nn.Module):
    """A map enlarged four times and convolved with a kernel made from the sentence: the logits of a segmentation.

        x      = relu(norm(conv3x3(up(relu(norm(conv3x3(up(vision))))))))
        [w, c] = sentence W_k^T + b_k,      w (width, 3, 3), c a number, for each sample
        y      = conv3x3(conv1x1(x), w) + c

    (Xu et al., ICCV 2023, as released; the dynamic kernel is Wang et al.'s, "CRIS", CVPR 2022).  up is bilinear, by two,
    with align_corners=False; convolutions are padded with zeros.

    The two last convolutions, linear one after the other, are one.  With W (width, width) and b of the 1x1 one, tap k of y
    at place p needs only the number

        z_k(q) = <W^T w_k, x(q)> + <w_k, b>,      y(p) = sum_k z_k(p + k) + c,

    where p + k lies inside the map, so that the border is that of the zero-padded 1x1 output exactly.  z is one batched
    product that reads x once, and the sum of shifts is F.fold: neither conv1x1(x) nor a convolution with a group for every
    sample is left.  In 16 bits W^T w_k and z are rounded, where the two convolutions round conv1x1(x); the nine taps are summed
    in float32.

    For the backward neither enlarged map is kept, but what it was enlarged from: up is run again there.

    Args:
        sentence_dim: width of the sentence.  1024 for ResNet-50, else 512.
        in_channels: of vision.
        width: channels of x.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        sentence_dim: int = 512,
        in_channels: int = 512,
        width: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sentence_dim, self.in_channels, self.width = sentence_dim, in_channels, width
        like = {"device": device, "dtype": dtype}
        self.conv1, self.conv2 = (
            _UpConvNormReLU(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False, **like))
            for channels in (in_channels, width)
        )
        self.pointwise = nn.Conv2d(width, width, 1, **like)
        self.kernel = nn.Linear(sentence_dim, width * TAPS + 1, **like)

    def forward(self, vision: Tensor, sentence: Tensor) -> Tensor:
        """The logits.

        Args:
            vision: (B, in_channels, H, W).
            sentence: (B, sentence_dim).

        Returns:
            y, (B, 1, 4 H, 4 W).

        Raises:
            ValueError: a shape is not as above.
        """
        check_tensor("vision", vision, (None, self.in_channels, None, None), vision.device)
        check_tensor("sentence", sentence, (vision.shape[0], self.sentence_dim), vision.device)
        x = self.conv2(self.conv1(vision))
        kernel, shift = self.kernel(sentence).split([self.width * TAPS, 1], dim=1)
        y = self._convolve(x, kernel) + shift[:, :, None, None]
        return y.to(kernel.dtype)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """conv3x3(conv1x1(x), w), in float32 at least, for x (B, width, H, W) and w, flattened, (B, 9 width)."""
        # F.fold moves what it reads by +k where a convolution moves it by -k: the taps in reverse
        taps = kernel.unflatten(1, (self.width, TAPS)).flip(2).transpose(1, 2)
        folded = taps @ self.pointwise.weight.flatten(1)
        offset = taps @ self.pointwise.bias
        z = torch.baddbmm(offset[:, :, None], folded, x.flatten(2))
        # the CPU's fold sums in the dtype of z
        wide = torch.promote_types(z.dtype, torch.float32)
        return F.fold(z.to(wide), x.shape[2:], KERNEL, padding=KERNEL // 2)


class _UpConvNormReLU(ConvNormReLU):
    """relu(norm(conv3x3(up(x)))).  torch.compile decides by itself what to keep, and a folded convolution is for inference."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, relu = self
        if torch.compiler.is_compiling() or convolution.bias is not None:
            return relu(norm(convolution(_up(x))))
        dtype = autocast_dtype(x)
        operands = x, convolution.weight
        return relu(norm(_UpConv.apply(*(operands if dtype is None else (t.to(dtype) for t in operands)))))


class _UpConv(torch.autograd.Function):
    """conv3x3(up(x)), padded with zeros, of which x and the weight are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(_up(x), weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        enlarged = _up(x)
        for_enlarged, for_weight, _ = torch.ops.aten.convolution_backward(
            grad, enlarged, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [for_x, for_weight, False]
        )
        if not for_x:
            return None, for_weight
        sizes = enlarged.shape[2:], x.shape
        return torch.ops.aten.upsample_bilinear2d_backward(for_enlarged, *sizes, False, 2.0, 2.0), for_weight


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
