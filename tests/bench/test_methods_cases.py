"""The methods' training steps as cases: right before they are timed, from one state dict on one batch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from bench.case import COMPILED, FASTADAPT, GRAPHED, RELEASED, STRONG, Case, Unavailable
from bench.cases import find, method_cases, methods
from bench.plots import COLOURS
from bench.summary import ORDER, STEP, Group

TESTED = ("m2ist", "mapper")


@cache
def tiny(name: str) -> tuple[Case, Any]:
    """The CPU's case of a method and its inputs."""
    case = methods.case(name, "cpu")
    return case, case.make_inputs(torch.device("cpu"))


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("arm", [RELEASED, STRONG, FASTADAPT])
def test_arms_are_right_and_take_steps(name: str, arm: str) -> None:
    case, inputs = tiny(name)
    built = case.arms[arm](inputs)
    (verdict,) = case.verify(arm, built, inputs).values()
    assert verdict.ok, verdict.reason
    before = built.forward(0).item()
    for _ in range(3):
        built.step("training step")(0)
    assert built.forward(0).item() != before


@pytest.mark.parametrize("name", TESTED)
def test_every_trained_parameter_is_verified(name: str) -> None:
    """But for the biases of LoCA's convolutions, which its batch norms take away again."""
    _, inputs = tiny(name)
    trained = {key for key, parameter in inputs.model("strong").named_parameters() if parameter.requires_grad}
    left_out = {key for key in trained if key.endswith("_conv.bias")}
    assert set(inputs.exact) == {"loss", "pred_boxes"} | trained - left_out
    assert len(left_out) == {"m2ist": 0, "mapper": 6}[name]


def test_a_wrong_gradient_is_found() -> None:
    case, inputs = tiny("m2ist")
    arm = case.arms[FASTADAPT](inputs)
    name = next(reversed(inputs.exact))
    wrong = replace(arm, outputs=lambda dropout: (found := arm.outputs(dropout)) | {name: 1.01 * found[name]})
    (verdict,) = case.verify(FASTADAPT, wrong, inputs).values()
    assert not verdict.ok and name in verdict.reason


def test_dropout_is_back_after_the_proof() -> None:
    case, inputs = tiny("m2ist")
    arm = case.arms[STRONG](inputs)
    assert arm.outputs(False)["loss"] == arm.outputs(False)["loss"]
    assert arm.outputs(True)["loss"] != arm.outputs(True)["loss"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_table_has_every_arm_and_the_report_knows_it(device: str) -> None:
    for name, case in method_cases(device, TESTED).items():
        assert list(case.arms) == [STRONG, COMPILED, FASTADAPT, GRAPHED, RELEASED]
        assert set(case.arms) <= set(ORDER) & set(COLOURS)
        assert find(name).name == name


def test_a_methods_step_is_not_the_main_jobs() -> None:
    for name, case in method_cases("cuda", TESTED).items():
        assert list(case.work) == [STEP] and not Group(name, STEP, "cpu", {}).main
    assert Group("CLIP ViT-B/16, batch 4, float32", STEP, "cpu", {}).main


def test_a_step_as_one_graph_is_not_available_without_a_gpu() -> None:
    case, inputs = tiny("m2ist")
    with pytest.raises(Unavailable, match="CUDA"):
        case.arms[GRAPHED](inputs)
