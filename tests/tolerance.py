"""How far apart two right answers may be: the one table of tolerances."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# float64: the same equation in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}

# float32: the same equation in another order, and that many layers deep
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
DEEP = {"rtol": 1e-4, "atol": 1e-4}

# Errors to float64, over those of eager torch in the same dtype: of the whole tensor, and of its worst element, by
# which a single wrong element shows.
SLACK = {2: 1.25, math.inf: 2.0}

# None is held to less than this, should eager be luckier: a rounding of the result in 16 bits, a sum in another order
# in 32.
LEAST = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}


def error(got: Tensor, exact: Tensor, order: float = 2) -> float:
    """|got - exact| / |exact| in the norm of this order; infinite where `got` has a value that is not finite."""
    got, exact = got.double().flatten(), exact.double().flatten()
    if got.shape != exact.shape or not got.isfinite().all():
        return math.inf
    apart, size = (torch.linalg.vector_norm(t, order).item() if t.numel() else 0.0 for t in (got - exact, exact))
    return apart / size if size else (0.0 if apart == 0 else math.inf)


def no_worse_than(
    ours: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    slack: Mapping[float, float] = SLACK,
) -> None:
    """Each of our tensors is as near to float64's as eager's is, times `slack`, or within LEAST of it."""
    assert ours.keys() == eager.keys() == exact.keys()
    for name, want in exact.items():
        assert (ours[name].shape, ours[name].dtype) == (eager[name].shape, eager[name].dtype), name
        for order, factor in slack.items():
            allowed = factor * max(error(eager[name], want, order), LEAST[ours[name].dtype])
            found = error(ours[name], want, order)
            assert found <= allowed, f"{name}: error {found:.2e} to float64 in the {order}-norm, allowed {allowed:.2e}"
