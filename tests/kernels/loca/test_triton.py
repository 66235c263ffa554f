"""The Triton kernels on odd shapes: interpreted, or compiled where there is a GPU.

All memory that a call allocates starts as NaN, so an element that no kernel writes shows; interpreted kernels that
leave their arguments raise (fastadapt.prove.interpreter).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.counters import counting
from fastadapt.core.launch import recording, target
from fastadapt.kernels.loca import config, triton_grad_kernel, triton_inference_kernel, triton_kernel, triton_launch
from fastadapt.prove.judge import poisoned
from tests.kernels.loca.calls import DEVICE, STAGES, Call, as_near_as_eager, composed, fused, make, randn, results, with_moments
from tests.kernels.loca.test_reference import transposed
from tests.tolerance import DEEP

triton = fused("triton")
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
every_site = pytest.mark.parametrize("site", [False, True], ids=["alone", "site"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """NaN in fresh memory, and kernels for float32: interpreted, TF32's are exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with poisoned():
        yield
    torch.set_float32_matmul_precision(before)


def check(call: Call, grad: Tensor | None = None) -> None:
    """Outputs and gradients are as near to float64's as those of the composition in the same dtype."""
    with recording() as launches:
        as_near_as_eager(triton, call, grad)
    assert launches


@every_site
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_kind_and_dtype(dtype, training, site):
    clear = dtype is not torch.float32
    check(make(1, (5, 9), 40, (32, 9, 17), 56, training=training, site=site, clear=clear, dtype=dtype))


CHANNELS = [(1, 1, 1), (15, 1, 1), (16, 16, 16), (17, 24, 31), (40, 8, 96), (193, 32, 127)]


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_any_number_of_channels(channels):
    call = make(1, (3, 3), 24, channels, 24, dtype=torch.float32)
    found, exact = results(triton, call), results(composed, call.to(torch.float64))
    torch.testing.assert_close({name: tensor.double() for name, tensor in found.items()}, exact, **DEEP)


SIZES = {
    "two patches": (1, (1, 2), 8, 8),
    "a column of patches": (2, (11, 1), 8, 24),
    "tokens that end with a tile": (4, (3, 5), 16, 16),
    "several tiles, a class token in any place": (3, (4, 4), 33, 51),
    "many small samples": (17, (2, 1), 8, 8),
}


@every_mode
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, training):
    batch, grid, depth, width = SIZES[size]
    check(make(batch, grid, depth, (8, 3, 4), width, training=training, site=True, dtype=torch.float32))


def test_a_sample_of_one_patch_in_eval():
    check(make(1, (1, 1), training=False, dtype=torch.float32))


def test_rows_of_patches_longer_than_a_tile_in_eval():
    """So that neighbours are two tiles away."""
    check(make(1, (2, 17), training=False, dtype=torch.float32))


def test_an_empty_batch_in_eval():
    assert triton(make(0, training=False, dtype=torch.float32)).shape == (0, 16, 10)


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_the_tiles_of_every_kind_of_gpu(arch):
    if DEVICE.type == "cuda":
        pytest.skip("a GPU has the tiles of its own kind")
    with target(arch):
        check(make(2, (9, 8), 48, (32, 8, 16), 48, site=True, clear=True, dtype=torch.bfloat16))


@every_mode
def test_any_layout(training):
    call = transposed(make(3, training=training, site=True, dtype=torch.float32))
    check(call, randn(16, 3, 10).transpose(0, 1))


def test_one_number_as_the_gradient():
    check(make(dtype=torch.float32), randn(1, 1, 1).expand(2, 16, 10))


def test_more_programs_than_are_added_up_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_launch, "GROUP", 2)
    check(make(2, (5, 7), dtype=torch.float32))


