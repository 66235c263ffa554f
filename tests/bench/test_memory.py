"""Bytes kept for the backward, against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.memory import saved_bytes

ROWS, WIDTH = 8, 16
DEVICES = ["cpu", "meta"]


def rand(*shape: int, device: str) -> torch.Tensor:
    return torch.rand(*shape, device=device).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_linear_keeps_nothing(device: str) -> None:
    layer = nn.Linear(WIDTH, WIDTH, device=device).requires_grad_(False)
    x = rand(ROWS, WIDTH, device=device)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_trained_linear_keeps_its_input(device: str) -> None:
    layer = nn.Linear(WIDTH, WIDTH, device=device)
    x = rand(ROWS, WIDTH, device=device)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == ROWS * WIDTH * 4
    assert saved_bytes(lambda: layer(x), [*layer.parameters(), x]) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_storage_counts_once(device: str) -> None:
    """exp keeps its result; the product of the result's two halves keeps views of it."""
    x = rand(ROWS, WIDTH, device=device)

    def halves() -> torch.Tensor:
        left, right = x.exp().chunk(2, dim=1)
        return left * right

    assert saved_bytes(halves) == ROWS * WIDTH * 4


@pytest.mark.parametrize("device", DEVICES)
def test_temporaries_do_not_share_an_address(device: str) -> None:
    """Each of three results is kept though nothing but autograd holds it."""
    x = rand(ROWS, WIDTH, device=device)
    assert saved_bytes(lambda: x.exp().exp().exp()) == 3 * ROWS * WIDTH * 4


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_keeps_a_mask(device: str) -> None:
    x = rand(ROWS, WIDTH, device=device)
    assert saved_bytes(lambda: torch.native_dropout(x, 0.5, True)[0]) == ROWS * WIDTH


def test_attention_as_on_a_gpu_keeps_no_map() -> None:
    from bench.meta import as_on_cuda

    batch, heads, tokens, head = 2, 3, 64, 32
    qkv = [
        torch.empty(batch, heads, tokens, head, device="meta", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    map_bytes = batch * heads * tokens * tokens * 2
    with as_on_cuda():
        flash = saved_bytes(lambda: F.scaled_dot_product_attention(*qkv), qkv)
    result, log_sum, seed = batch * heads * tokens * head * 2, batch * heads * tokens * 4, 2 * 8
    assert result + log_sum <= flash <= result + log_sum + 2 * seed
    assert (
        saved_bytes(lambda: F.scaled_dot_product_attention(*qkv), qkv) > map_bytes
    )  # what it would be on meta otherwise
