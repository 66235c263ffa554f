"""The box head that the grounding methods share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BoxHead(nn.Module):
    """(cx, cy, w, h) in (0, 1) from one vector: three linears with ReLU between them, and a sigmoid.

    At width 256 it has 132,612 parameters, at 512 it has 527,364.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, size) for size in (width, width, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., 4)"""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).sigmoid()
