"""What a Bridger's stage keeps for the backward, and what it launches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bench.counters import counting
from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt import Bridger
from fastadapt.modules.bridger import FullInteraction

LIKE = {"device": "meta", "dtype": torch.bfloat16}


def meta_stage() -> tuple[Bridger, Tensor, Tensor]:
    """The released Bridger of a ViT and its streams in bfloat16, at 416 x 416 pixels, 17 words and batch 32."""
    streams = (torch.empty(size, requires_grad=True, **LIKE) for size in ((32, 677, 768), (32, 17, 512)))
    return Bridger.vit(**LIKE), *streams


def test_a_stage_keeps_nothing_of_the_streams_size():
    bridger, visual, text = meta_stage()
    inputs = visual, text, *bridger.parameters(), *bridger.buffers()
    for training in (True, False):
        bridger.train(training)
        kept = saved_bytes(lambda: bridger.stage(0, visual, text), inputs)
        print(f"training {training}: a stage keeps {kept / 2**20:.1f} MiB of a stream of {visual.nbytes / 2**20:.1f} MiB")
        assert kept < 9 * 2**20 < visual.nbytes / 3


class NoInteraction(nn.Module):
    def forward(self, v: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return v, t


def test_launches_around_the_interaction():
    bridger, visual, text = meta_stage()
    bridger.stages[0].interaction = NoInteraction()
    launches = {}
    for name, module in {"training": bridger, "eval": copy.deepcopy(bridger).eval(), "folded": bridger.folded()}.items():
        with counting() as forward:
            outputs = module.stage(0, visual, text)[:2]
        wanted = [visual, text, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        with counting() as backward:
            torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs], allow_unused=True)
        launches[name] = forward.total, backward.total
    print("launches forward and backward:", launches)
    assert launches["training"] <= (14, 22) and launches["eval"] <= (12, 20) and launches["folded"][0] <= 9


@pytest.mark.parametrize("recompute", [True, False])
def test_the_full_interaction_keeps_its_inputs_alone(recompute):
    """At 676 tokens of 32 samples, where torch's own layers with explicit attention keep 824 MB."""
    v, t = (torch.empty(32, tokens, 64, **LIKE).requires_grad_() for tokens in (676, 17))
    layers = FullInteraction(64, 8, 0.1, recompute, **LIKE)
    with as_on_cuda():
        kept = saved_bytes(lambda: layers(v, t), exclude=layers.parameters())
    print(f"kept by the full interaction, recompute={recompute}: {kept / 1e6:.1f} MB")
    inputs = 2 * (v.numel() + t.numel())
    assert kept == inputs < 20e6 if recompute else kept > 10 * inputs


def test_run_again_the_full_interaction_drops_what_it_dropped():
    found = []
    for recompute in (True, False):
        torch.manual_seed(3)
        layers = FullInteraction(16, 4, 0.3, recompute, dtype=torch.float64)
        v, t = (torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True) for tokens in (9, 5))
        torch.manual_seed(4)
        outputs = layers(v, t)
        torch.randn(3)  # the generator moves on between forward and backward
        grads = [torch.ones_like(output) for output in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, [v, t, *layers.parameters()], grads)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
