"""The cases of operations that are plain functions: right arms pass, wrong ones do not, and counts are those by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench import job
from bench.case import (
    CHANNELS_LAST, COMPILED, CUDNN_ARMS, EAGER, FASTADAPT, ONE_BY_ONE, RELEASED, SDPA, STACKED, XFORMERS, Arm, Unavailable
)  # fmt: skip
from bench.cases import (
    OPERATIONS,
    bottleneck_adapter,
    frozen_group,
    functional,
    light_interaction,
    loca,
    local_conv_adapter,
    local_dwconv,
    lora_linear,
    operation_cases,
    prior_attention,
    side_fusion,
)
from bench.clocks import ROTATION
from bench.rows import Recorder, read
from bench.run import Session
from bench.summary import comparisons

CPU = torch.device("cpu")
ADAPTER = partial(bottleneck_adapter.Shape, rows=40, width=24, hidden=8)
ATTENTION = prior_attention.Shape(batch=2, queries=30, keys=5, num_heads=2, head_width=8, precision="fp32")
INTERACTION = partial(light_interaction.Shape, batch=2, tokens=30, words=5, width=16, num_heads=2)
PLAIN = {
    bottleneck_adapter: ADAPTER(norm=True, scale="rows", residual=True, precision="fp32"),
    prior_attention: ATTENTION,
    light_interaction: INTERACTION(precision="fp32"),
}
SMALL = [
    *PLAIN.items(),
    (bottleneck_adapter, ADAPTER(activation="gelu", scale=0.1, frozen=True, precision="fp32")),
    (bottleneck_adapter, ADAPTER(norm=True, scale=0.1, residual=True, precision="autocast")),
    (light_interaction, INTERACTION(precision="autocast")),
    (local_dwconv, local_dwconv.Shape(2, 5, 16, precision="fp32")),
    (local_conv_adapter, local_conv_adapter.Shape(2, 5, 24, 8, precision="fp32")),
    (loca, loca.Shape(2, 5, precision="fp32")),
    (frozen_group, frozen_group.Shape(40, width=24, outputs=16, r=4, precision="fp32")),
    (frozen_group, frozen_group.Shape(40, "quick_gelu", width=32, outputs=16, members=1, r=4, precision="autocast")),
    (side_fusion, side_fusion.Shape("vision", 2, 5, layers=2, precision="fp32")),
    (side_fusion, side_fusion.Shape("text", 2, 3, layers=1, precision="fp32")),
]
each_operation = pytest.mark.parametrize("module", PLAIN, ids=lambda module: module.__name__.split(".")[-1])


def reasons(case: Any, name: str) -> list[str]:
    """Why the arm is wrong, by every verdict there is on it."""
    inputs = case.make_inputs(CPU)
    verdicts = case.verify(name, case.arms[name](inputs), inputs)
    assert verdicts
    return [verdict.reason for verdict in verdicts.values() if not verdict.ok]


@pytest.mark.parametrize("module, shape", SMALL, ids=[shape.name for _, shape in SMALL])
def test_every_arm_is_right(module: ModuleType, shape: Any) -> None:
    case = module.case(shape)
    names = [name for name in case.arms if name not in (COMPILED, XFORMERS, *CUDNN_ARMS)]
    assert {name: reasons(case, name) for name in names} == {name: [] for name in names}
    assert FASTADAPT in names


def test_no_operation_is_left_out() -> None:
    assert {module for module, _ in SMALL} | {lora_linear} == set(OPERATIONS.values())


@each_operation
def test_the_compiled_arm_is_one_graph_and_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_quickly = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(functional, "compile_function", compile_quickly)
    assert reasons(module.case(PLAIN[module]), COMPILED) == []


@each_operation
def test_a_wrong_result_is_found(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.fused
    monkeypatch.setattr(module, "fused", lambda *call: {name: 1.001 * result for name, result in right(*call).items()})
    assert reasons(module.case(PLAIN[module]), FASTADAPT)


@each_operation
def test_a_wrong_gradient_behind_a_right_result_is_found(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(shape: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        *_, last = tensors.values()
        return {name: result + (last - last.detach()).sum() for name, result in right(shape, tensors).items()}

    right = module.fused
    monkeypatch.setattr(module, "fused", wrong)
    (reason,) = reasons(module.case(PLAIN[module]), FASTADAPT)
    *_, last = [name for normals in specified(module) for name in normals]
    assert reason.startswith(f"d{last}: error")


def specified(module: ModuleType) -> tuple[dict, dict]:
    workload = module.case(PLAIN[module]).make_inputs(torch.device("meta")).workload
    return workload.activations, workload.parameters


def test_xformers_is_not_available_without_a_gpu() -> None:
    with pytest.raises(Unavailable, match="CUDA"):
        reasons(prior_attention.case(ATTENTION), XFORMERS)


def test_settings_of_cudnn_are_not_available_without_a_gpu() -> None:
    case = local_dwconv.case(local_dwconv.Shape(2, 5, 16, precision="fp32"))
    assert set(CUDNN_ARMS) < set(case.arms)
    for name in CUDNN_ARMS:
        with pytest.raises(Unavailable, match="CUDA"):
            reasons(case, name)


def test_settings_of_cudnn_hold_in_both_directions_and_no_longer() -> None:
    seen, settings = [], {"benchmark": True, "deterministic": True}

    def look(*call: Any) -> None:
        seen.append({name: getattr(torch.backends.cudnn, name) for name in settings})

    arm = local_dwconv.under_cudnn(Arm(look, look, look, ()), settings)
    look(), arm.forward(0), arm.backward(None), arm.outputs(False), look()
    assert seen[1:4] == 3 * [settings]
    assert seen[0] == seen[4] != settings


@each_operation
def test_arms_run_every_phase_on_every_set(module: ModuleType) -> None:
    case = module.case(PLAIN[module])
    inputs = case.make_inputs(CPU)
    for name in [name for name in case.arms if name not in (COMPILED, XFORMERS, *CUDNN_ARMS)]:
        arm = case.arms[name](inputs)
        for phase in case.work:
            arm.step(phase)(ROTATION - 1)


@each_operation
def test_sets_have_activations_of_their_own_and_share_parameters(module: ModuleType) -> None:
    case = module.case(PLAIN[module])
    arm = case.arms[FASTADAPT](case.make_inputs(CPU))
    activations, parameters = specified(module)
    first, second = (arm.forward(i)[0] for i in (0, 1))
    assert all(not torch.equal(first[name], second[name]) for name in activations)
    assert all(first[name] is second[name] for name in parameters)


def test_torchs_attention_gets_tokens_first_and_fastadapt_samples_first() -> None:
    case = light_interaction.case(INTERACTION(precision="fp32"))
    inputs = case.make_inputs(CPU)
    for name, shape in ((RELEASED, (30, 2, 16)), (SDPA, (30, 2, 16)), (FASTADAPT, (2, 30, 16))):
        arm = case.arms[name](inputs)
        x = arm.forward(0)[0]["x"]
        assert x.shape == shape and x.is_contiguous()
        assert arm.outputs(False)["x'"].shape == arm.outputs(False)["dx"].shape == (2, 30, 16)


def test_adapter_work_by_hand() -> None:
    """x, residual and y (2, 3); D (5, 3), d (5,), U (3, 5), u (3,), LayerNorm's two (3,); a scale for each of 2 rows."""
    shape = bottleneck_adapter.Shape(2, 3, 5, norm=True, scale="rows", residual=True, precision="fp32")
    forward, backward = bottleneck_adapter.forward_work(shape), bottleneck_adapter.backward_work(shape)
    product, parameters = 2 * 2 * 3 * 5, 15 + 5 + 15 + 3 + 3 + 3
    assert forward.flops == 2 * product
    assert forward.bytes_min == 4 * (3 * 2 * 3 + 2 + parameters)
    assert backward.flops == 4 * product
    assert backward.bytes_min == 4 * (3 * 2 * 3 + 2 * 2 + 2 * parameters)
    frozen = bottleneck_adapter.Shape(2, 3, 5, frozen=True, precision="autocast")
    assert bottleneck_adapter.backward_work(frozen).flops == 3 * product
    assert bottleneck_adapter.backward_work(frozen).bytes_min == 2 * (2 * 2 * 3) + 4 * 2 * (15 + 5 + 15 + 3)


