"""The reference in float64 against torch's own functions: outputs and all gradients, and the gradients' gradients."""

from __future__ import annotations

import pytest
import torch

from fastadapt.kernels.frozen_group.reference import ACTIVATIONS, PROLOGUES
from tests.kernels.frozen_group.calls import Call, composed, flat, fused, make, results
from tests.tolerance import EXACT

REFERENCE = fused("reference")
CALLS = {
    "plain": {},
    "branch": {"branch": True},
    "scaled branch": {"branch": True, "scale": True},
    "everything": {"branch": True, "scale": True, "dropout": 0.2, "branch_dropout": 0.3},
    "frozen stream": {"frozen": ("x",), "dropout": 0.2},
    "frozen x, trained branch": {"branch": True, "branch_dropout": 0.3, "frozen": ("x",)},
    "frozen linears": {"branch": True, "ranks": (None, None, None)},
    "frozen A": {"frozen": ("lora_a0", "lora_a2"), "dropout": 0.1},
    "frozen B": {"frozen": ("lora_b0", "lora_b2"), "dropout": 0.1},
    "no member": {"branch": True, "branch_dropout": 0.3, "widths": (), "ranks": ()},
    "two dimensions": {"shape": (7, 24), "branch": True},
}


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("kind", CALLS)
def test_outputs_and_gradients(kind, prologue):
    call = make(prologue, **CALLS[kind])
    unused = ("y1",) if kind == "frozen stream" else ()  # nothing that y1 depends on is trained
    torch.testing.assert_close(results(REFERENCE, call, unused), results(composed, call, unused), **EXACT)


@pytest.mark.parametrize("prologue", ["layer_norm", *ACTIVATIONS])
@pytest.mark.parametrize("unused", [(), ("total",), ("normed",), ("y0",), ("y1",), ("y0", "y1", "y2")], ids=str)
def test_n_is_a_result_and_any_result_may_go_unread(prologue, unused):
    call = make(prologue, branch=True, branch_dropout=0.3, normed=True)
    torch.testing.assert_close(results(REFERENCE, call, unused), results(composed, call, unused), **EXACT)


def test_layer_norm_without_parameters():
    call = make(branch=True)
    del call.tensors["norm_bias"], call.tensors["norm_weight"]
    found = results(REFERENCE, call)
    ones = {"norm_weight": torch.ones(24).double(), "norm_bias": torch.zeros(24).double()}
    expected = results(composed, Call(call.tensors | ones, call.prologue, call.options, call.ranks))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("prologue", ["identity", "layer_norm", "gelu", "quick_gelu"])
def test_gradcheck(prologue):
    sizes = {"shape": (2, 3), "widths": (2, 2), "ranks": (1, None)}
    call = make(prologue, **sizes, branch=True, scale=True, dropout=0.3, branch_dropout=0.3)
    names = list(call.trained)

    def run(*tensors):
        given = call.tensors | dict(zip(names, tensors))
        return tuple(flat(REFERENCE(Call(given, call.prologue, call.options, call.ranks))).values())

    inputs = list(call.trained.values())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
