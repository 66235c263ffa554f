"""fuse, unfuse and explain on small modules: which layers and calls are fused, which not, and what is said of it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import fastadapt
from fastadapt.core.backend import BackendError, choose
from fastadapt.integrations.peft import FusedLinear, why_not
from fastadapt.modules import inject

WIDTH = 8
BACKEND = choose("lora_linear", None, torch.empty(0))  # a CPU's, with or without the C++ library


class Int8Linear(nn.Linear):
    """A quantised layer as PEFT meets it: an nn.Linear that computes otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


class QuantisedTensor(torch.Tensor):
    """A quantised weight in a plain nn.Linear, as torchao makes it."""


def wrap(*layers: nn.Module, **lora) -> PeftModel:
    settings = {"r": 2, "init_lora_weights": False, "target_modules": r"\d"}
    return get_peft_model(nn.Sequential(*layers), LoraConfig(**settings | lora))


def one(model: PeftModel) -> nn.Module:
    return model.base_model.model[0]


def linear(**lora) -> PeftModel:
    torch.manual_seed(0)
    return wrap(nn.Linear(WIDTH, WIDTH), **lora)


@pytest.mark.parametrize(
    "make, kind, reason",
    [
        (lambda: linear(use_dora=True), "Linear", "DoraLinearVariant is not plain LoRA"),
        (lambda: linear(lora_bias=True), "Linear", "lora_bias is set"),
        (lambda: wrap(Int8Linear(WIDTH, WIDTH)), "Linear", "base_layer is Int8Linear"),
        (lambda: wrap(Conv1D(WIDTH, WIDTH), fan_in_fan_out=True), "Linear", "base_layer is Conv1D"),
        (lambda: wrap(nn.Conv2d(WIDTH, WIDTH, 1)), "Conv2d", "lora.Conv2d is not lora.Linear"),
        (lambda: wrap(nn.Embedding(WIDTH, WIDTH)), "Embedding", "lora.Embedding is not lora.Linear"),
    ],
)
def test_layers_that_cannot_be_fused_are_left_alone_and_named(make, kind, reason):
    model = make()
    before = type(one(model))
    with pytest.warns(UserWarning, match=f"fuse left 1 of 1 LoRA layers to PEFT: {reason}"):
        fastadapt.fuse(model)
    assert type(one(model)) is before
    (row,) = fastadapt.explain(model).rows
    assert (row.kind, row.path, row.reason) == (kind, "PEFT", reason)


def two_adapters(model: PeftModel, **second) -> PeftModel:
    model.add_adapter("second", LoraConfig(r=3, init_lora_weights=False, target_modules=r"\d", **second))
    return model


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output)


