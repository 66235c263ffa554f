"""A bottleneck adapter whose hidden tokens meet their neighbours in the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import local_conv_adapter, local_conv_adapter_path, local_dwconv
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_dtype, check_input, check_number, check_tensor, fail
from fastadapt.modules.activation import quick_gelu
from fastadapt.modules.adapters import check_bottleneck

KERNEL_SIZES = (3, 5, 7)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "identity": lambda z: z,
}


class LocalConvAdapter(nn.Module):
    """A bottleneck adapter with a depthwise convolution between its two projections.

        y = scale * (act(conv(x D^T + d)) U^T + u) + residual,      conv(z) = c + sum_k z * w_k

    conv is over the grid of an image's patches, channel by channel, as in `fastadapt.local_dwconv`; prefix tokens (CLS,
    registers) go by it.  As convolution is linear, kernels w_k of several sizes are one: each is padded with zeros to the
    largest, and their sum convolves once.  `down_proj` holds D and d, `up_proj` U and u; `taps["3"]`, of shape
    (3, 3, bottleneck), is w_3, and `conv_bias` is c.  The weight of a depthwise nn.Conv2d becomes taps by
    weight[:, 0].permute(1, 2, 0).  D and d start as nn.Linear's, taps as nn.Conv2d's, c, U and u at zero, so that a new
    adapter changes nothing.

    A call that wants no gradient is one kernel, `fastadapt.local_conv_adapter`, where `fastadapt.local_conv_adapter_path` says
    so; any other, `fastadapt.local_dwconv` between two products.  The two round alike but for the order of sums, and the one
    kernel adds scale and residual before it rounds.

    Args:
        in_features: width of x and y.
        bottleneck: width of the hidden layer, at least 1.
        grid: (height, width) of the patches of calls that give none; None to take the square that the count of tokens makes.
        kernel_sizes: one or several of 3, 5 and 7.
        dilation: the distance between taps, in patches.
        prefix_tokens: how many tokens are before the grid.
        activation: "relu", "gelu", "quick_gelu" or "identity".
        scale: the scale of calls that give none.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is not one of those above; the message names it.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1, with the depthwise convolution of
    Jie and Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", 2022, section 3, in place of the full one.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        *,
        grid: tuple[int, int] | None = None,
        kernel_sizes: Sequence[int] = (3,),
        dilation: int = 1,
        prefix_tokens: int = 1,
        activation: str = "gelu",
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bottleneck(bottleneck)
        sizes = tuple(kernel_sizes)
        if not sizes or len(set(sizes)) < len(sizes) or not set(sizes) <= set(KERNEL_SIZES):
            fail("kernel_sizes", "one or several different ones of 3, 5 and 7", repr(kernel_sizes))
        if activation not in ACTIVATIONS:
            fail("activation", "one of " + ", ".join(ACTIVATIONS), repr(activation))
        check_number("scale", scale)
        self.grid, self.dilation, self.prefix_tokens = grid, dilation, prefix_tokens
        self.activation, self.scale = activation, scale
        like = {"device": device, "dtype": dtype}
        self.down_proj = nn.Linear(in_features, bottleneck, **like)
        # channels last in memory, as the kernels read them
        self.taps = nn.ParameterDict({str(size): torch.empty(size, size, bottleneck, **like) for size in sizes})
        self.conv_bias = nn.Parameter(torch.empty(bottleneck, **like))
        self.up_proj = nn.Linear(bottleneck, in_features, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: the down-projection and the taps as torch would, everything behind them at zero."""
        self.down_proj.reset_parameters()
        for taps in self.taps.values():
            nn.init.uniform_(taps, -1 / len(taps), 1 / len(taps))
        for parameter in (self.conv_bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(parameter)

    def kernel(self) -> Tensor:
        """The sum of all taps, each padded with zeros to the largest: (kh, kw, bottleneck)."""
        largest = max(map(len, self.taps.values()))
        same_size = [taps if len(taps) == largest else padded(taps, largest) for taps in self.taps.values()]
        return sum(same_size[1:], same_size[0])

    def forward(
        self,
        x: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        scale: float | Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The adapter of every token of x.

        Args:
            x: (B, T, in_features), T = prefix_tokens + height * width, in the parameters' dtype, or float16 or bfloat16 where
                they are float32.
            grid: (height, width), in place of the module's own.
            scale: in place of the module's own: a number, a tensor of shape () or one value a token, of shape (B, T).
            residual: (B, T, in_features), added to the result, in the dtype the adapter is computed in or float32.

        Returns:
            y, (B, T, in_features), in x's dtype (autocast's under autocast), in the residual's where there is one.

        Raises:
            ValueError: a shape or dtype is not as above, or no grid is given and the patches make no square.
        """
        check_input("x", x)
        check_tensor("x", x, (None, None, self.down_proj.in_features), self.down_proj.weight.device)
        dtype = autocast_dtype(x) or x.dtype
        scale = self.scale if scale is None else scale
        if isinstance(scale, Tensor):
            check_tensor("scale", scale, x.shape[:-1] if scale.ndim else (), x.device)
        else:
            check_number("scale", scale)
        if residual is not None:
            check_tensor("residual", residual, tuple(x.shape), x.device)
            check_dtype("residual", residual, (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,))
        grid = grid or self.grid or square_grid(x.shape[1] - self.prefix_tokens)
        kernel = self.kernel().permute(2, 0, 1)
        options = {"grid": grid, "prefix_tokens": self.prefix_tokens, "dilation": self.dilation}
        if self._path(x, grid, dtype, scale) == "fused":
            down, up = self.down_proj, self.up_proj
            adapter = down.weight, down.bias, kernel, self.conv_bias, up.weight, up.bias
            return local_conv_adapter(x, *adapter, **options, activation=self.activation, scale=scale, residual=residual)
        hidden = local_dwconv(linear(self.down_proj, x, dtype), kernel, self.conv_bias, **options)
        y = linear(self.up_proj, ACTIVATIONS[self.activation](hidden), dtype)
        if isinstance(scale, Tensor):
            y, scale = (y * (scale.unsqueeze(-1) if scale.ndim else scale)).to(dtype), 1.0
        if residual is not None:
            return torch.add(residual, y, alpha=scale)
        return y if scale == 1.0 else y * scale

    def _path(self, x: Tensor, grid: tuple[int, int], dtype: torch.dtype, scale: float | Tensor) -> str:
        size = max(map(len, self.taps.values()))
        return local_conv_adapter_path(
            x.shape[0] * x.shape[1],
            self.down_proj.in_features,
            self.down_proj.out_features,
            self.up_proj.out_features,
            grid=grid,
            kernel=(size, size),
            dilation=self.dilation,
            gradients=wants_gradients(x, scale, *self.parameters()),
            dtype=dtype,
            device=x.device,
        )

    def extra_repr(self) -> str:
        sizes = [len(taps) for taps in self.taps.values()]
        own = "grid", "dilation", "prefix_tokens", "activation", "scale"
        return ", ".join([f"kernel_sizes={sizes}", *(f"{name}={getattr(self, name)!r}" for name in own)])


def square_grid(patches: int) -> tuple[int, int]:
    """The grid of a square image of that many patches."""
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        fail("grid", f"a height and a width, as the {patches} tokens behind the prefix make no square", None)
    return side, side


def wants_gradients(*values: float | Tensor) -> bool:
    """Whether autograd is to give one of these a gradient."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def padded(taps: Tensor, size: int) -> Tensor:
    """The taps amid zeros: (size, size, width)."""
    margin = (size - len(taps)) // 2
    return F.pad(taps, (0, 0, margin, margin, margin, margin))


def linear(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer on x, computed in this dtype."""
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
