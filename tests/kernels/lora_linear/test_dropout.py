"""Dropout: the masks are random enough, and every part of an operation sees the same ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from fastadapt.core import philox
from fastadapt.kernels.lora_linear import config
from tests.kernels.lora_linear.calls import BACKENDS, DEVICE, SEED, Call, Member, fused, make

ROWS, COLUMNS = 1000, 768
P = 0.1


@pytest.fixture(scope="module")
def masks() -> list[Tensor]:
    """Query's, key's and value's."""
    return [philox.keep_mask(torch.tensor([20261121]), ROWS, COLUMNS, P, member) for member in range(3)]


def keeps_as_often_as(mask: Tensor, keep: float) -> bool:
    """Whether the number kept is within four standard deviations of that of independent draws."""
    expected, deviation = keep * mask.numel(), (keep * (1 - keep) * mask.numel()) ** 0.5
    return abs(mask.sum().item() - expected) < 4 * deviation


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    mask = philox.keep_mask(torch.tensor([7]), ROWS, COLUMNS, p)
    keep = 1 / philox.inv_keep(p)
    assert keeps_as_often_as(mask, keep)
    for piece in range(8):
        assert keeps_as_often_as(mask[:, piece::8], keep)
    # of 1768 rows and columns none is out of line: the chance that one is beyond five deviations is 0.1 %
    for dim, size in ((0, ROWS), (1, COLUMNS)):
        deviation = (keep * (1 - keep) * size) ** 0.5
        assert ((mask.sum(dim) - keep * size).abs() < 5 * deviation + 1).all()


def chi_square(a: Tensor, b: Tensor) -> float:
    """Pearson's statistic of two masks' 2 x 2 table: chi-square with one degree of freedom if they are independent."""
    table = torch.stack([(x & y).sum() for x in (a, ~a) for y in (b, ~b)]).double().view(2, 2)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    return ((table - expected).square() / expected).sum().item()


INDEPENDENT = 15.1  # exceeded by one independent pair in 10 000


def test_the_statistic_sees_dependence(masks):
    mask = masks[0]
    slightly = torch.where(torch.rand(mask.shape) < 0.01, mask, masks[1])  # one element in a hundred is shared
    assert chi_square(mask, slightly) > INDEPENDENT


@pytest.mark.parametrize("distance", [1, 2, 4, 7, 8, 16, 64])
def test_neighbours_are_independent(masks, distance):
    mask = masks[0]
    assert chi_square(mask[:, :-distance], mask[:, distance:]) < INDEPENDENT
    assert chi_square(mask[:-distance], mask[distance:]) < INDEPENDENT
    assert chi_square(mask[:-distance, :-distance], mask[distance:, distance:]) < INDEPENDENT


def test_the_eight_pieces_of_one_philox_call_are_independent(masks):
    pieces = [masks[0][:, piece::8] for piece in range(8)]
    found = [chi_square(a, b) for a, b in combinations(pieces, 2)]
    assert max(found) < INDEPENDENT
    assert 0.5 < sum(found) / len(found) < 1.9  # 28 of mean 1


def test_query_key_and_value_are_independent(masks):
    for a, b in combinations(masks, 2):
        assert chi_square(a, b) < INDEPENDENT
        assert chi_square(a[:, 1:], b[:, :-1]) < INDEPENDENT


def test_neighbouring_seeds_are_independent(masks):
    other = philox.keep_mask(torch.tensor([20261122]), ROWS, COLUMNS, P)
    assert chi_square(masks[0], other) < INDEPENDENT


SIZE, MEMBERS = 72, 2


def transparent(dropout_p: float, dtype: torch.dtype = torch.float32) -> Call:
    """x = 1, W = 0, A = B = I: (1 - p) y_g = m_g, (1 - p) dx = sum_g m_g dy_g and (1 - p) dA_g = dy_g^T m_g."""
    eye = torch.eye(SIZE, dtype=dtype, device=DEVICE)
    members = tuple(Member(torch.zeros_like(eye), None, eye.clone(), eye.clone()) for _ in range(MEMBERS))
    return Call(torch.ones_like(eye), members, (1.0,) * MEMBERS, dropout_p).requiring("x", "lora_a")


def decided_by_a_bit(seed: Tensor) -> float:
    """A probability of about 0.3 at which some element's number is the threshold, so that `>` for `>=` would show."""
    for numbers in range(20000, 30000):
        p, following = numbers / 65536, (numbers + 1) / 65536
        if not torch.equal(philox.keep_mask(seed, SIZE, SIZE, p), philox.keep_mask(seed, SIZE, SIZE, following)):
            return p
    raise AssertionError("no number of any element lies in the range")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "algorithm"), [(None, ""), ("reference", ""), ("triton", "fused"), ("triton", "split")]
)
def test_forward_and_backward_see_the_documented_mask_bit_for_bit(backend, algorithm, dtype, monkeypatch):
    if algorithm:
        monkeypatch.setattr(config, "algorithm", lambda problem: algorithm)
    torch.manual_seed(SEED)
    seed = philox.draw_seed(DEVICE)
    p = decided_by_a_bit(seed)
    masks = [philox.keep_mask(seed, SIZE, SIZE, p, g) for g in range(MEMBERS)]
    call = transparent(p, dtype)
    torch.manual_seed(SEED)
    outputs = fused(backend)(call)
    eye = torch.eye(SIZE, dtype=dtype, device=DEVICE)
    grads_of_downs = torch.autograd.grad(
        outputs, [member.lora_a for member in call.members], [eye] * MEMBERS, retain_graph=True
    )
    for mask, y, grad in zip(masks, outputs, grads_of_downs):
        assert torch.equal(y != 0, mask) and torch.equal(grad != 0, mask)
    # each member's mask is a bit of its own in the sum over members
    (dx,) = torch.autograd.grad(outputs, call.x, [torch.full_like(eye, 2.0**g) for g in range(MEMBERS)])
    assert torch.equal((dx / philox.inv_keep(p)).round().long(), sum(mask << g for g, mask in enumerate(masks)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_share_one_run_of_rows(backend):
    call = transparent(0.3)
    flat, folded = call, replace(call, x=call.x.detach().view(4, 2, 9, SIZE))
    torch.manual_seed(SEED)
    expected = fused(backend)(flat)
    torch.manual_seed(SEED)
    for y, folded_y in zip(expected, fused(backend)(folded)):
        assert torch.equal(folded_y.view(SIZE, SIZE), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_draw_two_masks_and_a_group_one_seed(backend):
    call = make((40, 24), dropout_p=0.5, dtype=torch.float32)
    torch.manual_seed(SEED)
    first, second = fused(backend)(call)[0], fused(backend)(call)[0]
    assert not torch.equal(first, second)
    q, k, v = fused(backend)(replace(call, members=call.members * 3, scales=call.scales * 3))
    assert not torch.equal(q, k) and not torch.equal(k, v) and not torch.equal(q, v)


def test_the_mean_is_that_without_dropout():
    """E[y] = y(p = 0): the scale 1 / (1 - p) is the realised probability's."""
    call = transparent(0.3)
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64, device=DEVICE)
    draws = 300
    for _ in range(draws):
        total += fused()(call)[0].detach()
    deviation = (0.3 / 0.7 / (draws * SIZE * SIZE)) ** 0.5
    assert abs(total.mean().item() / draws - 1) < 4 * deviation
