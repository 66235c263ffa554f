"""The host's work for a block with LoRA on six linears, forward and backward, against PEFT's, interleaved on one core."""

from __future__ import annotations

import time

import pytest
import torch

from fastadapt import native
from fastadapt.integrations.transformers import fuse_layer
from tests.integrations.test_transformers import build

MOST = 1.3  # 1.16 has been seen with dropout and 1.22 without; 1.24 and 1.34 before the path was shortened
ATTEMPTS = 4  # a neighbour on the machine can spoil one measurement, not make slow code fast
BLOCKS, STEPS = 30, 10


def ratio(dropout: float) -> float:
    """The fused layer's fastest block of steps over PEFT's, of blocks that take turns, on one thread."""
    layers = [build("clip vision", dtype=torch.float32, lora_dropout=dropout) for _ in range(2)]
    fuse_layer(layers[1])
    x, grad = (torch.randn(1, 4, 24, requires_grad=i == 0) for i in range(2))
    best = [float("inf")] * 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(BLOCKS):
            for i, layer in enumerate(layers):
                start = time.perf_counter()
                for _ in range(STEPS):
                    layer(x, None).backward(grad)
                best[i] = min(best[i], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[1] / best[0]


@pytest.mark.skipif(not native.load(), reason="without the C++ library the reference draws its masks in torch")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_block_costs_the_host_little_more_than_pefts(dropout):
    found = [ratio(dropout)]
    while found[-1] > MOST and len(found) < ATTEMPTS:
        found.append(ratio(dropout))
    print(found)
    assert found[-1] <= MOST
