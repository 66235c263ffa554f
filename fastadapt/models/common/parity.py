"""Where a release departs from its paper: options by name, each with what is done and what may be asked for instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastadapt.core.checks import fail

RELEASED = "released"


class Parity(NamedTuple):
    """One departure of the authors' code: what this package does by default, and what the option `name` does as they do."""

    name: str
    default: str
    released: str


def chosen(options: Sequence[Parity], parity: str | Iterable[str]) -> tuple[str, ...]:
    """The names of the options asked for: some of them, or all of them by the word "released"."""
    names = tuple(option.name for option in options)
    if parity == RELEASED:
        return names
    asked = {parity} if isinstance(parity, str) else set(parity)
    if unknown := asked - set(names):
        fail("parity", f"{RELEASED!r} or some of {', '.join(names)}", ", ".join(sorted(map(repr, unknown))))
    return tuple(name for name in names if name in asked)


def as_markdown(options: Sequence[Parity]) -> str:
    """The table of a method's README."""
    rows = [f"| `{option.name}` | {option.default} | {option.released} |" for option in options]
    return "\n".join(["| option | default | with the option, as released |", "|---|---|---|", *rows])
