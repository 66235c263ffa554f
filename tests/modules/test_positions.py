"""Tables of positions: values, rounding, and when they are kept."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastadapt.modules import positions

DOUBLE, CPU = torch.float64, torch.device("cpu")


def test_a_table_is_kept_for_its_size_dtype_and_device():
    made = []
    table = positions.Table(lambda *size: made.append(size) or torch.zeros(size[0], dtype=size[1], device=size[2]))
    first = table(3, like=torch.empty(2))
    assert table(3, like=torch.empty(5)) is first
    for size, like in ((4, torch.empty(1)), (3, torch.empty(1, dtype=DOUBLE)), (3, torch.empty(1, device="meta"))):
        other = table(size, like=like)
        assert (len(other), other.dtype, other.device) == (size, like.dtype, like.device)
    assert len(made) == 4


def test_a_fake_table_is_not_kept():
    table = positions.Table(positions.sine_positions)
    with FakeTensorMode():
        assert table(3, 4, like=torch.empty(1)).shape == (3, 4)
    assert type(table(3, 4, like=torch.empty(1))) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_rounded_once(dtype):
    arguments = 300, 8
    exact = positions.sine_positions(*arguments, DOUBLE, CPU)
    got = positions.sine_positions(*arguments, dtype, CPU)
    rounding = 300 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert got.dtype == dtype and (got.double() - exact).abs().max() < rounding
