"""One training step of a method of `fastadapt.models`: its arms from one state dict, on one batch drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

import fastadapt
from bench.case import COMPILED, FASTADAPT, GRAPHED, RELEASED, STRONG, Arm, Case, Unavailable
from bench.cases.common import SEED, autocasting
from bench.compiled import compile_in_place
from fastadapt.models.common.base import MethodModel
from fastadapt.models.common.method import method
from fastadapt.prove.judge import Verdict, judge, poisoned

Tensors = dict[str, Tensor]

LEARNING_RATE = 1e-4
SLACK = 1.2  # as for CLIP: rounding errors grow through the layers, and differ by several per cent between right answers
VANISHING = 1e-12  # of the loss: a gradient this small in float64 is zero by its equation, and rounding alone
REDUCED_BATCH = 4  # of the tiny preset, which a CPU measures


def case(name: str, device: str) -> Case:
    """The Case of this method: as the paper trains it, under bfloat16 autocast, on "cuda"; the tiny one in float32 on "cpu"."""
    settings = method(name)
    on_gpu = device == "cuda"
    preset, batch = (settings.preset, settings.batch) if on_gpu else ("tiny", REDUCED_BATCH)
    autocast = torch.bfloat16 if on_gpu else None
    precision = "float32 under bfloat16 autocast" if on_gpu else "float32"
    return Case(
        name=f"{name} {preset}, batch {batch}, {precision}",
        params={
            "method": name,
            "preset": preset,
            "model": "configuration, random weights",
            "batch": batch,
            "image_size": settings.config.preset(preset).image_size,
            "precision": precision,
            "optimizer": f"AdamW, lr {LEARNING_RATE} and the method's parts of it",
        },
        dtype=autocast or torch.float32,
        autocast=on_gpu,
        make_inputs=lambda device: Inputs(name, preset, batch, device, autocast),
        arms={
            STRONG: lambda inputs: _trained(inputs, inputs.model("strong")),
            COMPILED: lambda inputs: _trained(inputs, _compiled(inputs.model("strong"))),
            FASTADAPT: lambda inputs: _trained(inputs, inputs.model("fastadapt")),
            GRAPHED: _graphed,
            RELEASED: lambda inputs: _trained(inputs, inputs.model("release")),  # last, for it may take what memory there is
        },
        verify=_verify,
        work={"training step": None},
    )


class Inputs:
    """What the arms share: a batch, the weights they all start from, and the strong arm's results in float64."""

    def __init__(self, name: str, preset: str, batch: int, device: torch.device, autocast: torch.dtype | None) -> None:
        self.device, self.autocast = device, autocast
        settings = method(name)
        torch.manual_seed(SEED)
        with torch.device("meta") if device.type == "meta" else nullcontext():
            model = settings.model(settings.config.preset(preset, arm="strong"))
        for parameter in model.parameters():
            if parameter.requires_grad and device.type != "meta" and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # at zero it would keep gradients before it at zero, and prove nothing
        self._model = model.to(device)
        self.batch: Tensors = settings.inputs(model.config, batch, device)

    def model(self, arm: str) -> MethodModel:
        """The model in this arm, for it to train."""
        config = type(self._model.config).from_dict({**self._model.config.to_dict(), "arm": arm})
        with no_init_weights(), torch.device("meta") if self.device.type == "meta" else nullcontext():
            twin = type(self._model)(config)
        twin.load_state_dict(self._model.state_dict())
        return twin.to(self.device).train()

    def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
        with autocasting(self.device, self.autocast):
            return model(**batch).loss

    def results(self, model: nn.Module, batch: Tensors) -> Tensors:
        """Every output, and the gradient of every trained parameter that has one; in double precision without autocast."""
        model.zero_grad(set_to_none=True)
        double = batch["pixel_values"].dtype == torch.float64
        with poisoned(), autocasting(self.device, None if double else self.autocast):
            output = model(**batch)
            output.loss.backward()
        found = {key: value.detach() for key, value in output.items() if isinstance(value, Tensor)}
        found |= {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    @cached_property
    def eager(self) -> Tensors:
        """The strong arm's results in the case's own precision."""
        model = self.model("strong")
        with _without_dropout(model):
            return self.results(model, self.batch)

    @cached_property
    def exact(self) -> Tensors:
        """The same in float64, without gradients that vanish, such as those of biases before a batch norm.

        What the backward needs is kept in the host's memory, for a GPU may have no room for it.
        """
        model = self.model("strong").double()
        batch = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in self.batch.items()}
        with _without_dropout(model), torch.autograd.graph.save_on_cpu():
            found = self.results(model, batch)
        return {key: tensor for key, tensor in found.items() if tensor.norm() > VANISHING * found["loss"].abs()}


