"""Kernel launches of small modules, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.counters import counting, host_overhead, small_layers
from bench.meta import as_on_cuda
from fastadapt.core.launch import launch


@pytest.fixture
def x() -> torch.Tensor:
    return torch.empty(4, 8, 64, device="meta").requires_grad_()


def test_a_frozen_linear_is_one_product_each_way(x: torch.Tensor) -> None:
    layer = nn.Linear(64, 32, device="meta").requires_grad_(False)
    with counting() as forward:
        y = layer(x)
    with counting() as backward:
        y.backward(torch.empty_like(y))
    assert forward.torch == {"addmm": 1}
    assert backward.torch == {"mm": 1}
    assert forward.total == backward.total == 1


def test_views_and_allocation_are_free(x: torch.Tensor) -> None:
    with counting() as launches:
        torch.empty_like(x.transpose(0, 1).reshape(8, 4, 8, 8).detach().expand(8, 4, 8, 8))
    assert launches.total == 0


def test_peft_lora_is_five_launches_forward_on_a_gpu() -> None:
    """Without dropout: two products, a scale, a sum and the frozen product; dropout on a GPU is one more."""
    x = torch.empty(32, 64, device="meta")
    for p, expected in ((0.0, {"addmm": 1, "mm": 2, "mul": 1, "add": 1}), (0.1, {"native_dropout": 1})):
        layer = small_layers(64, 8, p)["PEFT"].to("meta")
        with as_on_cuda(), counting() as launches:
            layer(x)
        assert expected.items() <= launches.torch.items()
        assert launches.total == 5 + (p > 0)


def test_triton_kernels_are_recorded_on_meta() -> None:
    kernel = SimpleNamespace(fn=lambda: None)
    with counting() as launches:
        launch(kernel, (4, 1), device=torch.device("meta"))
        launch(kernel, (4, 0), device=torch.device("meta"))  # an empty grid starts nothing
    assert launches.triton == {"<lambda>": 1}
    assert launches.total == 1


def test_attention_and_dropout_are_one_kernel_each_on_a_gpu(x: torch.Tensor) -> None:
    q = torch.empty(2, 3, 16, 32, device="meta", dtype=torch.bfloat16)
    with as_on_cuda(), counting() as launches:
        F.scaled_dot_product_attention(q, q, q)
        F.dropout(x, 0.1)
    assert launches.torch == {"_scaled_dot_product_flash_attention": 1, "native_dropout": 1}


def test_attention_in_float32_is_the_kernel_that_takes_it() -> None:
    q = torch.empty(2, 3, 16, 32, device="meta").requires_grad_()
    with as_on_cuda(), counting() as launches:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    name = "_scaled_dot_product_efficient_attention"
    assert {name: 1, f"{name}_backward": 1}.items() <= launches.torch.items()


@pytest.mark.parametrize("need_weights, kernel", [(True, "_softmax"), (False, "_scaled_dot_product_flash_attention")])
def test_a_multi_head_attention_returns_its_map_or_makes_none(need_weights: bool, kernel: str) -> None:
    layer = nn.MultiheadAttention(64, 8, device="meta", dtype=torch.bfloat16)
    x = torch.empty(16, 2, 64, device="meta", dtype=torch.bfloat16)
    with as_on_cuda(), counting() as launches:
        layer(x, x, x, need_weights=need_weights)
    assert launches.torch[kernel] == 1
    assert launches.torch["bmm"] == (2 if need_weights else 0)


def test_host_time_is_positive_and_peft_adds_some() -> None:
    found = host_overhead(blocks=4, steps=5)
    assert found.frozen_us > 0
    assert found.peft_us > 0
    assert found.ratio == found.fastadapt_us / found.peft_us
