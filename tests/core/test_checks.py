"""Every check names the argument, what was expected and what came, and lets right values pass."""

from __future__ import annotations

import re

import pytest
import torch

from fastadapt.core import checks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.0, "w: expected a tensor, got float"),
        (None, "w: expected a tensor, got NoneType"),
        (torch.zeros(2), "w: expected shape (any, 3), got shape (2,)"),
        (torch.zeros(2, 4), "w: expected shape (any, 3), got shape (2, 4)"),
        (torch.zeros(2, 3, dtype=torch.int8), "w: expected float32, float16, bfloat16 or float64, got torch.int8"),
        (torch.zeros(2, 3, device="meta"), "w: expected a tensor on cpu, where the others are, got one on meta"),
    ],
)
def test_tensor(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checks.check_tensor("w", value, (None, 3), CPU)


@pytest.mark.parametrize("dtype", checks.FLOATS, ids=str)
def test_good_tensors_pass(dtype):
    checks.check_tensor("w", torch.zeros(0, 3, dtype=dtype), (None, 3), CPU)
    checks.check_input("x", torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([1.0], "list"),
        (torch.zeros(()), "torch.float32 of shape ()"),
        (torch.zeros(2, dtype=torch.int64), "torch.int64 of shape (2,)"),
    ],
)
def test_input(value, got):
    message = f"^x: expected a floating-point tensor of at least one dimension, got {re.escape(got)}$"
    with pytest.raises(ValueError, match=message):
        checks.check_input("x", value)


def test_dtype():
    allowed = (torch.float16, torch.float32)
    checks.check_dtype("a", None, allowed)
    checks.check_dtype("a", torch.zeros(1), allowed)
    with pytest.raises(ValueError, match="^a: expected torch.float16 or torch.float32, got torch.float64$"):
        checks.check_dtype("a", torch.zeros(1).double(), allowed)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 2, float("nan"), "0.1", None, True, False])
def test_probability(value):
    with pytest.raises(ValueError, match=f"^p: expected a number p with 0 <= p < 1, got {value!r}$"):
        checks.check_probability("p", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "2", None, True, torch.ones(())])
def test_number(value):
    with pytest.raises(ValueError, match=f"^s: expected a finite number, got {re.escape(repr(value))}$"):
        checks.check_number("s", value)


def test_good_numbers_pass():
    for p in (0, 0.0, 0.5, 0.999):
        checks.check_probability("p", p)
    for number in (0, -3, 1.5, 1e300):
        checks.check_number("s", number)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (0, "num_heads: expected an integer of at least 1, got 0"),
        (True, "num_heads: expected an integer of at least 1, got True"),
        (2.0, "num_heads: expected an integer of at least 1, got 2.0"),
        (5, "num_heads: expected a divisor of q's width 12, got 5"),
    ],
)
def test_heads(heads, message):
    checks.check_heads("num_heads", 3, 12, "q")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checks.check_heads("num_heads", heads, 12, "q")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), "mask: expected None or a bool tensor, True for a key to ignore, got torch.float32"),
        ([True], "mask: expected None or a bool tensor, True for a key to ignore, got list"),
        (torch.ones(2, 4, dtype=torch.bool), "mask: expected shape (2, 3), got shape (2, 4)"),
        (torch.ones(2, 3, dtype=torch.bool, device="meta"), "mask: expected a tensor on cpu, where the others are, got one on meta"),
    ],
)
def test_padding_masks(mask, message):
    checks.check_padding_mask("mask", None, (2, 3), CPU)
    checks.check_padding_mask("mask", torch.ones(2, 3, dtype=torch.bool), (2, 3), CPU)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checks.check_padding_mask("mask", mask, (2, 3), CPU)
