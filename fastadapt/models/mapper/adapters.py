"""MaPPER's adapters in plain PyTorch, for the arms that do without the fused operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import DynamicPriorAdapter, LoCA, PriorGuidedText


class EagerLoCA(LoCA):
    """Convolution, batch norm and ReLU one after another, on a view of the patches as images."""

    def forward(self, n: Tensor) -> Tensor:
        h = F.relu(self.down_proj(n), inplace=True)
        side = math.isqrt(h.shape[1] - 1)
        patches = h[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        z1 = _stage(patches, self.point_conv, self.point_norm)
        t = _stage(patches, self.reduce_conv, self.reduce_norm)
        z2 = _stage(t, self.local_conv, self.local_norm)
        z = torch.cat([z1, z2], 1).permute(0, 2, 3, 1).flatten(1, 2)
        y = torch.cat([h[:, :1], z], 1)
        y += h
        return self.up_proj(y)


def _stage(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return F.relu(norm(convolution(x)), inplace=True)


class EagerDyPA(DynamicPriorAdapter):
    """A LayerNorm and two linears, scaled by what a LayerNorm, a linear and a ReLU make of the prior."""

    def forward(self, a: Tensor, prior: Tensor, residual: Tensor) -> Tensor:
        s = F.relu(self.gate_proj(self.prior_norm(prior)))
        return residual + s * self.up_proj(F.relu(self.down_proj(self.norm(a))))


class EagerGuide(PriorGuidedText):
    """One linear of the two states side by side."""

    def forward(self, text: Tensor, prior: Tensor) -> Tensor:
        return F.linear(torch.cat([text, prior.to(text.dtype)], -1), self.weight, self.bias)