STATES = {
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled"),
    "merged": (lambda model: model.merge_adapter(), "the adapter is merged into the weight"),
    "several active": (
        lambda model: two_adapters(model).base_model.set_adapter(["default", "second"]),
        "2 adapters are active",
    ),
    "none active": (lambda model: model.delete_adapter("default"), "0 adapters are active"),
    "a variant active": (
        lambda model: two_adapters(model, use_dora=True).set_adapter("second"),
        "DoraLinearVariant is not plain LoRA",
    ),
    "hooked base": (lambda model: hook(one(model).base_layer), "base_layer has hooks"),
    "hooked adapter": (lambda model: hook(one(model).lora_B["default"]), "lora_B has hooks"),
    "replaced forward": (
        lambda model: setattr(one(model).base_layer, "forward", one(model).base_layer.forward),
        "base_layer has hooks",
    ),
    "parametrised base": (
        lambda model: parametrize.register_parametrization(one(model).base_layer, "weight", nn.Tanh()),
        "base_layer computes its weight",
    ),
    "unknown dropout": (
        lambda model: one(model).lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
        "lora_dropout is AlphaDropout",
    ),
    "adapters narrower than the base": (
        lambda model: (one(model).lora_A.bfloat16(), one(model).lora_B.bfloat16()),
        "x is torch.float32, lora_A torch.bfloat16",
    ),
    "quantised weight": (
        lambda model: setattr(
            one(model).base_layer,
            "weight",
            nn.Parameter(one(model).base_layer.weight.detach().as_subclass(QuantisedTensor), requires_grad=False),
        ),
        "the weight is a QuantisedTensor",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_calls_that_cannot_be_fused_are_pefts(state):
    change, reason = STATES[state]
    model, fused = linear(), fastadapt.fuse(linear())
    x = torch.randn(3, WIDTH)
    assert why_not(one(fused), x) is None
    for each in (model, fused):
        torch.manual_seed(1)
        change(each)
    assert type(one(fused)) is FusedLinear
    assert why_not(one(fused), x) == reason
    (row,) = fastadapt.explain(fused).rows
    assert (row.path, row.reason) == ("PEFT", reason)
    outputs = []
    for each in (model, fused):
        torch.manual_seed(1)
        outputs.append(one(each)(x))
    assert torch.equal(*outputs)


def test_what_peft_cannot_compute_still_fails_as_pefts():
    model = fastadapt.fuse(linear())
    one(model).lora_B.bfloat16()
    assert why_not(one(model), torch.randn(3, WIDTH)) == "lora_A is torch.float32, lora_B torch.bfloat16"
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.randn(3, WIDTH))


@pytest.mark.parametrize(
    "x, autocast, reason",
    [
        (torch.randn(2, WIDTH).double(), False, "x is torch.float64, the weight torch.float32"),
        (torch.randn(2, WIDTH).double(), True, "torch.float64 under autocast"),
        (torch.ones(2, WIDTH, dtype=torch.int64), False, "x is torch.int64"),
        (torch.randn(2, WIDTH).as_subclass(QuantisedTensor), False, "x is a QuantisedTensor"),
        (torch.randn(2, WIDTH).bfloat16(), True, None),
        (torch.randn(2, WIDTH), True, None),
    ],
)
def test_inputs_that_decide(x, autocast, reason):
    layer = one(fastadapt.fuse(linear()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert why_not(layer, x) == reason


def test_further_arguments_are_pefts():
    layer, x = one(fastadapt.fuse(linear()).eval()), torch.randn(2, WIDTH)
    assert why_not(layer, x, adapter_names=["default", "__base__"]) == "called with adapter_names"
    mixed = layer(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([layer(x)[0], layer.base_layer(x)[1]]))


def test_one_active_adapter_is_served_whichever_it_is():
    fused, seen = fastadapt.fuse(two_adapters(linear())), []
    for adapter in ("default", "second"):
        fused.set_adapter(adapter)
        (row,) = fastadapt.explain(fused).rows
        seen.append((row.rank, row.path))
    assert seen == [(2, f"fastadapt {BACKEND}"), (3, f"fastadapt {BACKEND}")]


def test_a_plain_adapter_beside_a_variant_is_worth_fusing():
    model = fastadapt.fuse(two_adapters(linear(use_dora=True)))
    x = torch.randn(3, WIDTH)
    assert why_not(one(model), x) == "DoraLinearVariant is not plain LoRA"
    model.set_adapter("second")
    assert why_not(one(model), x) is None


def test_trainable_bias_gets_its_gradient():
    model, fused = linear(bias="lora_only"), fastadapt.fuse(linear(bias="lora_only"))
    x = torch.randn(3, WIDTH)
    for each in (model, fused):
        each(x).square().sum().backward()
    assert one(model).base_layer.bias.grad is not None
    torch.testing.assert_close(one(fused).base_layer.bias.grad, one(model).base_layer.bias.grad)


def test_layers_added_after_fusing_are_fused_by_fusing_again():
    model = fastadapt.fuse(wrap(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["1"]))
    assert [type(layer) for layer in model.base_model.model] == [FusedLinear, Linear]
    fastadapt.fuse(model)
    assert [type(layer) for layer in model.base_model.model] == [FusedLinear, FusedLinear]


def test_compiled_calls_follow_pefts_state():
    model, fused = linear(lora_dropout=0.0), fastadapt.fuse(linear(lora_dropout=0.0))
    compiled = torch.compile(fused, fullgraph=True)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(compiled(x), model(x))
    for each in (model, fused):
        torch.manual_seed(1)
        two_adapters(each)
        each.set_adapter("second")
    torch.testing.assert_close(compiled(x), model(x))
    for each in (model, fused):
        each.base_model.disable_adapter_layers()
    torch.testing.assert_close(compiled(x), model(x))


def test_explanation_is_a_table_of_rows():
    model = linear(lora_dropout=0.1)
    (row,) = fastadapt.explain(model).rows
    assert (row.name, row.kind, row.shape, row.rank, row.dropout, row.path, row.reason) == (
        "base_model.model.0", "Linear", (WIDTH, WIDTH), 2, 0.1, "PEFT", "fastadapt.fuse(model) would fuse it",
    )  # fmt: skip
    header, line, summary = str(fastadapt.explain(fastadapt.fuse(model))).splitlines()
    assert header.split() == ["name", "kind", "shape", "rank", "dropout", "path", "reason"]
    assert line.split() == ["base_model.model.0", "FusedLinear", "8x8", "2", "0.1", "fastadapt", BACKEND]
    assert summary == "1 of 1 LoRA layers run fused"


def test_explain_knows_the_librarys_own_module():
    layer = fastadapt.LoraLinear(WIDTH, 5, r=3, lora_dropout=0.2)
    model = nn.ModuleDict({"own": layer, "peft": linear()})
    rows = fastadapt.explain(model).rows
    assert [(row.kind, row.rank, row.path) for row in rows] == [
        ("LoraLinear", 3, f"fastadapt {BACKEND}"),
        ("Linear", 2, "PEFT"),
    ]
    layer.merge()
    assert fastadapt.explain(model).rows[0].reason == "merged into the weight"


def test_explain_shows_why_no_backend_can_run(monkeypatch):
    def refuse(*sizes, dropout_p, **where):
        raise BackendError(f"no backend for {sizes} with dropout {dropout_p}")

    monkeypatch.setattr(inject, "lora_linear_path", refuse)
    (row,) = fastadapt.explain(fastadapt.fuse(linear(lora_dropout=0.1))).rows
    assert (row.path, row.reason) == ("none", f"no backend for (6304, {WIDTH}, {WIDTH}, 2) with dropout 0.1")


def test_explain_tells_the_algorithm_of_the_autocast_that_it_has(monkeypatch):
    monkeypatch.setattr(inject, "lora_linear_path", partial(fastadapt.lora_linear_path, backend="triton"))
    model = nn.ModuleDict({"own": fastadapt.LoraLinear(768, 768, lora_dropout=0.1, device="meta")})
    assert fastadapt.explain(model).rows[0].path == "fastadapt triton, split"
    assert fastadapt.explain(model.eval()).rows[0].path == "fastadapt triton, library"
    with torch.autocast("cpu", torch.bfloat16):
        assert fastadapt.explain(model).rows[0].path == "fastadapt triton, merge"


def test_a_model_without_lora_is_refused_by_fuse_and_empty_to_explain():
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected a model with PEFT LoRA layers.* got a Sequential with neither"):
        fastadapt.fuse(plain)
    assert fastadapt.unfuse(plain) is plain
    assert str(fastadapt.explain(plain)).splitlines()[-1] == "0 of 0 LoRA layers run fused"


@pytest.mark.parametrize("function", [fastadapt.fuse, fastadapt.unfuse, fastadapt.explain])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        function("clip")


def test_nothing_imports_peft_before_its_user_does():
    program = """
import sys, torch, fastadapt
model = torch.nn.Sequential(fastadapt.LoraLinear(4, 4))
fastadapt.explain(fastadapt.unfuse(model))
assert not {"peft", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
