"""M2IST's side adapters: values and gradients of each form, the shared projection, the tower's norm, counts and starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import SideAdapter
from fastadapt.modules import side
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT

VISION, LANGUAGE, H = 8, 20, 6


def make_norm() -> nn.LayerNorm:
    """A tower's output LayerNorm."""
    return randomise(nn.LayerNorm(LANGUAGE, eps=1e-12))


def make_pair() -> tuple[SideAdapter, SideAdapter]:
    vision, text = SideAdapter.iea_pair(make_norm(), VISION, H)
    return randomise(vision), randomise(text)


def hidden(adapter: SideAdapter, x: Tensor) -> Tensor:
    return F.relu(F.linear(x, adapter.down_proj.weight, adapter.down_proj.bias))


def expert(adapter: SideAdapter, x: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], adapter.norm.weight, adapter.norm.bias, 1e-5)
    return 0.1 * adapter.up_proj(hidden(adapter, normed))


def output_norm(adapter: SideAdapter, y: Tensor) -> Tensor:
    norm = adapter.output_norm
    return F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, 1e-12)


def text_interaction(adapter: SideAdapter, x: Tensor) -> Tensor:
    r = hidden(adapter, x)
    return output_norm(adapter, torch.cat([adapter.up_proj(r), adapter.shared_up(r)], -1))


# form -> (makes the adapter, its equation)
FORMS: dict[str, tuple[Callable[[], SideAdapter], Callable[[SideAdapter, Tensor], Tensor]]] = {
    "vea": (lambda: randomise(SideAdapter.vea(VISION, H)), expert),
    "lea": (
        lambda: randomise(SideAdapter.lea(make_norm(), H)),
        lambda adapter, x: output_norm(adapter, expert(adapter, x)),
    ),
    "vision iea": (lambda: make_pair()[0], lambda adapter, x: adapter.shared_up(hidden(adapter, x))),
    "text iea": (lambda: make_pair()[1], text_interaction),
}
each_form = pytest.mark.parametrize("form", FORMS)


def make_tap(adapter: SideAdapter, *size: int, trained: bool = True) -> Tensor:
    return torch.randn(*size, adapter.down_proj.in_features, dtype=torch.float64, requires_grad=trained)


def run(adapter: SideAdapter, inputs: list[Tensor]) -> Tensor:
    return adapter(*inputs)


@each_form
@pytest.mark.parametrize("size", [(7,), (2, 5), (2, 1, 3)])
def test_values_and_all_gradients_are_the_equation(form, size):
    make, equation = FORMS[form]
    adapter = make()
    x = make_tap(adapter, *size)
    expected = with_gradients(equation(adapter, x), adapter, x=x)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    torch.testing.assert_close(with_gradients(adapter(x), adapter, x=x), expected, **EXACT)


@each_form
def test_a_frozen_tap_leaves_the_parameters_their_gradients(form):
    make, equation = FORMS[form]
    adapter = make()
    x = make_tap(adapter, 2, 5, trained=False)
    torch.testing.assert_close(
        with_gradients(adapter(x), adapter), with_gradients(equation(adapter, x), adapter), **EXACT
    )


@each_form
def test_a_residual_is_added_last_and_its_gradient_is_the_results(form):
    make, equation = FORMS[form]
    adapter = make()
    x = make_tap(adapter, 2, 5)
    y = equation(adapter, x)
    residual, grad = torch.randn_like(y, requires_grad=True), torch.randn_like(y)
    got = adapter(x, residual=residual)
    torch.testing.assert_close(got, y + residual, **EXACT)
    assert torch.equal(torch.autograd.grad(got, residual, grad)[0], grad)


def test_side_outputs_chained_by_residuals_are_their_sum():
    adapters = [make() for make, _ in (FORMS["vea"], FORMS["vision iea"]) for _ in range(3)]
    taps = [make_tap(adapter, 4) for adapter in adapters]
    total = first = torch.randn(4, VISION, dtype=torch.float64)
    for adapter, tap in zip(adapters, taps):
        total = adapter(tap, residual=total)
    expected = first + sum(adapter(tap) for adapter, tap in zip(adapters, taps))
    modules = nn.ModuleList(adapters)
    torch.testing.assert_close(with_gradients(total, modules), with_gradients(expected, modules), **EXACT)


