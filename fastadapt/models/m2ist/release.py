"""What M2IST's released code builds beside what it runs."""

from __future__ import annotations

from torch import nn


class DeadModules(nn.Module):
    """The released code's modules that nothing runs: 210,562 parameters at the released sizes.

    A second LayerNorm, meant for an interaction across modalities, in every VEA and LEA, and two LoRA modules of width 768 and
    rank 64, for the keys and values of a video, that the default settings switch on.
    """

    def __init__(self, vision_dim: int, text_dim: int, layers: int, rank: int = 64) -> None:
        super().__init__()
        self.vision_norms, self.text_norms = (
            nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)) for width in (vision_dim, text_dim)
        )
        self.video = nn.ModuleList(_DeadLora(text_dim, rank) for _ in ("key", "value"))


class _DeadLora(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(width, rank), nn.Linear(rank, width)
        self.scale = nn.Embedding(1, 1)  # a single number
