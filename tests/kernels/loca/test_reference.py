"""The reference, in float64, against a composition of torch functions and against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.memory import saved_bytes
from tests.kernels.loca.calls import STAGES, Call, as_near_as_eager, composed, fused, make, randn, results, with_moments
from tests.tolerance import EXACT

reference = fused("reference")
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
every_site = pytest.mark.parametrize("site", [False, True], ids=["alone", "site"])


def check(call: Call, grad: Tensor | None = None) -> None:
    expected = results(composed, call, grad)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    torch.testing.assert_close(results(reference, call, grad), expected, **EXACT)


@every_site
@every_mode
@pytest.mark.parametrize(("batch", "grid"), [(2, (3, 5)), (1, (7, 7)), (3, (1, 2)), (33, (2, 2)), (2, (5, 9))], ids=str)
def test_values_and_every_gradient(batch, grid, training, site):
    check(make(batch, grid, training=training, site=site))


@every_mode
def test_a_frozen_input(training):
    call = make(training=training, frozen=True)
    assert "d n" not in results(reference, call)
    check(call)


@every_mode
@pytest.mark.parametrize("missing", ["n", "down_weight", "reduce.weight", "local.norm_bias", "up_weight", "mlp", "residual"])
def test_without_one_gradient_the_others_are_the_same(missing, training):
    call = make(training=training, site=True)
    expected = results(reference, call)
    call.tensors[missing].requires_grad_(False)
    found = results(reference, call)
    assert f"d {missing}" not in found and len(found) == len(expected) - 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_of_the_sum_alone_the_gradients_are_the_grads_own():
    call = make(site=True).requiring("mlp", "residual")
    out = reference(call)
    grad = randn(out.shape).to(out.dtype)
    dmlp, dresidual = torch.autograd.grad(out, [call.tensors["mlp"], call.tensors["residual"]], grad)
    assert torch.equal(dresidual, grad)
    assert torch.equal(dmlp, grad * call.tensors["layer_scale"])


def test_in_training_the_convolutions_biases_change_nothing_and_get_zero():
    call = make()
    found = results(reference, call)
    moved = call.with_tensors(t + 1.0 if n in {f"{s}.bias" for s in STAGES} else t for n, t in call.tensors.items())
    assert torch.equal(reference(moved), found["out"])
    for stage in STAGES:
        assert not found[f"d {stage}.bias"].any()


def test_moments_are_means_with_the_biases_and_unbiased_variances():
    call = make()
    t, (height, width) = call.tensors, call.grid
    _, moments = with_moments(call, "reference")
    h = torch.relu(t["n"] @ t["down_weight"].t() + t["down_bias"])[:, 1:].reshape(-1, 12)
    u = torch.cat([h @ t[f"{stage}.weight"].flatten(1).t() + t[f"{stage}.bias"] for stage in ("point", "reduce")], 1)
    torch.testing.assert_close(moments[:, :11], torch.stack((u.mean(0), u.var(0))), **EXACT)
    assert moments.shape == (2, 15) and not moments.requires_grad
    assert with_moments(make(training=False))[1] is None


def transposed(call: Call) -> Call:
    """The same numbers with n's first two dimensions swapped in memory, and square matrices' two."""
    return call.with_tensors(
        (t.detach().transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t.detach()).requires_grad_(t.requires_grad)
        for t in call.tensors.values()
    )


@every_mode
def test_any_layout(training):
    call = transposed(make(training=training, site=True))
    assert not call.tensors["n"].is_contiguous()
    check(call)
    check(call, randn(16, 2, 10).double().transpose(0, 1))


@every_site
@every_mode
def test_derivatives_of_first_and_second_order(training, site):
    call = make(1, (1, 3), 2, (2, 1, 1), 2, training=training, site=site)
    trained = [name for name, tensor in call.tensors.items() if tensor.requires_grad]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(trained, tensors))
        return reference(call.with_tensors(given.get(name, tensor) for name, tensor in call.tensors.items()))

    tensors = [call.tensors[name] for name in trained]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_two_bytes_an_element_of_n_are_kept(dtype):
    """Eager keeps 5.6: n, h, y, and every convolution's result before and after its batch norm and ReLU."""
    call = make(32, (37, 37), 768, (192, 24, 96), 768, site=True, dtype=torch.float32).to("meta")
    call.tensors["mlp"] = call.tensors["mlp"].detach().to(dtype).requires_grad_()

    def under_autocast(function) -> float:
        with torch.autocast("cpu", dtype):
            return saved_bytes(lambda: function(call), exclude=call.tensors.values()) / call.tensors["n"].numel()

    assert under_autocast(reference) < 2.001
    assert under_autocast(composed) > 5


@every_site
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype, training, site):
    call = make(4, (9, 8), 64, (32, 8, 16), 64, training=training, site=site, clear=True, dtype=dtype)
    as_near_as_eager(reference, call)
