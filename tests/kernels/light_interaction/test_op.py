"""The public function: what it refuses, what it computes and no more, and how it meets autograd and autocast."""

from __future__ import annotations

import re

import pytest
import torch

from fastadapt import light_interaction
from fastadapt.core.backend import BackendError
from fastadapt.core.launch import recording
from fastadapt.kernels.light_interaction import config
from tests.kernels.light_interaction.calls import BACKENDS, DEVICE, EVERYTHING, WEIGHTS, Call, composed, fused, make, results
from tests.tolerance import no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments() -> dict:
    """Good ones on the CPU: x (2, 4, 6), y (2, 3, 6), two heads."""
    x, y, *roles = make((2, 4, 6), 3, 2, dtype=torch.float32).to("cpu").arguments
    names = ("in_proj_weights", "in_proj_biases", "out_proj_weights", "out_proj_biases")
    return {"x": x, "y": y, **dict(zip(names, roles)), "num_heads": 2}


ones = torch.ones
WRONG = {
    "x is a list": ({"x": [1.0]}, "x: expected a floating-point tensor of at least one dimension, got list"),
    "x is 2-D": ({"x": ones(4, 6)}, "x: expected shape (any, any, any), got shape (4, 6)"),
    "y has another width": ({"y": ones(2, 3, 5)}, "y: expected shape (2, any, 6), got shape (2, 3, 5)"),
    "y has another batch": ({"y": ones(1, 3, 6)}, "y: expected shape (2, any, 6), got shape (1, 3, 6)"),
    "y is double": ({"y": ones(2, 3, 6).double()}, "y: expected torch.float32, got torch.float64"),
    "y is elsewhere": ({"y": ones(2, 3, 6, device="meta")}, "y: expected a tensor on cpu, where the others are, got one on meta"),
    "one direction": ({"in_proj_weights": [ones(18, 6)]}, "in_proj_weights: expected 2 entries, one a direction, got 1"),
    "a weight is square": (
        {"in_proj_weights": [ones(18, 6), ones(6, 6)]},
        "in_proj_weights[1]: expected shape (18, 6), got shape (6, 6)",
    ),
    "a weight is half": (
        {"in_proj_weights": [ones(18, 6).half(), ones(18, 6)]},
        "in_proj_weights[0]: expected torch.float32, got torch.float16",
    ),
    "a bias is short": (
        {"in_proj_biases": [ones(6), ones(18)]},
        "in_proj_biases[0]: expected shape (18), got shape (6,)",
    ),
    "an output weight is missing": (
        {"out_proj_weights": [ones(6, 6), None]},
        "out_proj_weights[1]: expected a tensor, got NoneType",
    ),
    "an output bias is double": (
        {"out_proj_biases": [ones(6), ones(6).double()]},
        "out_proj_biases[1]: expected torch.float32, got torch.float64",
    ),
    "no heads": ({"num_heads": 0}, "num_heads: expected an integer of at least 1, got 0"),
    "heads are a float": ({"num_heads": 2.0}, "num_heads: expected an integer of at least 1, got 2.0"),
    "heads that do not divide": ({"num_heads": 4}, "num_heads: expected a divisor of x's width 6, got 4"),
    "mask is a number": ({"y_padding_mask": 1}, "y_padding_mask: expected None or a bool tensor, True for a key to ignore"),
    "mask is float": ({"y_padding_mask": ones(2, 3)}, "y_padding_mask: expected None or a bool tensor"),
    "mask is of x": ({"y_padding_mask": ones(2, 4).bool()}, "y_padding_mask: expected shape (2, 3), got shape (2, 4)"),
    "mask is elsewhere": (
        {"y_padding_mask": ones(2, 3, device="meta").bool()},
        "y_padding_mask: expected a tensor on cpu, where the others are, got one on meta",
    ),
    "backend is unknown": ({"backend": "native"}, "backend: expected None or one of reference, triton, got 'native'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        light_interaction(**arguments() | change)


@pytest.mark.parametrize(
    ("width", "words", "dtype", "reasons"),
    [
        (24, 5, torch.float32, "x is 24 wide, kernels for torch.float32 exist for 16, 32, 64"),
        (128, 5, torch.float32, "x is 128 wide, kernels for torch.float32 exist for 16, 32, 64"),
        (16, 33, torch.float32, "y has 33 rows, kernels take up to 32"),
        (24, 33, torch.float16, "x is 24 wide, kernels for torch.float16 exist for 16, 32, 64, 128; y has 33 rows"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(width, words, dtype, reasons):
    with pytest.raises(BackendError, match=f"^light_interaction: the triton backend cannot run: {re.escape(reasons)}"):
        fused("triton")(make((1, 3, width), words, 2, dtype=dtype))


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_what_kernels_can_take(arch, itemsize):
    for width in config.WIDTHS[itemsize]:
        problem = config.Problem(width, itemsize, exact=itemsize == 4, arch=arch)
        for tiles in (config.forward_tiles(problem), config.backward_tiles(problem), config.weight_tiles(problem)):
            assert tiles.rows >= 16 and tiles.rows & (tiles.rows - 1) == 0 and tiles.num_warps in (4, 8)


def test_splits_fill_the_gpu_and_no_more():
    problem = config.Problem(64, 2, exact=False, arch=90)
    assert config.splits(problem, rows=32 * 676, jobs=8) == 33  # two programs for each of 132 multiprocessors
    assert config.splits(problem, rows=32 * 676, jobs=1) == 64  # partial sums stay small
    assert config.splits(problem, rows=70, jobs=8) == 2
    assert config.splits(problem, rows=0, jobs=8) == 1


FORWARD = ["forward", "words"]
BACKWARD = ["over_image_backward", "over_words_backward", "words_backward"]


@pytest.mark.parametrize(
    ("needs", "backward"),
    [
        (EVERYTHING, [*BACKWARD, "weight_grads", "sum"]),
        (WEIGHTS, [*BACKWARD, "weight_grads", "sum"]),
        (("x", "y"), BACKWARD),
    ],
    ids=["everything", "weights", "inputs"],
)
def test_two_launches_forward_and_at_most_five_backward(needs, backward):
    call = make((32, 676, 64), 17, 8, dtype=torch.bfloat16, needs=needs).to("meta")
    with recording() as launches:
        results(fused("triton"), call)
    assert [launch.name.removesuffix("_kernel") for launch in launches] == FORWARD + backward


def test_weight_gradients_that_are_not_asked_for_are_not_computed():
    call = make((32, 676, 64), 17, 8, dtype=torch.bfloat16, needs=("x", "in_bias[1]", "out_weight[0]")).to("meta")
    with recording() as launches:
        results(fused("triton"), call)
    assert launches[-1].meta["JOBS"] == 4  # query, key and value of one direction, the output of the other


def flat(call: Call) -> list:
    x, y, *roles = call.arguments
    return [x, y, call.mask, *(role[i] for i in (0, 1) for role in roles)]


@every_backend
def test_opcheck_of_the_forward(backend):
    call = make((2, 5, 16), 3, 4, mask=(3, 2), dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastadapt.light_interaction.default, (flat(call), 4, backend))


@every_backend
def test_opcheck_of_the_backward(backend):
    call = make((2, 5, 16), 3, 4, mask=(3, 2), dtype=torch.float32, needs=("x", "in_weight[0]", "out_bias[1]"))
    wanted = [tensor is not None and tensor.requires_grad for tensor in flat(call)]
    tensors = [tensor if tensor is None else tensor.detach() for tensor in flat(call)]
    outputs = torch.ops.fastadapt.light_interaction(tensors, 4, backend)
    grads = [torch.randn_like(output) for output in outputs[:2]] + [None] * len(outputs[2:])
    arguments = ([*tensors, *outputs[2:]], grads, wanted, 4, backend)
    torch.library.opcheck(torch.ops.fastadapt.light_interaction_backward.default, arguments)


@every_backend
def test_nothing_is_recorded_without_gradients(backend):
    call = make((2, 5, 16), 3, 4, dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call)[0].requires_grad
    assert not fused(backend)(call.requiring())[0].requires_grad


@every_backend
def test_one_output_alone(backend):
    call = make((2, 5, 16), 3, 4, dtype=torch.float32)
    for i in (0, 1):
        wanted = [call.tensors["x"], call.tensors["y"]]
        found, expected = (torch.autograd.grad(function(call)[i].sum(), wanted) for function in (fused(backend), composed))
        torch.testing.assert_close(found, expected)


@every_backend
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_float32_weights(backend, autocast):
    call = make((2, 33, 32), 5, 4, mask=(5, 2), dtype=torch.float32)

    def under_autocast(function) -> dict[str, torch.Tensor]:
        with torch.autocast(DEVICE.type, autocast):
            return results(function, call)

    def halved(call: Call):
        return composed(call.having(x=call.tensors["x"].to(autocast), y=call.tensors["y"].to(autocast)))

    ours = under_autocast(fused(backend))
    assert ours["x'"].dtype == autocast and ours["d in_weight[0]"].dtype == torch.float32
    no_worse_than(ours, under_autocast(halved), results(composed, call.to(torch.float64)))


def test_autocast_leaves_float64_alone():
    call = make((2, 5, 16), 3, 4)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = fused("reference")(call)
    assert torch.equal(found[0], fused("reference")(call)[0])
