"""Bottleneck adapters, and MaPPER's two modules that adapt text by a prior (Liu et al., "MaPPER", EMNLP 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import bottleneck_adapter
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_input, check_tensor, fail


class BottleneckAdapter(nn.Module):
    """A small two-layer network beside or behind a frozen layer, computed as one operation.

        y = scale * (act(LN(x) D^T + d) U^T + u) + residual

    (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1.)  `down_proj` holds D and d,
    `up_proj` U and u, and `norm` LN, which is None without one; the operation reads their parameters, and hooks on these
    modules do not run.  D and d start as nn.Linear's, U and u at zero, so that a new adapter changes nothing.

    Args:
        in_features: width of x.
        bottleneck: width of the hidden layer, at least 1.
        out_features: width of y; in_features by default.
        activation: "relu", "gelu", "quick_gelu" or "identity".
        norm: whether x is normalised first.
        norm_eps: what LN adds to the variance.
        scale: the scale of calls that give none.
        device, dtype: of the parameters.

    Raises:
        ValueError: a bottleneck below 1.

    Numerics and gradients are `fastadapt.bottleneck_adapter`'s.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int | None = None,
        *,
        activation: str = "relu",
        norm: bool = False,
        norm_eps: float = 1e-5,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bottleneck(bottleneck)
        self.activation, self.scale = activation, scale
        like = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(in_features, norm_eps, **like) if norm else None
        self.down_proj = nn.Linear(in_features, bottleneck, **like)
        self.up_proj = nn.Linear(bottleneck, in_features if out_features is None else out_features, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: every module as torch would, then the up-projection at zero."""
        for module in self.children():
            module.reset_parameters()
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor, *, scale: float | Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The adapter of every row of x.

        Args:
            x: (..., in_features), in the parameters' dtype, or float16 or bfloat16 where they are float32.
            scale: in place of the module's own: a number, a tensor of shape () or one value a row, of shape x.shape[:-1].
            residual: (..., out_features), added to the result.

        Returns:
            y, (..., out_features), in x's dtype (autocast's under autocast), in the residual's where there is one.
        """
        return bottleneck_adapter(
            x,
            self.down_proj.weight,
            self.down_proj.bias,
            self.up_proj.weight,
            self.up_proj.bias,
            **norm_arguments(self.norm),
            activation=self.activation,
            scale=self.scale if scale is None else scale,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scale={self.scale}"


def check_bottleneck(bottleneck: int) -> None:
    """A hidden layer has at least one unit."""
    if bottleneck < 1:
        fail("bottleneck", "a width of at least 1", bottleneck)


def norm_arguments(norm: nn.LayerNorm | None) -> dict[str, Any]:
    """What `fastadapt.bottleneck_adapter` has to be told of the LayerNorm before it."""
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


class DynamicPriorAdapter(BottleneckAdapter):
    """MaPPER's dynamic prior adapter (DyPA): a bottleneck adapter whose scale, for each token, is read from a prior.

        s = relu(LN_c(prior) w^T + c)                                one number a token, at least 0
        y = s * (relu(LN_b(a) D^T + d) U^T + u) + residual

    The prior is a frozen text encoder's state of the same token.  A token whose s is 0 gets no update and gives no gradient.
    `norm`, `down_proj` and `up_proj` are LN_b, (D, d) and (U, u); `prior_norm` and `gate_proj` are LN_c and (w, c).  U and u
    start at zero, as intended; in the released code U does not, because the encoder draws it anew from N(0, 0.02).

    Args:
        dim: width of a and y.
        prior_dim: width of the prior.
        bottleneck: width of the hidden layer.
        device, dtype: of the parameters.

    It has 53,025 parameters at the default sizes.  The released module has 69,441: the other 16,416 are a linear that nothing
    uses, `clip_down_proj`, which is left out here.  A state dict with its weight and bias loads all the same, without them.
    """

    def __init__(
        self,
        dim: int = 768,
        prior_dim: int = 512,
        bottleneck: int = 32,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, bottleneck, norm=True, device=device, dtype=dtype)
        self.prior_norm = nn.LayerNorm(prior_dim, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(prior_dim, 1, device=device, dtype=dtype)

    def gate(self, prior: Tensor) -> Tensor:
        """s, of shape prior.shape[:-1]; the prior (..., prior_dim) may be of any floating-point dtype."""
        return torch.relu(self.gate_proj(self.prior_norm(prior.to(self.gate_proj.weight.dtype)))).squeeze(-1)

    def forward(self, a: Tensor, prior: Tensor, residual: Tensor | None = None) -> Tensor:
        """The update of every token.

        Args:
            a: (..., dim), the output of the block's attention.
            prior: (..., prior_dim) with a's leading dimensions, of any floating-point dtype.
            residual: (..., dim), added to the result: the output of the block.

        Returns:
            y, (..., dim), in the dtype of `BottleneckAdapter`'s.

        Raises:
            ValueError: a shape is not as above.
        """
        check_input("a", a)
        check_tensor("prior", prior, (*a.shape[:-1], self.gate_proj.in_features), a.device)
        return super().forward(a, scale=self.gate(prior), residual=residual)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for dead in ("clip_down_proj.weight", "clip_down_proj.bias"):
            state_dict.pop(prefix + dead, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PriorGuidedText(nn.Module):
    """MaPPER's prior-guided text module (PGT): a linear of a token's two states side by side.

        y = [text | prior] W^T + b = text W_t^T + prior W_p^T + b,      W = [W_t | W_p]

    `weight` W (out_features, text_dim + prior_dim) and `bias` b (out_features,) are those of the nn.Linear it stands for, whose
    state dict loads; 983,808 parameters at the default sizes.  The two states are never put side by side: two products with
    views of W add up in place.  In 16 bits the first is rounded before the second is added.  W starts as nn.Linear's weight,
    b at zero.

    Args:
        text_dim: width of the text.
        prior_dim: width of the prior.
        out_features: width of y.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        text_dim: int = 768,
        prior_dim: int = 512,
        out_features: int = 768,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.text_dim, self.prior_dim, self.out_features = text_dim, prior_dim, out_features
        self.weight = nn.Parameter(torch.empty(out_features, text_dim + prior_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: the weight as nn.Linear's (Kaiming, a = sqrt 5), the bias at zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.bias)

    def forward(self, text: Tensor, prior: Tensor) -> Tensor:
        """The guided text.

        Args:
            text: (..., text_dim).
            prior: (..., prior_dim) with text's leading dimensions.

        Returns:
            y, (..., out_features), in text's dtype (autocast's under autocast), to which prior and parameters are cast.

        Raises:
            ValueError: a shape is not as above.
        """
        check_input("text", text)
        check_tensor("text", text, (*text.shape[:-1], self.text_dim), self.weight.device)
        check_tensor("prior", prior, (*text.shape[:-1], self.prior_dim), text.device)
        dtype = autocast_dtype(text) or text.dtype
        text_weight, prior_weight = self.weight.to(dtype).split([self.text_dim, self.prior_dim], dim=1)
        guided = F.linear(text.reshape(-1, self.text_dim).to(dtype), text_weight, self.bias.to(dtype))
        # in place, where torch.addmm would first copy what it adds to
        guided = guided.addmm_(prior.reshape(-1, self.prior_dim).to(dtype), prior_weight.t())
        return guided.view(*text.shape[:-1], self.out_features)

    @torch.no_grad()
    def folded(self, linear: nn.Linear) -> PriorGuidedText:
        """For inference, this module and the linear behind it as one frozen module: W = W_2 W_1, b = W_2 b_1 + b_2.

        Equal up to rounding to linear(self(text, prior)); this module and the linear stay as they are.  The product is taken in
        float32 (float64 for float64) and rounded once to the weight's dtype.

        Raises:
            ValueError: no nn.Linear, or one of another in_features than this module's out_features.
        """
        if not isinstance(linear, nn.Linear) or linear.in_features != self.out_features:
            fail("linear", f"a torch.nn.Linear with in_features={self.out_features}", linear)
        shape = self.text_dim, self.prior_dim, linear.out_features
        twin = PriorGuidedText(*shape, device=self.weight.device, dtype=self.weight.dtype).requires_grad_(False)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        second, bias = linear.weight.to(wide), self.bias.to(wide)
        twin.weight.copy_(second @ self.weight.to(wide))
        twin.bias.copy_(second @ bias if linear.bias is None else second @ bias + linear.bias)
        return twin

    def extra_repr(self) -> str:
        return f"text_dim={self.text_dim}, prior_dim={self.prior_dim}, out_features={self.out_features}"
