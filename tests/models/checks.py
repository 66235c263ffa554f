"""What every method has to stand on its tiny preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from fastadapt.models.common.arms import ARMS
from fastadapt.models.common.base import MethodModel
from fastadapt.models.common.method import Method
from tests.tolerance import EXACT, error


def make(method: Method, preset: str = "tiny", dtype: torch.dtype = torch.float64, **changes: Any) -> MethodModel:
    """The method in training mode, with no parameter or statistic at a value that hides an error."""
    model = method.model(method.config.preset(preset, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 * float(parameter.std(correction=0)) + 0.01)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif buffer.is_floating_point():  # of batch norms, frozen ones' scales too
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
    return model.train()


def in_arm(model: MethodModel, arm: str) -> MethodModel:
    """A copy of the model in another arm."""
    values = model.config.to_dict()
    with no_init_weights():
        twin = type(model)(type(model.config).from_dict({**values, "arm": arm}))
    twin.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return twin.train(model.training)


def make_inputs(method: Method, model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    """Inputs in the model's dtype."""
    dtype = next(model.parameters()).dtype
    inputs = method.inputs(model.config, batch, "cpu")
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout at zero, in whatever mode it is."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def results(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output of a step, and the gradient of every trained parameter that has one."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    found = {f"output {name}": value for name, value in output.items() if isinstance(value, Tensor)}
    found |= {f"losses {name}": value for name, value in (output.losses or {}).items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach().clone() for name, value in (found | gradients).items()}


def same_in_double(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same equations in another order, in float64."""
    torch.testing.assert_close(found, expected, **EXACT)


def same_in_single(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same in float32, of a model as it starts: in the 2-norm each output is within 1e-5, and each gradient within 4e-5, for a
    rounding takes some ReLUs over their kink."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert error(found[name], want) < (1e-5 if " " in name else 4e-5), name


def arms_agree(
    method: Method,
    model: MethodModel,
    inputs: dict[str, Tensor],
    same: Callable[[dict[str, Tensor], dict[str, Tensor]], None],
    dead: Iterable[str] = (),
) -> None:
    """With dropout off every arm has the same parameters, outputs, losses and gradients; those named `dead` have none."""
    state, trained = model.state_dict(), {n for n, p in model.named_parameters() if p.requires_grad}
    expected = results(without_dropout(model), inputs)
    without = {name for name in trained if name not in expected}
    assert without == set(dead)
    assert all(expected[name].abs().max() > 0 for name in trained - without)
    for arm in ARMS:
        if arm != model.config.arm:
            twin = without_dropout(in_arm(model, arm))
            assert list(twin.state_dict()) == list(state)
            assert {n for n, p in twin.named_parameters() if p.requires_grad} == trained
            same(results(twin, inputs), expected)


def runs_under_autocast(method: Method, model: MethodModel) -> None:
    """In bfloat16 by autocast the loss is near the float32 one, and every trained parameter has a finite gradient."""
    model, inputs = model.eval(), make_inputs(method, model)
    exact = model(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05 * exact
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def compiles(method: Method, model: MethodModel) -> None:
    """Compiled without a graph break, outputs and gradients are the same."""
    inputs = make_inputs(method, without_dropout(model))
    expected = results(model, inputs)
    found = results(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    same_in_double({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)


def trains(method: Method, arm: str, steps: int = 25, rate: float = 3e-3) -> None:
    """Two dozen steps on one batch lower the loss by a third, and move the trained parameters alone."""
    model = method.model(method.config.preset("tiny", arm=arm)).train()
    inputs = make_inputs(method, model, 4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = model.parameter_groups(rate)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 2 / 3 * sum(losses[:3]), losses
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def saves_and_loads(method: Method, model: MethodModel, folder: Any) -> None:
    """A saved model is loaded with its configuration, its values, its frozen towers and its tied parameters."""
    model.eval().save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    inputs = make_inputs(method, model)
    twin = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    assert twin.config.to_dict().items() >= {"arm": model.config.arm, "parity": model.config.parity}.items()
    assert twin.config.fingerprint() == model.config.fingerprint()
    named = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.requires_grad, p.dtype) for name, p in twin.named_parameters()} == named
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
    # a checkpoint that lacks a tensor of each trained module gives all the rest; without tied ones it cannot be loaded
    state, tied = load_file(folder / "model.safetensors"), set(model.all_tied_weights_keys.values())
    lacking = {name for name in state if name.endswith("bias") and named.get(name, (False,))[0]} - tied
    assert lacking
    rest = {name: tensor for name, tensor in state.items() if name not in lacking}
    save_file(rest, folder / "model.safetensors", {"format": "pt"})
    twin = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    changed = {n for n, p in twin.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == lacking


def adapters_travel(method: Method, model: MethodModel, folder: Any, **other: Any) -> None:
    """The tuned part alone goes from one arm to another, onto the same towers, and to no other configuration.

    other: changes to the configuration that make it another's.
    """
    file = model.save_adapters(folder)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert trained <= file.stat().st_size < 1.5 * trained + 50_000
    arm = next(arm for arm in ARMS if arm != model.config.arm)
    twin = in_arm(model, arm)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    twin.load_adapters(folder)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    stranger = method.model(method.config.preset("tiny", arm=arm, **other))
    before = {name: value.clone() for name, value in stranger.state_dict().items()}
    with pytest.raises(ValueError, match="directory: expected adapters saved with this model's configuration"):
        stranger.load_adapters(folder)
    torch.testing.assert_close(stranger.state_dict(), before, rtol=0, atol=0)


def in_the_readme(text: str, lines: str) -> bool:
    """Whether each of these lines is in the text."""
    return all(line in text for line in lines.splitlines())
