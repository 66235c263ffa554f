"""Depthwise convolution of tokens in Triton: the forward and the backward, as sequences of kernel launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.core.launch import launch
from fastadapt.kernels.local_dwconv import config
from fastadapt.kernels.local_dwconv import triton_kernel as kernels
from fastadapt.kernels.local_dwconv.config import Problem

SUM_SPLITS, SUM_CHANNELS = 32, 64


def forward(
    tensors: Sequence[Tensor | None], height: int, width: int, prefix_tokens: int, dilation: int
) -> list[Tensor]:
    """[y], as reference.forward."""
    x, weight, bias = tensors
    problem = problem_of(x, weight, height, width, dilation)
    return [convolve(problem, x, weight, None if bias is None else bias.contiguous(), prefix_tokens, flip=False)]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    height: int,
    width: int,
    prefix_tokens: int,
    dilation: int,
) -> list[Tensor]:
    """The gradients of x, weight and bias that `needs` marks, as reference.backward."""
    x, weight = saved
    need_x, need_weight, need_bias = needs
    grad = with_adjacent_channels(grads[0])
    problem = problem_of(grad, weight, height, width, dilation)
    wanted = [convolve(problem, grad, weight, None, prefix_tokens, flip=True)] if need_x else []
    if need_weight:
        return wanted + parameter_gradients(problem, x, grad, weight, prefix_tokens, need_bias)
    if need_bias:
        wanted.append(grad[:, prefix_tokens:].sum((0, 1), dtype=torch.float32).to(weight.dtype))
    return wanted


def convolve(problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, prefix_tokens: int, flip: bool) -> Tensor:
    """The convolution of x, with the kernel turned by half a turn if `flip`."""
    x = with_adjacent_channels(x)
    tiles = config.conv_tiles(problem)
    y = x.new_empty(x.shape)
    launch(
        kernels.conv_kernel, (tiles.channel_tiles * tiles.count * problem.batch,),
        x, weight.permute(1, 2, 0).contiguous(), bias, y, *x.stride()[:2], problem.height, problem.width, problem.channels,
        prefix_tokens, problem.dilation, tiles.residues, tiles.count, tiles.column_tiles, tiles.channel_tiles,
        device=x.device, FLIP=flip, KH=problem.kh, KW=problem.kw, ROWS=tiles.rows, COLUMNS=tiles.columns,
        CHANNELS=tiles.channels, num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
    return y


def parameter_gradients(
    problem: Problem, x: Tensor, grad: Tensor, weight: Tensor, prefix_tokens: int, need_bias: bool
) -> list[Tensor]:
    """The gradient of the weight and, if it is wanted, that of the bias."""
    x = with_adjacent_channels(x)
    tiles, groups = config.weight_grad_tiles(problem), config.kernel_groups(problem)
    splits = config.tile_splits(problem, tiles)
    d_weight = torch.empty_like(weight)
    d_bias = weight.new_empty(problem.channels) if need_bias else None
    if splits == 0:
        return [gradient.zero_() for gradient in (d_weight, d_bias) if gradient is not None]
    taps = problem.kh * problem.kw
    if splits > 1:
        partials = x.new_empty(splits, taps + need_bias, problem.channels, dtype=torch.float32)
        sums = partials[:, :taps].unflatten(1, (problem.kh, problem.kw))
        bias_sums = partials[:, taps] if need_bias else None
    else:
        partials, sums, bias_sums = None, d_weight.permute(1, 2, 0)[None], d_bias
    launch(
        kernels.weight_grad_kernel, (tiles.channel_tiles * groups, splits),
        x, grad, sums, bias_sums, *x.stride()[:2], *grad.stride()[:2], *sums.stride(), problem.height, problem.width,
        problem.channels, prefix_tokens, problem.dilation, tiles.residues, problem.batch, tiles.count, tiles.column_tiles,
        -(-problem.batch * tiles.count // splits), groups,
        device=x.device, KH=problem.kh, KW=problem.kw, GROUP=config.KERNEL_COLUMNS[problem.kh], ROWS=tiles.rows,
        COLUMNS=tiles.columns, CHANNELS=tiles.channels, num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
    if partials is not None:
        launch(
            kernels.sum_kernel, (taps + need_bias, -(-problem.channels // SUM_CHANNELS)),
            partials, d_weight, d_bias, splits, problem.channels, *d_weight.stride(),
            device=x.device, KH=problem.kh, KW=problem.kw, SPLITS=SUM_SPLITS, CHANNELS=SUM_CHANNELS, num_warps=4, num_stages=2,
        )  # fmt: skip
    return [d_weight, d_bias] if need_bias else [d_weight]


def problem_of(x: Tensor, weight: Tensor, height: int, width: int, dilation: int) -> Problem:
    """The numbers the choice of tiles depends on."""
    batch, _, channels = x.shape
    return config.problem(batch, height, width, channels, tuple(weight.shape[1:]), dilation, x.dtype, x.device)


def with_adjacent_channels(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy where its last dimension has another stride than 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
