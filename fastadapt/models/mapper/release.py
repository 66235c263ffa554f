"""What MaPPER's released code builds beside what it runs."""

from __future__ import annotations

from torch import nn


class DeadModules(nn.Module):
    """The released code's modules that nothing runs: a linear of the prior in every DyPA, 49,248 parameters at its sizes."""

    def __init__(self, prior_dim: int, bottleneck: int, count: int) -> None:
        super().__init__()
        self.clip_down_proj = nn.ModuleList(nn.Linear(prior_dim, bottleneck) for _ in range(count))