def _trained(inputs: Inputs, model: MethodModel) -> Arm:
    """A model whose trained parameters AdamW updates."""
    optimizer = _optimizer(inputs, model)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def outputs(dropout: bool) -> Tensors:
        with nullcontext() if dropout else _without_dropout(model):
            return inputs.results(model, inputs.batch)

    return Arm(
        forward=lambda i: inputs.loss(model, inputs.batch),
        backward=lambda loss: loss.backward(),
        update=update,
        outputs=outputs,
        constants=[*model.parameters(), *model.buffers(), *inputs.batch.values()],
    )


def _graphed(inputs: Inputs) -> Arm:
    """The fastadapt arm's step as one call, which `graph_step` replays; verified by a graph without the update."""
    if inputs.device.type != "cuda":
        raise Unavailable("graph_step captures a CUDA graph, which needs a CUDA device")
    model = inputs.model("fastadapt")
    optimizer = _optimizer(inputs, model)

    def step(*tensors: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = inputs.loss(model, dict(zip(inputs.batch, tensors)))
        loss.backward()
        optimizer.step()
        return loss.detach()

    graphed = fastadapt.graph_step(step, optimizer)

    def forward(i: int) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise Unavailable("graph_step's step is a CUDA graph already, which no other can contain: see the wall clock")
        return graphed(*inputs.batch.values())

    def outputs(dropout: bool) -> Tensors:
        replayed = fastadapt.graph_step(lambda *tensors: inputs.results(model, dict(zip(inputs.batch, tensors))))
        with nullcontext() if dropout else _without_dropout(model):
            for _ in range(replayed.warmup + 1):
                found = replayed(*inputs.batch.values())
        return {key: tensor.clone() for key, tensor in found.items()}

    return Arm(
        forward=forward,
        backward=lambda loss: None,
        outputs=outputs,
        constants=[*model.parameters(), *model.buffers(), *inputs.batch.values()],
    )


def _optimizer(inputs: Inputs, model: MethodModel) -> torch.optim.Optimizer:
    on_gpu = inputs.device.type == "cuda"
    return torch.optim.AdamW(model.parameter_groups(LEARNING_RATE), capturable=on_gpu, fused=on_gpu)


def _compiled(model: MethodModel) -> MethodModel:
    compile_in_place([model])
    return model


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Every probability of dropout at zero, with batch norms as they train."""
    found: list[tuple[dict[str, Any], str, float]] = []
    for module in model.modules():
        names = [key for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)]
        names += ["p"] * isinstance(module, nn.Dropout)
        found += [(vars(module), key, vars(module)[key]) for key in names]
    for attributes, key, _ in found:
        attributes[key] = 0.0
    try:
        yield
    finally:
        for attributes, key, value in found:
            attributes[key] = value


def _verify(name: str, arm: Arm, inputs: Inputs) -> dict[str, Verdict]:
    """Without dropout, against the strong arm in float64, beside the same in the case's own precision."""
    dtype = inputs.autocast or torch.float32
    return {"dropout 0": judge(arm.outputs(False), inputs.eager, inputs.exact, dtype, SLACK)}
