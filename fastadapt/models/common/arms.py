"""The three arms of every method: which implementation each part of one definition takes."""

from __future__ import annotations

from typing import Any

from fastadapt.core.checks import fail

# release: what the authors' code executes, attention maps included; strong: plain PyTorch without dead work;
# fastadapt: this package's operations
ARMS = ("release", "strong", "fastadapt")

# what transformers calls the attention of the frozen towers
ATTENTION = {"release": "eager", "strong": "sdpa", "fastadapt": "sdpa"}


def check_arm(arm: Any) -> None:
    """`arm` is one of ARMS."""
    if arm not in ARMS:
        fail("arm", f"one of {', '.join(ARMS)}", repr(arm))
