"""What a Bridger's stage keeps for the backward, and what it launches."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.counters import counting
from bench.memory import saved_bytes
from fastadapt import Bridger


def meta_stage() -> tuple[Bridger, Tensor, Tensor]:
    """The released Bridger of a ViT and its streams in bfloat16, at 416 x 416 pixels, 17 words and batch 32."""
    like = {"device": "meta", "dtype": torch.bfloat16}
    streams = (torch.empty(size, requires_grad=True, **like) for size in ((32, 677, 768), (32, 17, 512)))
    return Bridger.vit(**like), *streams


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
        # the host alone promotes types
        launches[name] = forward.total - forward.torch["promote_types"], backward.total
    print("launches forward and backward:", launches)
    assert launches["training"] <= (14, 22) and launches["eval"] <= (12, 20) and launches["folded"][0] <= 9
