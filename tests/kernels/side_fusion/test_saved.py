"""What is kept for the backward: taps and parameters, on every backend that the meta device can show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench.memory import saved_bytes
from tests.kernels.side_fusion.calls import BACKENDS, KINDS, Call, composed, fused, make, tower

MIB = 2**20
ROWS, DEPTH = 32, 24
TAP = ROWS * DEPTH * 4  # bytes
every_backend = pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "native"])


def kept(call: Call, backend: str) -> int:
    """Bytes beside the parameters; a storage counts once."""
    return saved_bytes(lambda: fused(backend)(call), exclude=call.parameters)


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_one_tap_an_adapter_and_no_base(kind, backend):
    call = make((ROWS,), [replace(KINDS[kind], depth=DEPTH)] * 3, 2, dtype=torch.float32).to("meta")
    assert kept(call, backend) == 3 * TAP


@every_backend
def test_a_tap_that_several_adapters_read_once(backend):
    call = make(torch.empty(ROWS, DEPTH, device="meta"), [replace(KINDS["plain"], depth=DEPTH)] * 3).to("meta")
    call = call.with_tensors([call.tensors["0 tap"] if name.endswith("tap") else t for name, t in call.tensors.items()])
    assert kept(call, backend) == TAP


@every_backend
@pytest.mark.parametrize(
    ("needs", "taps"), [((), 0), (("base 0",), 0), (("1 up_weight",), 1), (("0 down_bias", "2 norm_bias"), 2)], ids=str
)
def test_nothing_of_an_adapter_without_wanted_gradients(needs, taps, backend):
    specs = [replace(KINDS["vision expert"], depth=DEPTH)] * 3
    call = make((ROWS,), specs, 1, dtype=torch.float32).requiring(*needs).to("meta")
    assert kept(call, backend) == taps * TAP


M2IST = {"vision": ((64, 400), (256, 128, 256), 25.0), "text": ((64, 20), (768, 128, 256), 3.75)}  # MiB a layer


@every_backend
@pytest.mark.parametrize("kind", M2IST)
def test_m2ists_towers_keep_the_taps_of_every_layer_in_bf16_and_no_more(kind, backend):
    """At batch 64: 25 MiB for a vision layer's pair, m and f, where the released modules keep 50 in bf16."""
    leading, sizes, mib = M2IST[kind]
    call = on_meta(leading, kind, sizes)
    assert kept(call, backend) == 6 * mib * MIB
    eager = saved_bytes(lambda: composed(call), exclude=call.parameters)
    hidden = 2 * torch.Size(leading).numel() * sizes[1] * 2
    assert eager >= 6 * (mib * MIB + hidden)  # what follows the activations, and more


def on_meta(leading: tuple[int, ...], kind: str, sizes: tuple[int, int, int]) -> Call:
    call = make((1,), tower(kind, *sizes), 2, dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in call.tensors.items():
        shape = (*leading, tensor.shape[-1]) if name.endswith("tap") or name in call.bases else tensor.shape
        tensors[name] = torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
    return call.with_tensors(list(tensors.values()))


def test_checkpointed_it_keeps_as_much():
    """Taps are inputs: there is nothing to save by recomputing them."""
    call = make((ROWS,), [replace(KINDS["vision expert"], depth=DEPTH)] * 3, 1, dtype=torch.float32)
    wrapped = saved_bytes(lambda: checkpoint(lambda: fused("reference")(call), use_reentrant=False), exclude=call.parameters)
    assert wrapped <= kept(call, "reference") == 3 * TAP
