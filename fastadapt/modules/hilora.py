"""A linear with several low-rank updates, which train one after another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt.core.checks import check_probability, fail
from fastadapt.core.philox import threshold
from fastadapt.modules.frozen_parts import READERS, Member, why_not_dtypes, why_not_frozen, why_not_plain


class LoraPair(nn.Module):
    """One low-rank update, s dropout(x) A^T B^T: `lora_A` (r, in_features) and `lora_B` (out_features, r).

    A starts as nn.Linear's weight would, B at zero.  dropout acts in training mode, which `HiLoraLinear`'s owner sets pair by
    pair: a frozen pair in eval mode is a constant part of the weight.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, dropout: float, **like: Any
    ) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def drops(self) -> bool:
        return self.training and threshold(self.dropout) > 0

    @property
    def trains(self) -> bool:
        return self.lora_A.requires_grad or self.lora_B.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_A), self.lora_B)


class HiLoraLinear(nn.Linear):
    """A linear with the low-rank updates of several stages of training (HiLoRA).

        y = x W^T + b + sum_k s dropout_k(x) A_k^T B_k^T,      over the pairs k with first_k <= stage;   s = lora_alpha / r

    (Xiao et al., "HiVG: Hierarchical Multimodal Fine-grained Modulation for Visual Grounding", ACM MM 2024, hierarchical
    low-rank adaptation.)  Each stage adds a pair and freezes those before it; with one pair that every stage trains on it is
    LoRA.  `weight` and `bias` are nn.Linear's, and a pair is the module `pairs[str(first)]`, frozen by requires_grad_(False)
    and kept from dropping by eval().  Pairs of later stages are there, so that a state dict serves every stage, but do nothing.

    The pairs in use that neither train nor drop are part of the weight: W + sum s B_k A_k is made when one of them has changed,
    and held (a change by way of `.data`, which leaves no trace, is not seen).  The others are updates one after another; inside
    a `FrozenBlock` or a fused transformers layer they are one, and part of the weight too where no gradient is recorded.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        first: the stage at which each pair begins, ascending.
        r: rank of a pair, at least 1.
        lora_alpha: numerator of s.
        lora_dropout: probability in [0, 1).

    Raises:
        ValueError: `first` is not ascending, r below 1, or lora_dropout outside [0, 1).
    """

    stage = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        first: Sequence[int] = (0,),
        r: int = 32,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if list(first) != sorted(set(first)):
            fail("first", "ascending stages", tuple(first))
        if r < 1:
            fail("r", "a rank of at least 1", r)
        check_probability("lora_dropout", lora_dropout)
        self.r, self.lora_alpha = r, lora_alpha
        arguments = in_features, out_features, r, lora_alpha / r, lora_dropout
        self.pairs = nn.ModuleDict({str(k): LoraPair(*arguments, device=device, dtype=dtype) for k in first})
        self._held: tuple[list[Tensor], list[tuple], Tensor] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, **lora: Any) -> HiLoraLinear:
        """A HiLoraLinear around the very parameters of `linear`; lora: first, r, lora_alpha, lora_dropout."""
        if not isinstance(linear, nn.Linear):
            fail("linear", "a torch.nn.Linear", type(linear).__name__)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **lora, **like)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    @property
    def used(self) -> list[LoraPair]:
        """The pairs that are part of the function at this stage."""
        return [pair for first, pair in self.pairs.items() if int(first) <= self.stage]

    def forward(self, x: Tensor) -> Tensor:
        live = [pair for pair in self.used if pair.trains or pair.drops]
        y = F.linear(x, self._with_all_but(live), self.bias)
        for pair in live:
            y = y + pair(x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Add the pairs in use to the weight, and set them to zero (B = 0); the function stays the same."""
        self.weight.copy_(self._updated(self.used))
        for pair in self.used:
            pair.lora_B.zero_()

    def member(self, x: Tensor) -> Member | str:
        """What a call on x reads, (W, b, A, B, s, dropout_p) with A and B None where no pair is live, or why it is more."""
        if reason := why_not_plain(self) or why_not_dtypes(x, self.weight) or why_not_frozen(self.weight):
            return reason
        live = [pair for pair in self.used if pair.drops or (pair.trains and torch.is_grad_enabled())]
        if len({pair.drops for pair in live}) > 1:
            return "some of its pairs drop elements and others do not"
        weight = self._with_all_but(live)
        if not live:
            return Member(weight, self.bias)
        lora_a, lora_b = live[0].lora_A, live[0].lora_B
        if len(live) > 1:
            lora_a, lora_b = torch.cat([pair.lora_A for pair in live]), torch.cat([pair.lora_B for pair in live], 1)
        return Member(weight, self.bias, lora_a, lora_b, live[0].scaling, live[0].dropout if live[0].drops else 0.0)

    def _with_all_but(self, live: Sequence[LoraPair]) -> Tensor:
        """W and the other pairs in use in one, held until one of them changes."""
        pairs = [pair for pair in self.used if pair not in live]
        if not pairs:
            return self.weight
        tensors = [self.weight, *(tensor for pair in pairs for tensor in (pair.lora_A, pair.lora_B))]
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return self._updated(pairs)
        state = [(t.data_ptr(), t._version, t.device, t.dtype) for t in tensors]
        if not (self._held and self._held[1] == state and all(a is b for a, b in zip(self._held[0], tensors))):
            with torch.inference_mode(False):
                self._held = tensors, state, self._updated(pairs)
        return self._held[2]

    @torch.no_grad()
    def _updated(self, pairs: Iterable[LoraPair]) -> Tensor:
        weight = self.weight
        for pair in pairs:
            weight = torch.addmm(weight, pair.lora_B, pair.lora_A, alpha=pair.scaling)
        return weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, stage={self.stage}"


READERS[HiLoraLinear] = HiLoraLinear.member
