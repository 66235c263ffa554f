"""Is a result right?  Its errors to float64 are held against those of eager torch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Errors are norm ratios to float64.  Over all tensors together a result may be this much further off than eager ...
SLACK = 1.05
# ... a single one, whose rounding errors happen to fall badly or well, this much ...
OUTLIER = 4.0
# ... and none is held to less than a few roundings of the dtype, where eager happens to be exact.
ROUNDINGS = 4


@dataclass(frozen=True)
class Verdict:
    """Errors to float64 by tensor, of the result and of eager, and how far the two are apart; a reason if wrong."""

    errors: dict[str, float]
    eager_errors: dict[str, float]
    apart: dict[str, float]
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    def values(self) -> dict[str, object]:
        """What a row keeps of it: mean (root of mean square) and worst of each, and the error of every tensor."""
        kinds = {"error": self.errors, "eager_error": self.eager_errors, "apart": self.apart}
        means = {f"{kind}_mean": _or_none(mean(errors.values())) for kind, errors in kinds.items()}
        worst = {f"{kind}_worst": _or_none(max(errors.values())) for kind, errors in kinds.items()}
        errors = {name: _or_none(error) for name, error in self.errors.items()}
        return {"tensors_count": len(errors), **means, **worst, "errors": errors}


def mean(errors: Iterable[float]) -> float:
    """Root of the mean square."""
    errors = list(errors)
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def _or_none(error: float) -> float | None:
    return error if math.isfinite(error) else None  # JSON has no infinity


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; infinite if `got` has a value that is not finite, 0 for two zeros."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return math.inf
    difference, norm = (got - want).norm().item(), want.norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


def judge(
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    slack: float = SLACK,
    roundings: float = ROUNDINGS,
) -> Verdict:
    """Compare a result's tensors and eager's with float64's, name by name.

    The result is wrong where its mean error exceeds `slack` times eager's, where one tensor's exceeds OUTLIER times
    eager's for that tensor, and where a value is missing or not finite; `roundings` of `dtype` are always allowed.
    """
    errors = {name: relative_error(got[name], want) if name in got else math.inf for name, want in exact.items()}
    eager_errors = {name: relative_error(eager[name], want) for name, want in exact.items()}
    apart = {name: relative_error(got[name], eager[name]) if name in got else math.inf for name in exact}
    least = roundings * torch.finfo(dtype).eps
    excess = {name: error / max(OUTLIER * eager_errors[name], least) for name, error in errors.items()}
    allowed = max(slack * mean(eager_errors.values()), least)
    reason = ""
    if max(excess.values()) > 1:
        worst = max(excess, key=excess.get)
        reason = f"{worst}: error {errors[worst]:.2e} to float64 where eager has {eager_errors[worst]:.2e}"
    elif mean(errors.values()) > allowed:
        reason = f"mean error {mean(errors.values()):.3e} to float64, allowed {allowed:.3e}"
    return Verdict(errors, eager_errors, apart, reason)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, so that an element nobody writes is seen."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
