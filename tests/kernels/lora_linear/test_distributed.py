"""DistributedDataParallel over two processes: gradients are those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from fastadapt import LoraLinear
from tests.tolerance import EXACT

WORLD, ROWS, WIDTH = 2, 6, 16


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [LoraLinear(WIDTH, WIDTH, r=3, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def batch() -> Tensor:
    return torch.randn(WORLD * ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module(x).square().mean().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("module."): gradient for name, gradient in found.items()}


def work(rank: int, folder: str) -> None:
    """One process: its half of the batch, its gradients to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    replica = DistributedDataParallel(model())
    torch.save(gradients(replica, batch()[rank * ROWS : (rank + 1) * ROWS]), f"{folder}/{rank}.pt")
    del replica  # its reducer must go before the group that it talks to
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    expected = gradients(model(), batch())
    assert len(expected) == 4 and all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for rank in range(WORLD):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, **EXACT)