def test_attention_work_by_hand() -> None:
    """One sample, 2 queries over 3 keys, 2 heads of 5."""
    shape = prior_attention.Shape(1, 2, 3, 2, 5, "bf16")
    forward, backward = prior_attention.forward_work(shape), prior_attention.backward_work(shape)
    assert forward.flops == 2 * (2 * 2 * 3 * 10)
    assert forward.bytes_min == 2 * (2 * 20 + 2 * 30)
    assert backward.flops == 4 * (2 * 2 * 3 * 10)
    assert backward.bytes_min == 2 * (3 * 20 + 4 * 30)  # q, dO, dq; k, v, dk, dv


def test_interaction_work_by_hand() -> None:
    """One sample, 3 tokens and 2 words of width 4."""
    shape = light_interaction.Shape(1, 3, 2, width=4, num_heads=2, precision="autocast")
    forward, backward = light_interaction.forward_work(shape), light_interaction.backward_work(shape)
    over_words = 2 * 16 * (3 + 2 + 2 + 3) + 2 * (2 * 3 * 2 * 4)  # q, k, v and out; scores and their product with v
    assert forward.flops == 2 * over_words  # the other direction has as many
    parameters = 2 * (3 * 16 + 12 + 16 + 4)
    assert forward.bytes_min == 2 * (2 * 5 * 4) + 4 * parameters
    assert backward.flops == 2 * forward.flops
    assert backward.bytes_min == 2 * (3 * 5 * 4) + 4 * 2 * parameters


