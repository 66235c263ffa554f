"""ETRIS's neck and head in plain PyTorch, and with the parameters that the release has beside those that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import HierarchicalAlignment, Projector


class Neck(HierarchicalAlignment):
    """`fastadapt.HierarchicalAlignment`; dead: with the gates' queries and keys too, which it does not run."""

    def __init__(self, *args: Any, dead: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dead = nn.ModuleList(DeadProjections(self.width) for _ in self.gates) if dead else None


class DeadProjections(nn.Module):
    """The queries and keys of an attention with one key, which is the same whatever they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)


class EagerNeck(Neck):
    """The same with the coordinates appended to the map."""

    def forward(self, features: Sequence[Tensor], sentence: Tensor) -> Tensor:
        sentence = self.sentence_proj(sentence)
        levels = [projection(feature) for projection, feature in zip(self.projections, features)]
        x = self.aggregation(torch.cat([self._gated(i, level, sentence) for i, level in enumerate(levels)], 1))
        convolution, *rest = self.coordinate_conv
        height, width = x.shape[2:]
        place = convolution.coordinates(height, width, like=x).expand(len(x), -1, -1, -1)
        x = F.conv2d(torch.cat([x, place], 1), convolution.weight, padding=convolution.padding)
        for module in rest:
            x = module(x)
        return self.output_conv(x)

    def _gated(self, index: int, level: Tensor, sentence: Tensor) -> Tensor:
        return level * self.gates[index](sentence)[:, :, None, None]


class EagerProjector(Projector):
    """`fastadapt.Projector` as its equations say, with a convolution of as many groups as there are samples."""

    def forward(self, vision: Tensor, sentence: Tensor) -> Tensor:
        x = vision
        for block in (self.conv1, self.conv2):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            for module in block:
                x = module(x)
        x = self.pointwise(x)
        kernel = self.kernel(sentence)
        weight, bias = kernel[:, :-1].unflatten(1, (self.width, 3, 3)), kernel[:, -1]
        return F.conv2d(x.flatten(0, 1)[None], weight, bias, padding=1, groups=len(x)).transpose(0, 1)
