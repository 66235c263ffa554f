"""M2IST's banks of side adapters in plain PyTorch, for the arms that do without the fused operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import SideAdapter, SideAdapterBank


class EagerSideBank(SideAdapterBank):
    """Every adapter by itself, its up-projections stacked, added to the sum one after another."""

    def forward(self, taps: Sequence[Tensor], bases: Sequence[Tensor] = ()) -> Tensor:
        total = sum(bases[1:], bases[0])
        for adapter, tap in zip(self.adapters, taps):
            ups = [up for up in (adapter.up_proj, adapter.shared_up) if up is not None]
            weight, bias = (ups[0].weight, ups[0].bias) if len(ups) == 1 else _stacked(ups)
            y = F.linear(_hidden(adapter, tap), weight, bias)
            total = total + _finished(adapter, y)
        return total


class ReleasedSideBank(SideAdapterBank):
    """As the authors run it: both up-projections, their concatenation, and the sum of a list."""

    def forward(self, taps: Sequence[Tensor], bases: Sequence[Tensor] = ()) -> Tensor:
        outputs = []
        for adapter, tap in zip(self.adapters, taps):
            r = _hidden(adapter, tap)
            ups = [up(r) for up in (adapter.up_proj, adapter.shared_up) if up is not None]
            outputs.append(_finished(adapter, ups[0] if len(ups) == 1 else torch.cat(ups, -1)))
        return sum([*bases[1:], *outputs], bases[0])


def _hidden(adapter: SideAdapter, tap: Tensor) -> Tensor:
    return F.relu(adapter.down_proj(tap if adapter.norm is None else adapter.norm(tap)))


def _finished(adapter: SideAdapter, y: Tensor) -> Tensor:
    if adapter.scale != 1.0:
        y = y * adapter.scale
    return y if adapter.output_norm is None else adapter.output_norm(y)


def _stacked(ups: Sequence[torch.nn.Linear]) -> tuple[Tensor, Tensor]:
    return torch.cat([up.weight for up in ups]), torch.cat([up.bias for up in ups])
