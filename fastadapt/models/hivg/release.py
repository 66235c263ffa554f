"""What HiVG's released code builds beside what it runs."""

from __future__ import annotations

from torch import nn


class DeadModules(nn.Module):
    """The released code's parameters that nothing runs: 847,616 with one text state at the base size.

    A projection of the sentence to the image tower's width (which mixed pre-training does run), one of all text states, and two
    tables.
    """

    def __init__(self, dim: int, text_dim: int, states: int, tokens: int, mixup: bool) -> None:
        super().__init__()
        if not mixup:
            self.condition = nn.Linear(text_dim, dim)
        self.states = nn.Linear(max(states, 1) * text_dim, dim)
        self.words, self.sentence = nn.Embedding(tokens, dim), nn.Embedding(1, text_dim)
