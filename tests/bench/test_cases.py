"""The cases measure what they say: right arms pass, wrong ones do not, and formulas match a count by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.case import FASTADAPT, FROZEN, GRAPHED, PEFT, Unavailable
from bench.cases import CLIP, clip_lora, find, lora_linear, model_cases, operation_cases
from bench.cases.clip_lora import contrastive_loss
from bench.cases.lora_linear import ADDMM, Shape
from bench.plots import COLOURS
from bench.summary import ORDER

SMALL = Shape(rows=40, k=24, n=32, r=4, precision="fp32")
SHAPES = [SMALL, replace(SMALL, members=3), replace(SMALL, dropout=0.0), replace(SMALL, precision="autocast")]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [PEFT, ADDMM, FASTADAPT])
def test_every_arm_is_right(shape: Shape, name: str) -> None:
    case = lora_linear.case(shape)
    inputs = case.make_inputs(torch.device("cpu"))
    verdicts = case.verify(name, case.arms[name](inputs), inputs)
    settings = {"dropout 0", "dropout 0.1"} if name == FASTADAPT and shape.dropout else {"dropout 0"}
    assert set(verdicts) == settings
    assert [verdict.reason for verdict in verdicts.values() if not verdict.ok] == []


def test_a_wrong_scale_is_found() -> None:
    case = lora_linear.case(SMALL)
    inputs = case.make_inputs(torch.device("cpu"))
    layer = inputs.peft()[0]
    layer.scaling["default"] = 1.01
    case = replace(case, arms={"wrong": lambda inputs: lora_linear._arm(inputs, [layer])})
    (verdict,) = case.verify("wrong", case.arms["wrong"](inputs), inputs).values()
    assert not verdict.ok


@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: shape.name)
def test_arms_run_every_phase(shape: Shape) -> None:
    case = lora_linear.case(shape)
    inputs = case.make_inputs(torch.device("cpu"))
    for name in (FROZEN, PEFT, ADDMM, FASTADAPT):
        arm = case.arms[name](inputs)
        for phase in case.work:
            arm.step(phase)(0)


def test_work_by_hand() -> None:
    """One member: x (2, 3), W (5, 3), A (1, 3), B (5, 1), 4 bytes an element."""
    shape = Shape(rows=2, k=3, n=5, r=1, precision="fp32")
    forward = lora_linear.forward_work(shape)
    base, low = 2 * 2 * 5 * 3, 2 * 2 * 1 * 3 + 2 * 2 * 5 * 1
    assert forward.flops == base + low
    assert forward.bytes_min == 4 * (2 * 3 + 5 * 3 + 3 + 5 + 2 * 5)
    total = lora_linear.total_work(shape)
    assert total.flops - forward.flops == base + 2 * low  # dX; dS and dS A, dA and dB
    dx_dy_x, weight, factors_and_their_gradients = 2 * 3 + 2 * 5 + 2 * 3, 5 * 3, 2 * (3 + 5)
    assert total.bytes_min - forward.bytes_min == 4 * (dx_dy_x + weight + factors_and_their_gradients)


def test_the_table_finds_each_case_and_names_all_for_an_unknown_one() -> None:
    for device in CLIP:
        for name, case in (operation_cases(device) | model_cases(device)).items():
            assert case.name == name == find(name).name
    with pytest.raises(ValueError, match=r"case: expected one of\n  lora_linear [\s\S]*got 'nothing'"):
        find("nothing")


@pytest.mark.parametrize("device", CLIP)
def test_the_report_knows_every_arm(device: str) -> None:
    """One that it does not know would be timed and left out."""
    for case in (operation_cases(device) | model_cases(device)).values():
        assert set(case.arms) <= set(ORDER) and set(case.arms) <= set(COLOURS), case.name


def test_a_step_as_one_graph_is_not_available_without_a_gpu() -> None:
    case = clip_lora.case("bfloat16", 32)
    with pytest.raises(Unavailable, match="CUDA"):
        case.arms[GRAPHED](SimpleNamespace(device=torch.device("cpu")))


@pytest.mark.parametrize("tokens", clip_lora.IMAGES)
def test_images_become_as_many_tokens_as_the_case_says(tokens: int) -> None:
    case = clip_lora.case("bfloat16", 32, tokens=tokens)
    assert (case.params["image_size"] // case.params["patch_size"]) ** 2 + 1 == case.params["tokens"] == tokens


def test_contrastive_loss_rewards_matching_pairs() -> None:
    torch.manual_seed(0)
    scenes = torch.randn(4, 16)
    pairs = scenes.repeat_interleave(2, dim=0) + 0.01 * torch.randn(8, 16)
    assert contrastive_loss(pairs) < 0.1 * contrastive_loss(pairs[torch.randperm(8)])


def test_contrastive_loss_by_hand() -> None:
    """Two pairs of orthogonal unit vectors: one partner at similarity 1, two strangers at 0."""
    views = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    odds = torch.tensor(1 / 0.1, dtype=torch.float64).exp()
    assert contrastive_loss(views).item() == pytest.approx(-(odds / (odds + 2)).log().item())
