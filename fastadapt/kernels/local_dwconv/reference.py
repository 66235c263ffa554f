"""Depthwise convolution of tokens in plain torch, forward and backward: the specification and the CPU path.

A sample's tokens are `prefix_tokens` of no place (CLS, registers) and then the H x W grid in raster order.  With X[i, j] the
token of row i and column j, zero outside the grid, and a = (kh - 1) / 2, b = (kw - 1) / 2, for every channel

    Y[i, j] = bias + sum_uv weight[u, v] X[i + (u - a) d, j + (v - b) d]

and, with dY the gradient of Y, likewise zero outside the grid,

    dX[i, j]      = sum_uv weight[u, v] dY[i - (u - a) d, j - (v - b) d]
    dweight[u, v] = sum_ij dY[i, j] X[i + (u - a) d, j + (v - b) d]         summed over the samples
    dbias         = sum_ij dY[i, j]                                         summed over the samples

dX is the convolution of dY with the kernel turned by half a turn.  Prefix tokens, and their gradients, pass as they are.  The
convolutions are torch's own, of views: the tokens of a grid are an image in channels-last order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """x where the gradient of the weight is wanted, and the weight."""
    x, weight, _ = tensors
    return [x if needs[1] else None, weight]


def forward(
    tensors: Sequence[Tensor | None], height: int, width: int, prefix_tokens: int, dilation: int
) -> list[Tensor]:
    """[y]: (B, prefix_tokens + H W, C) in x's dtype."""
    x, weight, bias = tensors
    bias = None if bias is None else bias.to(x.dtype)
    kernel = weight.unsqueeze(1).to(x.dtype)
    padding = same_padding(weight, dilation)
    convolved = F.conv2d(
        image(x, height, width, prefix_tokens), kernel, bias, padding=padding, dilation=dilation, groups=x.shape[-1]
    )
    return [with_prefix(x, convolved, prefix_tokens)]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    height: int,
    width: int,
    prefix_tokens: int,
    dilation: int,
) -> list[Tensor]:
    """The gradients of x, weight and bias that `needs` marks; differentiable again."""
    x, weight = saved
    grad = grads[0]
    dy = image(grad, height, width, prefix_tokens)
    channels = grad.shape[-1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        dy if x is None else image(x, height, width, prefix_tokens),  # for its shape, where the weight's gradient is not wanted
        weight.unsqueeze(1).to(grad.dtype),
        [channels],
        [1, 1],
        same_padding(weight, dilation),
        [dilation, dilation],
        False,
        [0, 0],
        channels,
        list(needs),
    )
    wanted = []
    if needs[0]:
        wanted.append(with_prefix(grad, dx, prefix_tokens))
    if needs[1]:
        wanted.append(torch.empty_like(weight).copy_(dweight.squeeze(1)))  # laid out as the weight is
    if needs[2]:
        wanted.append(dbias.to(weight.dtype))
    return wanted


def image(tokens: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """The grid of (B, prefix_tokens + H W, C) tokens as a (B, C, H, W) view."""
    return tokens[:, prefix_tokens:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def with_prefix(tokens: Tensor, image: Tensor, prefix_tokens: int) -> Tensor:
    """The prefix of these tokens, and behind it the grid of a (B, C, H, W) image."""
    return torch.cat([tokens[:, :prefix_tokens], image.flatten(2).transpose(1, 2)], 1)


def same_padding(weight: Tensor, dilation: int) -> list[int]:
    """Zeros on either side that keep the size of the grid, for a weight (C, kh, kw)."""
    return [size // 2 * dilation for size in weight.shape[1:]]
