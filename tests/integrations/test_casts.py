"""Casts of frozen weights that a fused layer keeps, in the hands of those who change the weights."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import Linear

import fastadapt
from fastadapt.integrations.transformers import at, fuse_layer
from tests.integrations.test_transformers import BATCH, TOKENS, WIDTH, build


@pytest.mark.parametrize("fused_linears", [False, True])
def test_merged_lora_under_autocast(fused_linears):
    """PEFT merges through `.data`, which leaves a parameter's version as it was."""
    layer, plain = build("clip vision", dtype=torch.float32).eval(), build("clip vision", dtype=torch.float32).eval()
    fuse_layer(layer)
    if fused_linears:
        fastadapt.fuse(layer)
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def close() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found, expected = layer(x, None), plain(x, None)
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02 * expected.abs().max().item())

    close()
    for change in ("merge", "unmerge", "merge"):
        for linear in [*layer.modules(), *plain.modules()]:
            if isinstance(linear, Linear):
                getattr(linear, change)()
        close()
    if fused_linears:
        for role, path in {"fc1": "mlp", "fc2": "mlp", "q_proj": "self_attn"}.items():
            setattr(at(layer, path), role, at(layer, path)._modules[role].base_layer)
        close()
