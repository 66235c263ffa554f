"""HiVG's auxiliary heads: a token's likeness to the sentence, and the segmentation head in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import SegmentationHead


class TokenHead(nn.Module):
    """u = fc2(quick_gelu(fc1(LN(y)))), which keeps two tensors of the hidden width for the backward.

    At widths 512 and 3,072 it has 3,150,336 parameters.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # quick_gelu(x) = silu(1.702 x) / 1.702, which keeps one of them
        return self.fc2(F.silu(1.702 * self.fc1(self.norm(tokens))) / 1.702)


class EagerTokenHead(TokenHead):
    """The same with CLIP's own activation, which keeps three."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fc1(self.norm(tokens))
        return self.fc2(x * torch.sigmoid(1.702 * x))


class EagerSegmentationHead(SegmentationHead):
    """Its convolutions one after another."""

    def forward(self, tokens: Tensor, sentence: Tensor, size: tuple[int, int]) -> Tensor:
        maps = self.layers(tokens.transpose(1, 2).unflatten(2, size))
        return self._compare(maps, sentence)[:, None]

    def _compare(self, maps: Tensor, sentence: Tensor) -> Tensor:
        return torch.einsum("bchw,bc->bhw", maps, sentence)


class ReleasedSegmentationHead(EagerSegmentationHead):
    """The same with the sentence repeated for every pixel."""

    def _compare(self, maps: Tensor, sentence: Tensor) -> Tensor:
        return (maps * sentence[:, :, None, None].repeat(1, 1, *maps.shape[2:])).sum(1)