def test_the_shared_projection_is_one_object_and_its_gradient_the_sum_of_both_sides():
    vision, text = pair = nn.ModuleList(make_pair())
    assert vision.shared_up is text.shared_up and vision.up_proj is None
    outputs = vision(make_tap(vision, 9, trained=False)), text(make_tap(text, 4, trained=False))
    shared = list(vision.shared_up.parameters())
    parts = [torch.autograd.grad(y.sin().sum(), shared, retain_graph=True) for y in outputs]
    assert all(grad.abs().max() > 0 for part in parts for grad in part)
    sum(y.sin().sum() for y in outputs).backward()
    torch.testing.assert_close([p.grad for p in shared], [sum(grads) for grads in zip(*parts)], **EXACT)
    assert sum(p.numel() for p in pair.parameters()) == sum(
        linear.weight.numel() + linear.bias.numel()
        for linear in (vision.down_proj, text.down_proj, text.up_proj, vision.shared_up)
    )


def test_a_copy_of_the_pair_shares_and_so_does_one_that_loads_its_state_dict():
    pair = nn.ModuleList(make_pair())
    for twin in (copy.deepcopy(pair), nn.ModuleList(make_pair())):
        twin.load_state_dict(pair.state_dict())
        assert twin[0].shared_up is twin[1].shared_up is not pair[0].shared_up
        assert torch.equal(twin[1].shared_up.weight, pair[0].shared_up.weight)
        twin.to(torch.float32)
        assert twin[0].shared_up.weight.dtype is torch.float32


def test_the_two_up_projections_are_one_operation_on_stacked_weights():
    _, text = make_pair()
    with mock.patch.object(side, "bottleneck_adapter", wraps=side.bottleneck_adapter) as operation:
        text(make_tap(text, 5))
    (call,) = operation.call_args_list
    assert torch.equal(call.args[3], torch.cat([text.up_proj.weight, text.shared_up.weight]))
    assert call.args[3].shape == (LANGUAGE, H) and call.args[4].shape == (LANGUAGE,)


def test_a_projection_by_itself_is_read_where_it_lies():
    vision, _ = make_pair()
    with mock.patch.object(side, "bottleneck_adapter", wraps=side.bottleneck_adapter) as operation:
        vision(make_tap(vision, 5))
    assert operation.call_args.args[3] is vision.shared_up.weight and operation.call_args.args[4] is vision.shared_up.bias


def test_the_language_scale_is_lost_in_the_norm():
    adapter = FORMS["lea"][0]()
    x = make_tap(adapter, 9)
    scaled, adapter.scale = adapter(x), 1.0
    torch.testing.assert_close(adapter(x), scaled, rtol=0, atol=1e-8)
    assert not torch.equal(adapter(x), scaled)


def test_the_output_norm_is_frozen_and_the_towers_alone():
    tower = nn.ModuleDict({"norm": make_norm()})
    assert all(p.requires_grad for p in tower.parameters())
    tower["adapter"] = SideAdapter.lea(tower["norm"], H, dtype=torch.float64)
    adapter = tower["adapter"]
    assert adapter.output_norm is tower["norm"] and not any(p.requires_grad for p in tower["norm"].parameters())
    assert set(adapter.state_dict()) == {
        f"{module}.{kind}" for module in ("norm", "down_proj", "up_proj") for kind in ("weight", "bias")
    }
    assert set(tower.state_dict()) == {"norm.weight", "norm.bias", *(f"adapter.{name}" for name in adapter.state_dict())}
    adapter(make_tap(adapter, 5)).sum().backward()
    assert all((p.grad is None) == (p in set(tower["norm"].parameters())) for p in tower.parameters())
    twin = copy.deepcopy(tower)
    assert twin["adapter"].output_norm is twin["norm"] is not tower["norm"]


def test_a_text_adapters_result_has_the_norms_dtype():
    norm = make_norm().float()
    adapter = SideAdapter.lea(norm, H)
    tap = torch.randn(5, LANGUAGE, dtype=torch.bfloat16)
    assert adapter(tap).dtype is torch.float32
    assert adapter(tap, residual=torch.randn(5, LANGUAGE)).dtype is torch.float32
    norm.bfloat16()
    assert adapter(tap).dtype is adapter.bfloat16()(tap).dtype is torch.bfloat16


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for p in nn.ModuleList(modules).parameters())


