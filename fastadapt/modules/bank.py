"""All side adapters of a frozen tower as one module and one operation: M2IST's banks, and the gated ladder of LST."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import SideTap, side_fusion
from fastadapt.core.checks import fail
from fastadapt.modules.adapters import norm_arguments
from fastadapt.modules.side import SideAdapter


class SideAdapterBank(nn.Module):
    """The side adapters of one frozen tower and their sum, in one operation (Liu et al., "M2IST", 2024).

        out = sum_b base_b + sum_i adapter_i(tap_i)

    `adapters` are the SideAdapters, whose parameters the operation reads: hooks on them, and their forward, do not run.  One
    bank serves one tower; adapters of several banks may hold the same `shared_up`, whose gradient is then the sum of theirs.
    Each tower's part comes in the parameters' dtype, and autograd adds the parts up in it: leave the parameters float32, which
    taps of 16 bits and autocast allow, for a float32 sum.

    Args:
        adapters: SideAdapters of one width of result.

    Raises:
        ValueError: no adapters, or something else among them.

    `m2ist` makes the two banks of the method.  Numerics, errors and what is kept for the backward, taps and parameters alone,
    are `fastadapt.side_fusion`'s.
    """

    def __init__(self, adapters: Iterable[SideAdapter]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        others = [type(adapter).__name__ for adapter in self.adapters if not isinstance(adapter, SideAdapter)]
        if others or len(self.adapters) == 0:
            fail("adapters", "at least one SideAdapter and nothing else", ", ".join(others) or "none")

    @classmethod
    def m2ist(
        cls,
        attention_norms: Sequence[nn.LayerNorm],
        output_norms: Sequence[nn.LayerNorm],
        vision_dim: int = 256,
        bottleneck: int = 128,
        **like: Any,
    ) -> tuple[SideAdapterBank, SideAdapterBank]:
        """The banks of M2IST's vision and text tower, (vision, text), whose interaction experts share their up-projections.

        Each has for every layer i the adapters 2 i, which reads the layer's attention, and 2 i + 1, which reads its
        feed-forward network: taps are m_0, f_0, m_1, f_1 and so on.

            vision: V = E + S + sum_i relu(m_i D^T + d) S_i^T + s_i  +  0.1 (relu(LN(f_i) D^T + d) U^T + u)
            text:   T = H + X + sum_i LN_a([r U^T + u | r S_i^T + s_i])  +  LN_o(0.1 (relu(LN(g_i) D^T + d) U^T + u))

        with r = relu(a_i D^T + d); E, S, H and X, what the towers end and begin with, are the bases.

        Args:
            attention_norms: of each layer of the text tower, the LayerNorm behind its attention, LN_a.
            output_norms: of each, the LayerNorm that ends it, LN_o.  Both become frozen, and stay the tower's.
            vision_dim: width of the vision tower; the text tower's is the norms'.
            bottleneck: width of every hidden layer.
            like: device and dtype of the parameters.

        Six layers of the released widths, 256 and 768, have 2,975,232 parameters (`SideAdapter` says which of the released
        3,185,794 are left out).
        """
        if len(attention_norms) != len(output_norms) or len(output_norms) == 0:
            fail("output_norms", f"{max(len(attention_norms), 1)} LayerNorms, as attention_norms", len(output_norms))
        vision, text = [], []
        for attention_norm, output_norm in zip(attention_norms, output_norms):
            pair = SideAdapter.iea_pair(attention_norm, vision_dim, bottleneck, **like)
            vision += [pair[0], SideAdapter.vea(vision_dim, bottleneck, **like)]
            text += [pair[1], SideAdapter.lea(output_norm, bottleneck, **like)]
        return cls(vision), cls(text)

    def forward(self, taps: Sequence[Tensor], bases: Sequence[Tensor] = ()) -> Tensor:
        """The sum of the bases and of every adapter's result.

        Args:
            taps: (..., in_features) for each adapter, requiring no gradient; in the parameters' dtype, or float16 or bfloat16
                where they are float32.
            bases: (..., out_features) each, in the taps' dtype or float32.

        Returns:
            (..., out_features), in the taps' dtype (autocast's under autocast), in the widest base's where there are bases.
        """
        _check_count(taps, len(self.adapters))
        return side_fusion([_side_tap(adapter, tap) for adapter, tap in zip(self.adapters, taps)], bases)


def _check_count(taps: Sequence[Tensor], count: int) -> None:
    if len(taps) != count:
        fail("taps", f"{count}, one for each adapter", len(taps))


def _side_tap(adapter: SideAdapter, tap: Tensor) -> SideTap:
    """What `side_fusion` has to be told of an adapter."""
    layers = {"down": adapter.down_proj, "up": adapter.up_proj, "shared": adapter.shared_up, "out_norm": adapter.output_norm}
    found = {name: layer for name, layer in layers.items() if layer is not None}
    tensors = {f"{name}_weight": layer.weight for name, layer in found.items()}
    tensors |= {f"{name}_bias": layer.bias for name, layer in found.items()}
    if adapter.output_norm is not None:
        tensors["out_norm_eps"] = adapter.output_norm.eps
    return SideTap(tap, **tensors, **norm_arguments(adapter.norm), scale=adapter.scale)


class SideLadder(nn.Module):
    """A gated ladder beside a frozen tower, without blocks of its own between its steps, in one operation.

        s_i = g_i s_(i-1) + (1 - g_i) (tap_i D_i^T + d_i),      g_i = sigmoid(alpha_i / temperature),      i = 1 ... L

    (Sung et al., "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022, section 3.2.)
    The recurrence is a sum, s_L = c_0 s_0 + sum_i c_i (tap_i D_i^T + d_i), with c_i = (1 - g_i) prod_(j > i) g_j and
    c_0 = prod_j g_j: the c_i are multiplied into the weights, and no state but the last exists.  A ladder that has blocks
    between its steps calls `step` for each.

    `down_projs` hold D_i and d_i, which start as nn.Linear's, and `gates` the alpha_i, which start at zero.

    Args:
        in_features: the width of every tap.
        width: of the ladder's state.
        temperature: more than 0.
        device, dtype: of the parameters; float32 ones round no weight when the c_i are multiplied in.

    Raises:
        ValueError: no taps, or a temperature that is not above 0.

    Numerics and errors are `fastadapt.side_fusion`'s.  Kept for the backward are the taps, s_0 and the weights' products.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        width: int,
        *,
        temperature: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(in_features) == 0:
            fail("in_features", "at least one width", "none")
        if not temperature > 0:
            fail("temperature", "a number above 0", temperature)
        like = {"device": device, "dtype": dtype}
        self.temperature = temperature
        self.down_projs = nn.ModuleList(nn.Linear(features, width, **like) for features in in_features)
        self.gates = nn.Parameter(torch.empty(len(in_features), **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: the linears as torch would, the gates half open."""
        for linear in self.down_projs:
            linear.reset_parameters()
        nn.init.zeros_(self.gates)

    def forward(self, taps: Sequence[Tensor], state: Tensor | None = None) -> Tensor:
        """The last state.

        Args:
            taps: (..., in_features[i]) for each step, requiring no gradient; in the parameters' dtype, or float16 or bfloat16
                where they are float32.
            state: s_0 (..., width), in the taps' dtype or float32; None for zero.

        Returns:
            s_L (..., width), in the taps' dtype (autocast's under autocast), in a state's where there is one.
        """
        _check_count(taps, len(self.down_projs))
        closed, kept = self._gates()
        kept = torch.cat((kept, kept.new_ones(1)))  # of no later step
        after = kept.flip(0).cumprod(0).flip(0)  # of what is there before step i, what is left after the last
        shares = closed * after[1:]
        return self._sum(self.down_projs, taps, shares.unbind(), after[0], state)

    def step(self, i: int, tap: Tensor, state: Tensor) -> Tensor:
        """s_(i+1) of s_i, counting from 0: the ladder's own part of a step, for a caller who has blocks between steps."""
        closed, kept = self._gates()
        return self._sum([self.down_projs[i]], [tap], [closed[i]], kept[i], state)

    def _gates(self) -> tuple[Tensor, Tensor]:
        """1 - g and g, the first as a sigmoid too, which costs it no digits; in at least float32."""
        slopes = self.gates.to(torch.promote_types(self.gates.dtype, torch.float32)) / self.temperature
        return torch.sigmoid(-slopes), torch.sigmoid(slopes)

    @staticmethod
    def _sum(
        linears: Iterable[nn.Linear], taps: Sequence[Tensor], shares: Sequence[Tensor], kept: Tensor, state: Tensor | None
    ) -> Tensor:
        """kept s + sum_i share_i (tap_i D_i^T + d_i)."""
        adapters = [
            SideTap(tap, share * linear.weight, share * linear.bias, activation="identity")
            for tap, share, linear in zip(taps, shares, linears)
        ]
        return side_fusion(adapters, () if state is None else [kept * state])

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
