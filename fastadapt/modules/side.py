"""M2IST's side adapters, which read a frozen tower and never re-enter it (Liu et al., "M2IST", 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import bottleneck_adapter
from fastadapt.core.checks import fail
from fastadapt.modules.adapters import check_bottleneck, norm_arguments


def _normal(tensor: Tensor) -> None:
    nn.init.normal_(tensor, std=0.02)  # looked up here: transformers replaces it while it loads a model


class SideAdapter(nn.Module):
    """A bottleneck adapter whose up-projection may be shared, in whole or in part, and its result normalised by the tower.

        y = LN_out(scale * (relu(LN(x) D^T + d) [U; S]^T + [u, s])) + residual

    `down_proj` holds D and d, `up_proj` this adapter's own U and u, and `shared_up` S and s, which make the last columns of y,
    in an nn.Linear that other adapters hold too: one object, which is in the state dict of each, and whose gradient is the sum
    of theirs.  Whoever makes it initialises it.  The weights are stacked, not the results, so that one operation does all
    before LN_out.  LN, LN_out and one of the two projections may be absent.

    `output_norm`, LN_out, stays the tower's: it is frozen, and in neither this module's parameters nor its state dict; it moves
    and changes dtype with the tower, and y has its dtype.  A copy of the whole model keeps the tie.

    The weights start Xavier-uniform, or from N(0, 0.02) where there is an output_norm, and the biases at zero: as in the
    released code, but for the biases of the vision side, which start there from U(0, 1).  No weight starts at zero, for at a
    constant the gradient of LN_out is at its greatest, 1 / sqrt(eps).

    Args:
        in_features: width of x.
        bottleneck: width of the hidden layer, at least 1.
        out_features: width of y; in_features by default.  Of them `up_proj` makes those that `shared_up` does not.
        norm: whether x is normalised first.
        scale: a number.
        shared_up: nn.Linear(bottleneck, at most out_features) with a bias.
        output_norm: nn.LayerNorm(out_features) with a weight, which becomes frozen.
        device, dtype: of this adapter's own parameters.

    Raises:
        ValueError: a bottleneck, a shared_up or an output_norm that is not as above.

    `vea`, `lea` and `iea_pair` make the forms of the method, with the released sizes by default.  Six layers of VEA, LEA and a
    pair of IEA have 2,975,232 parameters.  The released code has 210,562 more that nothing uses: a second LayerNorm in each
    VEA (66,944 instead of 66,432) and LEA (200,576 instead of 199,040), and 198,274 outside of them.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int | None = None,
        *,
        norm: bool = False,
        scale: float = 1.0,
        shared_up: nn.Linear | None = None,
        output_norm: nn.LayerNorm | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        check_bottleneck(bottleneck)
        _check(bottleneck, out_features, shared_up, output_norm)
        own_features = out_features - (0 if shared_up is None else shared_up.out_features)
        self.scale = scale
        like = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(in_features, **like) if norm else None
        self.down_proj = nn.Linear(in_features, bottleneck, **like)
        self.up_proj = nn.Linear(bottleneck, own_features, **like) if own_features else None
        self.shared_up = shared_up
        # past nn.Module's own __setattr__, which would make the tower's module a child of this one as well
        object.__setattr__(self, "output_norm", None if output_norm is None else output_norm.requires_grad_(False))
        self.reset_parameters()

    @classmethod
    def vea(cls, dim: int = 256, bottleneck: int = 128, **like: Any) -> SideAdapter:
        """The vision expert adapter: y = 0.1 * (relu(LN(x) D^T + d) U^T + u).

        x is the output of the layer's second feed-forward linear.
        """
        return cls(dim, bottleneck, norm=True, scale=0.1, **like)

    @classmethod
    def lea(cls, output_norm: nn.LayerNorm, bottleneck: int = 128, **like: Any) -> SideAdapter:
        """The language expert adapter: y = LN_out(0.1 * (relu(LN(x) D^T + d) U^T + u)).

        x is the output of the layer's second feed-forward linear, and output_norm the LayerNorm that ends the layer.
        """
        return cls(output_norm.normalized_shape[-1], bottleneck, norm=True, scale=0.1, output_norm=output_norm, **like)

    @classmethod
    def iea_pair(
        cls, output_norm: nn.LayerNorm, vision_dim: int = 256, bottleneck: int = 128, **like: Any
    ) -> tuple[SideAdapter, SideAdapter]:
        """The interaction expert adapters of a vision and a text layer, (vision, text), which share S and s.

            y_vision = relu(x D_v^T + d_v) S^T + s
            y_text   = LN_out([r U^T + u | r S^T + s]),      r = relu(x D_t^T + d_t)

        x is the output of the layer's attention: for vision before the residual and the LayerNorm, for text after them, and
        this LayerNorm is output_norm.
        """
        shared_up = nn.Linear(bottleneck, vision_dim, **like)
        _start(shared_up, _normal)
        vision = cls(vision_dim, bottleneck, shared_up=shared_up, **like)
        text = cls(output_norm.normalized_shape[-1], bottleneck, shared_up=shared_up, output_norm=output_norm, **like)
        return vision, text

    def reset_parameters(self) -> None:
        """Start this adapter's own parameters anew; shared_up and output_norm stay as they are."""
        if self.norm is not None:
            self.norm.reset_parameters()
        for linear in (self.down_proj, self.up_proj):
            if linear is not None:
                _start(linear, nn.init.xavier_uniform_ if self.output_norm is None else _normal)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """The adapter of every row of x.

        Args:
            x: (..., in_features), in the parameters' dtype, or float16 or bfloat16 where they are float32.
            residual: (..., out_features), added to the result: the sum of the side outputs so far.

        Returns:
            y, (..., out_features), in the dtype of `fastadapt.bottleneck_adapter`'s result; where there is an output_norm, in
            its dtype, or a wider residual's.
        """
        ups = [up for up in (self.up_proj, self.shared_up) if up is not None]
        y = bottleneck_adapter(
            x,
            self.down_proj.weight,
            self.down_proj.bias,
            _stacked([up.weight for up in ups]),
            _stacked([up.bias for up in ups]),
            **norm_arguments(self.norm),
            scale=self.scale,
            residual=residual if self.output_norm is None else None,
        )
        if self.output_norm is None:
            return y
        y = self.output_norm(y.to(self.output_norm.weight.dtype))
        return y if residual is None else y + residual

    def extra_repr(self) -> str:
        return f"scale={self.scale}, output_norm={self.output_norm}"


def _start(linear: nn.Linear, weights: Callable[[Tensor], Tensor]) -> None:
    weights(linear.weight)
    nn.init.zeros_(linear.bias)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _check(bottleneck: int, out_features: int, shared_up: nn.Linear | None, output_norm: nn.LayerNorm | None) -> None:
    if shared_up is not None and not (
        isinstance(shared_up, nn.Linear)
        and shared_up.in_features == bottleneck
        and shared_up.out_features <= out_features
        and shared_up.bias is not None
    ):
        fail("shared_up", f"a torch.nn.Linear({bottleneck}, at most {out_features}) with a bias", shared_up)
    if output_norm is not None and not (
        isinstance(output_norm, nn.LayerNorm)
        and output_norm.normalized_shape == (out_features,)
        and output_norm.weight is not None
    ):
        fail("output_norm", f"a torch.nn.LayerNorm({out_features}) with a weight", output_norm)