@pytest.mark.parametrize("splits", [1, 3])
def test_partial_sums_of_any_number(splits, monkeypatch):
    monkeypatch.setattr(config, "row_splits", lambda *sizes: splits)
    check(make(2, (5, 7), dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters(dtype):
    call = make(2, (9, 8), 48, (32, 8, 16), 48, clear=True, dtype=dtype, parameter_dtype=torch.float32)
    found = results(triton, call)
    assert all(found[f"d {name}"].dtype == call.tensors[name].dtype for name in call.tensors)
    check(call)


def test_a_float32_residual_under_16_bits():
    """The stream stays float32: the sum is added to it unrounded, and its gradient comes back as it is."""
    call = make(2, (9, 8), 48, (32, 8, 16), 48, site=True, clear=True, dtype=torch.bfloat16)
    call.tensors["residual"] = randn(2, 73, 48).requires_grad_()
    found = results(triton, call)
    assert found["out"].dtype is found["d residual"].dtype is torch.float32
    check(call)


def test_a_large_mean_costs_the_batch_norms_no_digits():
    call = make(2, (5, 5), dtype=torch.float32)
    call.tensors["down_bias"].detach().add_(100.0)
    _, moments = with_moments(call.to(torch.float64))
    assert (moments[0].square() > 100 * moments[1]).any()
    torch.testing.assert_close(with_moments(call, "triton")[1].double(), moments, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_gradient_of_an_inert_bias_is_exactly_zero(backend):
    found = results(fused(backend), make(site=True, dtype=torch.float32))
    assert not any(found[f"d {stage}.bias"].any() for stage in STAGES)


def test_moments_are_the_references():
    call = make(2, (5, 5), dtype=torch.float32)
    _, moments = with_moments(call.to(torch.float64))
    torch.testing.assert_close(with_moments(call, "triton")[1].double(), moments, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_the_references():
    call = make(2, (2, 3), 4, (4, 2, 2), 4, dtype=torch.float32)
    wanted = [tensor for name, tensor in call.tensors.items() if name not in {f"{stage}.bias" for stage in STAGES}]

    def curvature(function) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(function(call).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted)

    torch.testing.assert_close(curvature(triton), curvature(composed), **DEEP)


FORWARD = ["prepare_kernel", "hidden_kernel", "local_kernel", "output_kernel"]
BACKWARD = [
    *("prepare_kernel", "hidden_kernel", "local_kernel", "output_grad_kernel", "local_grad_kernel", "hidden_grad_kernel"),
    *("weight_grads_kernel", "local_weight_grad_kernel"),
]
INFERENCE = ["prepare_kernel", "inference_kernel"]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_four_launches_forward_and_eight_backward(frozen):
    call = make(1, (37, 37), 768, (192, 24, 96), 768, site=True, frozen=frozen, dtype=torch.bfloat16).to("meta")
    with recording() as forward:
        out = triton(call)
    with recording() as backward:
        torch.autograd.backward(out, torch.empty_like(out))
    assert [launch.name for launch in forward] == FORWARD
    assert [launch.name for launch in backward] == BACKWARD
    wide = [arg for arg in backward[5].args if isinstance(arg, Tensor) and arg.shape == call.tensors["n"].shape]
    assert len(wide) == (0 if frozen else 1)  # dn
    modules = triton_kernel, triton_grad_kernel, triton_inference_kernel
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {*FORWARD, *BACKWARD, *INFERENCE} == kernels


@pytest.mark.parametrize(
    ("parameters", "autocast"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)], ids=str
)
def test_twelve_launches_and_no_operation_of_torchs(parameters, autocast):
    """Counters are zeroed and weights cast in prepare_kernel, and gradients are written in their own dtype."""
    call = make(1, (37, 37), 768, (192, 24, 96), 768, site=True, dtype=torch.bfloat16, parameter_dtype=parameters).to("meta")
    wanted, grad = [tensor for tensor in call.tensors.values() if tensor.requires_grad], torch.empty_like(call.tensors["n"])
    with counting() as launches, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.autograd.grad(triton(call), wanted, grad)
    assert launches.torch == {}
    assert launches.triton.total() == 12


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recorded", [False, True], ids=["", "with gradients"])
def test_two_launches_in_eval(parameters, recorded):
    like = {"dtype": torch.bfloat16, "parameter_dtype": parameters}
    call = make(1, (37, 37), 768, (192, 24, 96), 768, training=False, site=True, **like).to("meta")
    with counting() as launches, torch.set_grad_enabled(recorded):
        triton(call)
    assert launches.torch == {}
    assert launches.triton == dict.fromkeys(INFERENCE, 1)


def test_of_the_sum_alone_no_kernel_runs_backward():
    call = make(2, (9, 8), site=True, dtype=torch.bfloat16).requiring("mlp", "residual").to("meta")
    out = triton(call)
    with recording() as backward:
        torch.autograd.backward(out, torch.empty_like(out))
    assert backward == []


def test_shapes_that_the_kernels_do_not_take_are_the_librarys():
    for channels in ((300, 8, 40), (40, 33, 8), (40, 8, 129)):
        with recording() as launches:
            triton(make(1, (2, 2), 8, channels, 8, dtype=torch.bfloat16))
        assert launches == []
    torch.set_float32_matmul_precision("highest")
    with recording() as launches:
        triton(make(dtype=torch.float32))
    assert launches == []