def test_parameters_are_the_released_ones_less_the_dead():
    norm = nn.LayerNorm(768, eps=1e-12)
    vea, lea, (vision, text) = SideAdapter.vea(), SideAdapter.lea(norm), SideAdapter.iea_pair(norm)
    assert (count(vea), count(vea) + count(nn.LayerNorm(256))) == (66_432, 66_944)
    assert (count(lea), count(lea) + count(nn.LayerNorm(768))) == (199_040, 200_576)
    assert count(vision.shared_up) == 33_024
    downs_and_private = (vision.down_proj, text.down_proj, text.up_proj)
    assert [6 * count(linear) for linear in downs_and_private] == [197_376, 590_592, 396_288]
    total = 6 * count(vea, lea, vision, text)
    dead = 6 * count(nn.LayerNorm(256), nn.LayerNorm(768)) + 198_274
    assert (total, dead, total + dead) == (2_975_232, 210_562, 3_185_794)


def test_weights_start_as_in_the_released_code_and_biases_at_zero():
    norm = nn.LayerNorm(768, eps=1e-12)
    vea, lea, (vision, text) = SideAdapter.vea(), SideAdapter.lea(norm), SideAdapter.iea_pair(norm)
    for linear in (vea.down_proj, vea.up_proj, vision.down_proj):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert 0.99 * bound < linear.weight.abs().max() <= bound
    for linear in (lea.down_proj, lea.up_proj, text.down_proj, text.up_proj, text.shared_up):
        assert 0.0195 < linear.weight.std() < 0.0205 and linear.weight.abs().max() > 0.06
    biases = {name: p for name, p in nn.ModuleList([vea, lea, vision, text]).named_parameters() if "proj.bias" in name}
    assert len(biases) == 7 and not any(bias.any() for bias in [*biases.values(), text.shared_up.bias])


@pytest.mark.parametrize("form", ["lea", "text iea"])
def test_the_first_gradients_before_an_output_norm_are_moderate(form):
    norm = nn.LayerNorm(768, eps=1e-12)
    adapter = SideAdapter.lea(norm) if form == "lea" else SideAdapter.iea_pair(norm)[1]
    x = torch.randn(64, 768)
    adapter(x).square().sin().mean().backward()
    assert all(0 < p.grad.abs().max() < 1 for p in adapter.parameters())


def test_adapters_made_on_meta_start_as_others_do_and_leave_what_is_shared():
    shared = nn.Linear(H, VISION)
    before = copy.deepcopy(shared.state_dict())
    adapter = SideAdapter(LANGUAGE, H, norm=True, shared_up=shared, output_norm=nn.LayerNorm(LANGUAGE), device="meta")
    own = [module for name, module in adapter.named_children() if name != "shared_up"]
    assert len(own) == 3 and all(p.is_meta for module in own for p in module.parameters())
    for module in own:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.constant_(parameter, float("nan"))
    adapter.reset_parameters()
    assert all(p.isfinite().all() for p in adapter.parameters())
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())


@each_form
def test_copies_and_state_dicts_keep_the_function(form):
    adapter = FORMS[form][0]()
    round_trips(adapter, [make_tap(adapter, 2, 5)], run)


@each_form
def test_compiled_without_a_graph_break_it_is_the_same(form):
    adapter = FORMS[form][0]()
    compiles(adapter, [make_tap(adapter, 2, 5)], run)


@each_form
def test_autocast_runs_and_is_near(form):
    adapter = FORMS[form][0]()
    runs_under_autocast(adapter, [make_tap(adapter, 2, 5)], run)


@each_form
def test_the_mode_of_training_does_not_matter(form):
    adapter = FORMS[form][0]()
    x = make_tap(adapter, 4)
    assert torch.equal(adapter.train()(x), adapter.eval()(x))


def test_the_representation_tells_the_scale_and_the_norm():
    assert "scale=0.1, output_norm=LayerNorm((20,), eps=1e-12" in repr(FORMS["lea"][0]())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bottleneck": 0}, "bottleneck: expected .* got 0"),
        ({"shared_up": nn.Linear(H + 1, VISION)}, "shared_up: expected .*Linear.6, at most 20. with a bias, got Linear"),
        ({"shared_up": nn.Linear(H, LANGUAGE + 1)}, "shared_up: expected"),
        ({"shared_up": nn.Linear(H, VISION, bias=False)}, "shared_up: expected"),
        ({"shared_up": nn.Identity()}, "shared_up: expected .* got Identity"),
        ({"output_norm": nn.LayerNorm(VISION)}, "output_norm: expected .*LayerNorm.20. with a weight, got LayerNorm"),
        ({"output_norm": nn.LayerNorm(LANGUAGE, elementwise_affine=False)}, "output_norm: expected"),
        ({"output_norm": nn.BatchNorm1d(LANGUAGE)}, "output_norm: expected .* got BatchNorm1d"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SideAdapter(LANGUAGE, **{"bottleneck": H, **options})
