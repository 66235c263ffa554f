"""PriorGuidedText: the linear of two states side by side, without putting them side by side, and its fold."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.counters import counting
from bench.memory import saved_bytes
from fastadapt import PriorGuidedText
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT, no_worse_than

TEXT, PRIOR, N = 12, 6, 7


def make(dtype: torch.dtype = torch.float64) -> PriorGuidedText:
    return randomise(PriorGuidedText(TEXT, PRIOR, N)).to(dtype)


def make_states(*size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*size, width, dtype=dtype, requires_grad=True) for width in (TEXT, PRIOR)]


def plain(module: PriorGuidedText, states: list[Tensor]) -> Tensor:
    return F.linear(torch.cat(states, -1), module.weight, module.bias)


def run(module: PriorGuidedText, states: list[Tensor]) -> Tensor:
    return module(*states)


def results(function: Callable[..., Tensor], module: PriorGuidedText, states: list[Tensor]) -> dict[str, Tensor]:
    """The output and every gradient."""
    return with_gradients(function(module, states), module, text=states[0], prior=states[1])


@pytest.mark.parametrize("size", [(), (5,), (0,), (2, 5), (2, 1, 3)])
def test_values_and_all_gradients_are_the_linear_of_the_concatenation(size):
    module, states = make(), make_states(*size)
    torch.testing.assert_close(results(run, module, states), results(plain, module, states), **EXACT)


def test_strided_states_are_read_as_they_are():
    module, states = make(), [state.transpose(0, 1) for state in make_states(5, 3)]
    torch.testing.assert_close(run(module, states), plain(module, states), **EXACT)


def test_frozen_states_leave_the_parameters_their_gradients():
    module, states = make(), [state.detach() for state in make_states(2, 5)]
    grads = [torch.autograd.grad(f(module, states).square().sum(), list(module.parameters())) for f in (run, plain)]
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_as_near_as_eager(dtype):
    module, exact = make(dtype), make()
    exact.load_state_dict(module.state_dict())
    states = make_states(64, dtype=dtype)
    ours, eager = (results(function, module, states) for function in (run, plain))
    no_worse_than(ours, eager, results(plain, exact, [state.detach().double().requires_grad_() for state in states]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_prior_of_another_dtype_is_cast_and_gets_a_gradient_in_its_own(dtype):
    module, (text, prior) = make(torch.float32), make_states(2, 5, dtype=torch.float32)
    prior = prior.detach().to(dtype).requires_grad_()
    y = module(text, prior)
    assert torch.equal(y, module(text, prior.float()))
    (grad,) = torch.autograd.grad(y.sum(), prior)
    assert grad.dtype is dtype and grad.abs().max() > 0


def test_autocast_casts_a_float16_prior_and_a_float32_text():
    module, (text, prior) = make(torch.float32), make_states(2, 5, dtype=torch.float32)
    prior = prior.detach().half()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(text, prior)
    assert y.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        eager = F.linear(torch.cat([text, prior.float()], -1), module.weight, module.bias)
    torch.testing.assert_close(y, eager, rtol=2**-6, atol=2**-6)


def test_nothing_is_put_side_by_side_nor_kept_and_two_products_are_all():
    module, states = make(), make_states(2, 5)
    with counting() as launches:
        y = run(module, states)
    assert dict(launches.torch) == {"addmm": 1, "addmm_": 1}
    assert y.shape == (2, 5, N)
    assert saved_bytes(lambda: run(module, states), exclude=[*states, *module.parameters()]) == 0


def test_a_linears_state_dict_loads():
    linear, module = nn.Linear(TEXT + PRIOR, N).double(), make()
    module.load_state_dict(linear.state_dict())
    states = make_states(2, 5)
    torch.testing.assert_close(run(module, states), linear(torch.cat(states, -1)), **EXACT)


def test_the_start_is_a_linears_but_for_the_bias_and_the_count_the_papers():
    module = PriorGuidedText()
    assert sum(p.numel() for p in module.parameters()) == 983_808
    assert not module.bias.any()
    bound = (768 + 512) ** -0.5
    assert 0.99 * bound < module.weight.abs().max() <= bound


def test_one_made_on_meta_starts_as_others_do():
    module = PriorGuidedText(device="meta", dtype=torch.float16)
    assert module.weight.is_meta and module.weight.dtype is module.bias.dtype is torch.float16
    module.to_empty(device="cpu").reset_parameters()
    assert module.weight.isfinite().all() and not module.bias.any()


@pytest.mark.parametrize("bias", [True, False])
def test_the_fold_is_the_two_linears_and_changes_neither(bias):
    module, linear, states = make(), nn.Linear(N, 4, bias=bias).double(), make_states(2, 5)
    before = copy.deepcopy((module.state_dict(), linear.state_dict()))
    folded = module.folded(linear)
    torch.testing.assert_close(folded(*states), linear(plain(module, states)), **EXACT)
    torch.testing.assert_close((module.state_dict(), linear.state_dict()), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in [*module.parameters(), *linear.parameters()])


def test_the_fold_in_16_bits_is_rounded_once():
    module, linear = make(torch.bfloat16), nn.Linear(N, 4, dtype=torch.bfloat16)
    folded = module.folded(linear)
    exact = linear.weight.double() @ module.weight.double()
    assert folded.weight.dtype is folded.bias.dtype is torch.bfloat16
    torch.testing.assert_close(folded.weight.double(), exact, rtol=2**-8, atol=1e-6)
    bias = linear.weight.double() @ module.bias.double() + linear.bias.double()
    torch.testing.assert_close(folded.bias.double(), bias, rtol=2**-8, atol=1e-6)


def test_copies_and_state_dicts_keep_the_function():
    round_trips(make(), make_states(2, 5), run)


def test_compiled_without_a_graph_break_it_is_the_same():
    compiles(make(), make_states(2, 5), run)


def test_autocast_runs_and_is_near():
    runs_under_autocast(make(), make_states(2, 5), run)


def test_the_representation_tells_the_sizes():
    assert repr(make()) == "PriorGuidedText(text_dim=12, prior_dim=6, out_features=7)"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make()(torch.ones(2, PRIOR), torch.ones(2, PRIOR)), r"text: expected shape \(2, 12\)"),
        (lambda: make()(torch.ones(2, TEXT), torch.ones(1, PRIOR)), r"prior: expected shape \(2, 6\)"),
        (lambda: make()(torch.ones(2, TEXT).long(), torch.ones(2, PRIOR)), "text: expected a floating-point tensor"),
        (lambda: make().folded(nn.Linear(N + 1, 4)), "linear: expected .* in_features=7, got Linear"),
        (lambda: make().folded(nn.Identity()), "linear: expected .* in_features=7, got Identity"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