@pytest.mark.parametrize(("prologue", "affine"), [("layer_norm", 2 * 3), ("gelu", 0)])
def test_group_work_by_hand(prologue: str, affine: int) -> None:
    """Two members of rank 1: x (2, 3), W (5, 3), b (5,), A (1, 3), B (5, 1); LayerNorm's affine (3,) each."""
    shape = frozen_group.Shape(2, prologue, width=3, outputs=5, members=2, r=1, precision="fp32")
    forward, backward = frozen_group.forward_work(shape), frozen_group.backward_work(shape)
    linear, low = 2 * (2 * 2 * 3 * 5), 2 * (2 * 2 * 1 * (3 + 5))
    assert (forward.flops, backward.flops) == (linear + low, linear + 2 * low)
    assert forward.bytes_min == 4 * (2 * 3 + 2 * 2 * 5 + 2 * (15 + 5) + affine + 2 * (3 + 5))
    assert backward.bytes_min == 4 * (2 * 2 * 3 + 2 * 2 * 5 + 2 * 15 + affine + 2 * 2 * (3 + 5))


@pytest.mark.parametrize(("tower", "width", "own", "frozen"), [("vision", 256, 0, 0), ("text", 768, 512, 4 * 768)])
def test_tower_work_by_hand(tower: str, width: int, own: int, frozen: int) -> None:
    """Two adapters over 6 tokens, each a tap wide, and two bases."""
    shape = side_fusion.Shape(tower, 2, 3, layers=1)
    forward, backward = side_fusion.forward_work(shape), side_fusion.backward_work(shape)
    product = 2 * 6 * width * 128
    assert (forward.flops, backward.flops) == (4 * product, 6 * product)
    shared = 256 * 128 + 256
    trained = 2 * (128 * width + 128) + shared + own * 128 + own + (128 * width + width) + 2 * width
    assert forward.bytes_min == 2 * (5 * 6 * width + trained + frozen)
    assert backward.bytes_min == 2 * (3 * 6 * width + 2 * trained + frozen)


def counted(case: Any, folder: Path) -> dict[str, tuple[int, int, int, dict[str, int]]]:
    """Launches forward and backward, bytes kept and kernels by name, for every arm that can be counted."""
    Session(Recorder(folder / "rows.jsonl", "run", {}), {}, {}).count(case)
    rows = [row for row in read(folder / "rows.jsonl") if row.status == "ok"]
    saved = {row.arm: row.values["saved_bytes"] for row in rows if row.kind == "saved"}
    return {
        row.arm: (row.values["forward_count"], row.values["backward_count"], saved[row.arm], row.values["kernels"])
        for row in rows
        if row.kind == "launches"
    }


def test_an_adapter_is_one_launch_forward_and_two_backward(tmp_path: Path) -> None:
    rows, width, hidden = 4096, 768, 64
    shape = bottleneck_adapter.Shape(rows, width, hidden, norm=True, scale=0.1, residual=True)
    found = counted(bottleneck_adapter.case(shape), tmp_path)
    x, z, statistics = 2 * rows * width, 2 * rows * hidden, 4 * 2 * rows
    assert found[FASTADAPT][:3] == (1, 2, x + z + statistics)
    assert found[EAGER][0] == 6  # LayerNorm, two products, the activation, the scale, the sum
    assert found[EAGER][2] == 2 * x + z + statistics


