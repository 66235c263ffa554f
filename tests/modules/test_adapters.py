"""BottleneckAdapter and DynamicPriorAdapter: values, gradients, gates, starts, checkpoints and errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.counters import counting
from fastadapt import BottleneckAdapter, DynamicPriorAdapter
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT, no_worse_than

K, H, N, P = 12, 5, 7, 6

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "identity": lambda z: z,
}


def leaf(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=dtype, requires_grad=True)


def make_gated() -> DynamicPriorAdapter:
    return randomise(DynamicPriorAdapter(K, P, H))


def make_tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """a, prior and residual."""
    return leaf(2, 9, K, dtype=dtype), leaf(2, 9, P, dtype=dtype), leaf(2, 9, K, dtype=dtype)


def plain(module: BottleneckAdapter, x: Tensor, scale: float | Tensor, residual: Tensor | None = None) -> Tensor:
    if module.norm is not None:
        x = F.layer_norm(x, x.shape[-1:], module.norm.weight, module.norm.bias, module.norm.eps)
    hidden = ACTIVATIONS[module.activation](F.linear(x, module.down_proj.weight, module.down_proj.bias))
    y = F.linear(hidden, module.up_proj.weight, module.up_proj.bias)
    y = y * (scale[..., None] if isinstance(scale, Tensor) else scale)
    return y if residual is None else y + residual


def plain_gate(module: DynamicPriorAdapter, prior: Tensor) -> Tensor:
    normed = F.layer_norm(prior, prior.shape[-1:], module.prior_norm.weight, module.prior_norm.bias, 1e-5)
    return F.relu(F.linear(normed, module.gate_proj.weight, module.gate_proj.bias))[..., 0]


def plain_gated(module: DynamicPriorAdapter, a: Tensor, prior: Tensor, residual: Tensor | None = None) -> Tensor:
    return plain(module, a, plain_gate(module, prior), residual)


def run(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    return module(*inputs)


@pytest.mark.parametrize("scale", ["the module's", "a number", "one tensor", "one a token"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_all_gradients_are_the_equation(activation, norm, scale):
    module = randomise(BottleneckAdapter(K, H, N, activation=activation, norm=norm, norm_eps=1e-3, scale=0.3))
    x, residual = leaf(2, 4, K), leaf(2, 4, N)
    given = {"the module's": None, "a number": -1.5, "one tensor": leaf(), "one a token": leaf(2, 4)}[scale]
    inputs = {"x": x, "residual": residual} | ({"scale": given} if isinstance(given, Tensor) else {})
    got = with_gradients(module(x, scale=given, residual=residual), module, **inputs)
    expected = with_gradients(plain(module, x, 0.3 if given is None else given, residual), module, **inputs)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("size", [(), (1,), (0,), (3, 1, 2, 2)])
def test_any_leading_dimensions(size):
    module, x = randomise(BottleneckAdapter(K, H, N, norm=True)), leaf(*size, K)
    torch.testing.assert_close(
        with_gradients(module(x), module, x=x), with_gradients(plain(module, x, 1.0), module, x=x), **EXACT
    )


def test_a_frozen_input_costs_no_gradient_and_the_parameters_get_theirs():
    module, x = randomise(BottleneckAdapter(K, H, norm=True)), torch.randn(9, K, dtype=torch.float64)
    torch.testing.assert_close(
        with_gradients(module(x), module), with_gradients(plain(module, x, 1.0), module), **EXACT
    )
    products = []
    for trained in (False, True):
        y = module(x.clone().requires_grad_(trained))
        with counting() as launches:
            y.sum().backward()
        products.append(launches.torch["mm"])
    assert products[0] == products[1] - 1


def test_a_new_adapter_changes_nothing_and_trains():
    module, x = BottleneckAdapter(K, H, norm=True), torch.randn(4, K)
    y = module(x, residual=x)
    assert torch.equal(y, x)
    assert 0 < module.down_proj.weight.abs().max() <= 1 / math.sqrt(K)
    y.square().sum().backward()
    assert module.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("make", [lambda **like: BottleneckAdapter(K, H, norm=True, **like), DynamicPriorAdapter])
def test_modules_made_on_meta_start_as_others_do(make):
    module = make(device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert not module.up_proj.weight.any() and not module.up_proj.bias.any() and (module.norm.weight == 1).all()
    assert module.down_proj.weight.any()


def test_the_mode_of_training_does_not_matter():
    module, x = randomise(BottleneckAdapter(K, H)), leaf(3, K)
    assert torch.equal(module.train()(x), module.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_as_near_as_eager(dtype):
    module, exact = (randomise(BottleneckAdapter(48, 16, 40, norm=True, scale=0.5)) for _ in range(2))
    exact.load_state_dict(module.to(dtype).state_dict())
    x = leaf(64, 48, dtype=dtype)
    ours, eager = (with_gradients(y, module, x=x) for y in (module(x), plain(module, x, 0.5)))
    x = x.detach().double().requires_grad_()
    no_worse_than(ours, eager, with_gradients(plain(exact, x, 0.5), exact, x=x))


def test_float32_parameters_serve_an_input_in_16_bits():
    module, x = randomise(BottleneckAdapter(K, H, norm=True)).float(), leaf(9, K, dtype=torch.bfloat16)
    y = module(x)
    exact = plain(copy.deepcopy(module).double(), x.double(), 1.0)
    assert y.dtype is torch.bfloat16
    assert torch.linalg.vector_norm(y.double() - exact) < 0.02 * torch.linalg.vector_norm(exact)
    y.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in module.parameters())


def test_gated_values_and_all_gradients_are_the_equation():
    module, (a, prior, residual) = make_gated(), make_tokens()
    inputs = {"a": a, "prior": prior, "residual": residual}
    expected = with_gradients(plain_gated(module, a, prior, residual), module, **inputs)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    torch.testing.assert_close(with_gradients(module(a, prior, residual), module, **inputs), expected, **EXACT)
    torch.testing.assert_close(module(a, prior), plain_gated(module, a, prior), **EXACT)


def test_a_token_whose_gate_is_closed_gets_no_update_and_gives_no_gradient():
    module, (a, prior, residual) = make_gated(), make_tokens()
    gate = module.gate(prior)
    closed = gate == 0
    assert closed.any() and not closed.all()
    assert (gate.shape, gate.min()) == (prior.shape[:-1], 0)
    y = module(a, prior, residual)
    assert torch.equal(y[closed], residual[closed])
    for grad in torch.autograd.grad(y.square().sum(), [a, prior]):
        assert not grad[closed].any() and grad[~closed].any(-1).all()


def test_a_frozen_prior_and_a_frozen_input_leave_the_parameters_their_gradients():
    module, (a, prior, _) = make_gated(), (tensor.detach() for tensor in make_tokens())
    torch.testing.assert_close(
        with_gradients(module(a, prior), module), with_gradients(plain_gated(module, a, prior), module), **EXACT
    )


def test_the_residuals_gradient_is_the_results():
    module, (a, prior, residual) = make_gated(), make_tokens()
    grad = torch.randn_like(residual)
    (got,) = torch.autograd.grad(module(a.detach(), prior.detach(), residual), residual, grad)
    assert torch.equal(got, grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_prior_of_another_dtype_is_cast(dtype):
    module, (a, prior, _) = make_gated().float(), make_tokens(torch.float32)
    prior = prior.detach().to(dtype)
    y = module(a, prior)
    assert y.dtype is torch.float32
    assert torch.equal(y, module(a, prior.float()))


def test_a_state_dict_with_the_dead_projection_loads_without_it():
    tower, other = (nn.ModuleDict({"3": DynamicPriorAdapter(K, P, H)}) for _ in range(2))
    randomise(other).float()
    dead = {f"3.clip_down_proj.{name}": tensor for name, tensor in nn.Linear(P, H).state_dict().items()}
    released = {**other.state_dict(), **dead}
    count = len(released)
    tower.load_state_dict(released)
    assert len(released) == count
    assert tower.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tower.state_dict().items())
    for extra in ("3.clip_up_proj.weight", "3.clip_down_proj.scale"):
        with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{extra}"'):
            tower.load_state_dict({**released, extra: torch.zeros(1)})
    del released["3.gate_proj.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "3.gate_proj.bias"'):
        tower.load_state_dict(released)


def test_the_count_of_parameters_is_the_released_one_less_the_dead():
    dead = nn.Linear(512, 32)
    count, unused = (sum(p.numel() for p in module.parameters()) for module in (DynamicPriorAdapter(), dead))
    assert (count, unused, count + unused) == (53_025, 16_416, 69_441)


CASES = {
    "plain": lambda: (randomise(BottleneckAdapter(K, H, N, norm=True)), [leaf(2, 9, K)]),
    "gated": lambda: (make_gated(), list(make_tokens())),
}
each_module = pytest.mark.parametrize("case", CASES)


@each_module
def test_copies_and_state_dicts_keep_the_function(case):
    round_trips(*CASES[case](), run)


@each_module
def test_compiled_without_a_graph_break_it_is_the_same(case):
    compiles(*CASES[case](), run)


@each_module
def test_autocast_runs_and_is_near(case):
    runs_under_autocast(*CASES[case](), run)


def test_representations_tell_the_options():
    module = BottleneckAdapter(K, H, activation="gelu", scale=0.1)
    assert "activation='gelu', scale=0.1" in repr(module) and "(norm)" not in repr(module)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: BottleneckAdapter(K, 0), "bottleneck: expected .* got 0"),
        (lambda: BottleneckAdapter(K, H, activation="tanh")(torch.ones(K)), "activation: expected .* got 'tanh'"),
        (lambda: BottleneckAdapter(K, H)(torch.ones(2, K + 1)), r"down_weight: expected shape \(any, 13\)"),
        (lambda: DynamicPriorAdapter(K, P)(torch.ones(2, K), torch.ones(3, P)), r"prior: expected shape \(2, 6\)"),
        (lambda: DynamicPriorAdapter(K, P)(None, torch.ones(3, P)), "a: expected .* got NoneType"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
