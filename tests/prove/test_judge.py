"""A wrong result is found out, a right one is let through."""

from __future__ import annotations

import math

import pytest
import torch

from fastadapt.prove.judge import judge, poisoned, relative_error


@pytest.fixture
def exact() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(64, 64, dtype=torch.float64) for name in ("y", "dlora_a", "dlora_b")}


def rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def test_relative_error_is_a_norm_ratio() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_what_is_not_finite_is_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    assert relative_error(torch.ones(3), torch.ones(2)) == math.inf


def test_rounding_passes(exact: dict[str, torch.Tensor]) -> None:
    verdict = judge(rounded(exact), rounded(exact), exact, torch.bfloat16)
    assert verdict.ok
    assert verdict.values()["tensors_count"] == 3
    assert verdict.values()["apart_worst"] == 0


@pytest.mark.parametrize("name", ["y", "dlora_a"])
def test_one_wrong_tensor_fails_and_is_named(exact: dict[str, torch.Tensor], name: str) -> None:
    got = rounded(exact)
    got[name] = got[name] * 1.1
    verdict = judge(got, rounded(exact), exact, torch.bfloat16)
    assert not verdict.ok
    assert verdict.reason.startswith(f"{name}: error 1.0")


def test_a_little_worse_everywhere_fails(exact: dict[str, torch.Tensor]) -> None:
    """Twice eager's rounding error in every tensor is no outlier anywhere, and still too much."""
    eager = {name: tensor * (1 + 0.1) for name, tensor in exact.items()}
    got = {name: tensor * (1 + 0.2) for name, tensor in exact.items()}
    verdict = judge(got, eager, exact, torch.bfloat16)
    assert verdict.reason.startswith("mean error 2.000e-01 to float64, allowed 1.05")
    assert judge(got, eager, exact, torch.bfloat16, slack=2.5).ok


def test_how_many_roundings_are_allowed_can_be_chosen(exact: dict[str, torch.Tensor]) -> None:
    got = {name: tensor * (1 + 2 * torch.finfo(torch.bfloat16).eps) for name, tensor in exact.items()}
    assert judge(got, exact, exact, torch.bfloat16).ok
    assert not judge(got, exact, exact, torch.bfloat16, roundings=1).ok


def test_a_missing_gradient_fails(exact: dict[str, torch.Tensor]) -> None:
    got = rounded(exact)
    del got["dlora_b"]
    verdict = judge(got, rounded(exact), exact, torch.bfloat16)
    assert verdict.reason.startswith("dlora_b: error inf")
    assert verdict.values()["error_worst"] is None


def test_unwritten_memory_is_seen() -> None:
    with poisoned():
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
