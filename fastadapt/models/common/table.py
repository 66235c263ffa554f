"""Tables of parameters in which every percentage has its denominator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn


class Row(NamedTuple):
    """Parameters of one part: how many, and how many of them are trained."""

    part: str
    total: int
    trained: int


class Share(NamedTuple):
    """One number of parameters as a part of another."""

    what: str
    count: int
    of: str
    whole: int

    @property
    def percent(self) -> float:
        return 100 * self.count / self.whole


def count_parts(model: nn.Module, parts: Mapping[str, Sequence[str]]) -> list[Row]:
    """The parameters of each part, which are those whose name fits one of its patterns and none of an earlier part's.

    A parameter with several names counts once, where its first name fits.  Parts without parameters are left out.

    Raises:
        ValueError: a parameter is of no part.
    """
    totals = {part: [0, 0] for part in parts}
    for name, parameter in model.named_parameters():
        part = part_of(name, parts)
        if part is None:
            raise ValueError(f"parts: expected a pattern for every parameter, got none for {name}")
        totals[part][0] += parameter.numel()
        totals[part][1] += parameter.numel() * parameter.requires_grad
    return [Row(part, *counts) for part, counts in totals.items() if counts[0]]


def part_of(name: str, parts: Mapping[str, Sequence[str]]) -> str | None:
    """The first part with a pattern, as of fnmatch, that fits the name."""
    return next((part for part, patterns in parts.items() if any(fnmatchcase(name, p) for p in patterns)), None)


def trained(model: nn.Module) -> int:
    """The number of trained parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