def test_a_local_adapter_in_inference_is_two_launches_and_keeps_nothing(tmp_path: Path) -> None:
    """Its parts: two products, the convolution, the activation, and scale and residual; eager has both layouts too."""
    found = counted(local_conv_adapter.case(local_conv_adapter.Shape(32, 37)), tmp_path)
    assert {arm: row[:3] for arm, row in found.items()} == {
        FASTADAPT: (2, 0, 0), ONE_BY_ONE: (5, 0, 0), CHANNELS_LAST: (6, 0, 0), EAGER: (7, 0, 0)
    }  # fmt: skip
    assert found[FASTADAPT][3] == {"prepare_kernel": 1, "adapter_kernel": 1}
    assert {comparison.what for comparison in comparisons(read(tmp_path / "rows.jsonl"))} == {"kernel launches"}


def test_local_adapter_work_by_hand() -> None:
    """5 tokens of width 3, of which 4 are a grid; hidden 7."""
    work = local_conv_adapter.forward_work(local_conv_adapter.Shape(1, 2, 3, 7, precision="autocast"))
    assert work.flops == 2 * (2 * 5 * 3 * 7) + 2 * 9 * 4 * 7
    assert work.bytes_min == 2 * (3 * 5 * 3) + 4 * (2 * 3 * 7 + 7 + 9 * 7 + 7 + 3)


def test_a_group_keeps_its_input_and_the_low_rank_products(tmp_path: Path) -> None:
    rows, width, r = 4096, 768, 16
    found = counted(frozen_group.case(frozen_group.Shape(rows)), tmp_path)
    assert found[FASTADAPT][0] == 2 and found[FASTADAPT][1] <= 5
    x, products, statistics = 2 * rows * width, 3 * 2 * rows * r, 4 * 2 * rows
    assert found[FASTADAPT][2] == x + products
    assert found[ONE_BY_ONE][2] == 2 * x + statistics + products  # n, too
    assert found[EAGER][0] == 1 + 3 * 5


def test_attention_keeps_its_inputs_alone(tmp_path: Path) -> None:
    found = counted(prior_attention.case(prior_attention.Shape(4, 197, 77, 12, 64)), tmp_path)
    inputs, scores = 2 * 4 * (197 + 2 * 77) * 768, 2 * 4 * 12 * 197 * 77
    assert found[FASTADAPT][:3] == (1, 1, inputs)
    assert found[EAGER][2] == inputs + scores
    assert found[SDPA][:2] == (1, 1)
    assert XFORMERS not in found and COMPILED not in found


def test_an_interaction_is_two_launches_forward_and_keeps_no_map(tmp_path: Path) -> None:
    batch, tokens, words, width = 4, 676, 17, 64
    found = counted(light_interaction.case(light_interaction.Shape(batch, tokens, words, width)), tmp_path)
    x, y, maps = 2 * batch * tokens * width, 2 * batch * words * width, 2 * 2 * batch * 8 * tokens * words
    assert found[FASTADAPT][0] <= 2
    assert found[FASTADAPT][2] <= 2 * x + 4 * y < maps
    assert found[RELEASED][2] > 3 * x + maps
    assert found[RELEASED][3]["_softmax"] == 2
    assert found[SDPA][3]["_scaled_dot_product_flash_attention"] == 2
    assert "_softmax" not in found[SDPA][3]


@pytest.mark.parametrize(("tower", "tokens", "mib"), [("vision", 400, 25.0), ("text", 20, 3.75)])
def test_a_towers_side_is_few_launches_and_keeps_its_taps(tower: str, tokens: int, mib: float, tmp_path: Path) -> None:
    """mib: of the two taps of a layer of M2IST at its batch of 64."""
    found = counted(side_fusion.case(side_fusion.Shape(tower, 64, tokens)), tmp_path)
    forward, backward, saved, _ = found[FASTADAPT]
    assert forward <= 2 and backward <= 4 and saved == 6 * mib * 2**20
    for arm in (RELEASED, STACKED, ONE_BY_ONE):
        assert found[arm][0] > 10 and found[arm][1] > 20 and found[arm][2] > 1.5 * saved, arm


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_two_cases_of_a_device_share_a_name(device: str) -> None:
    shapes = {name: module.SHAPES if device == "cuda" else module.REDUCED_SHAPES for name, module in OPERATIONS.items()}
    assert len(operation_cases(device)) == sum(map(len, shapes.values()))
    for operation, own in shapes.items():
        assert [name.split()[0] for name in operation_cases(device, [operation])] == [operation] * len(own)


@pytest.mark.parametrize("argument, operations, names", [("op", ["nothing"], []), ("case", [], ["nothing"])])
def test_an_unknown_name_is_an_error(argument: str, operations: list[str], names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: expected some of\n  [\s\S]*got nothing"):
        job.operations(tmp_path, operations, names, Console(quiet=True))
