"""LocalConvAdapter: values, gradients, one convolution for several kernels, grids, starts, checkpoints and errors."""

from __future__ import annotations

import copy
import math
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.memory import saved_bytes
from fastadapt import LocalConvAdapter, local_conv_adapter
from fastadapt.core.launch import recording
from fastadapt.modules import local_conv
from fastadapt.prove.meta import as_on_cuda
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT, no_worse_than

K, H = 12, 5

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "identity": lambda z: z,
}


def leaf(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=dtype, requires_grad=True)


def plain(
    module: LocalConvAdapter,
    x: Tensor,
    grid: tuple[int, int],
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Every kernel convolves by itself, over an image."""
    hidden = F.linear(x, module.down_proj.weight, module.down_proj.bias)
    prefix, patches = hidden[:, : module.prefix_tokens], hidden[:, module.prefix_tokens :]
    image = patches.transpose(1, 2).unflatten(2, grid).contiguous()
    convolved = module.conv_bias[:, None, None].expand_as(image)
    for taps in module.taps.values():
        own = {"padding": len(taps) // 2 * module.dilation, "dilation": module.dilation, "groups": image.shape[1]}
        convolved = convolved + F.conv2d(image, taps.permute(2, 0, 1)[:, None], **own)
    hidden = torch.cat([prefix, convolved.flatten(2).transpose(1, 2)], 1)
    y = F.linear(ACTIVATIONS[module.activation](hidden), module.up_proj.weight, module.up_proj.bias)
    y = y * (scale[..., None] if isinstance(scale, Tensor) and scale.ndim else scale)
    return y if residual is None else y + residual


def run(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    return module(*inputs)


@pytest.mark.parametrize("scale", ["the module's", "a number", "one tensor", "one a token"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_all_gradients_are_the_equation(activation, scale):
    module = randomise(LocalConvAdapter(K, H, grid=(2, 4), activation=activation, scale=0.3))
    x, residual = leaf(2, 9, K), leaf(2, 9, K)
    given = {"the module's": None, "a number": -1.5, "one tensor": leaf(), "one a token": leaf(2, 9)}[scale]
    inputs = {"x": x, "residual": residual} | ({"scale": given} if isinstance(given, Tensor) else {})
    got = with_gradients(module(x, scale=given, residual=residual), module, **inputs)
    expected = with_gradients(plain(module, x, (2, 4), 0.3 if given is None else given, residual), module, **inputs)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("kernel_sizes", [(3,), (5,), (7,), (3, 5), (7, 3), (3, 5, 7)], ids=str)
@pytest.mark.parametrize(("dilation", "prefix_tokens"), [(1, 1), (2, 0), (3, 5)])
def test_the_sum_of_several_kernels_is_one_convolution(kernel_sizes, dilation, prefix_tokens):
    own = {"kernel_sizes": kernel_sizes, "dilation": dilation, "prefix_tokens": prefix_tokens}
    module, x = randomise(LocalConvAdapter(K, H, **own)), leaf(2, prefix_tokens + 35, K)
    largest = max(kernel_sizes)
    assert module.kernel().shape == (largest, largest, H)
    got = with_gradients(module(x, grid=(7, 5)), module, x=x)
    torch.testing.assert_close(got, with_gradients(plain(module, x, (7, 5)), module, x=x), **EXACT)


def test_one_kernel_is_read_as_it_lies():
    module = LocalConvAdapter(K, H)
    assert module.kernel().data_ptr() == module.taps["3"].data_ptr()


def test_a_depthwise_convolutions_weight_is_that_of_taps():
    module, conv = randomise(LocalConvAdapter(K, H, kernel_sizes=(5,), activation="identity")), nn.Conv2d(H, H, 5, groups=H)
    state = {"taps.5": conv.weight[:, 0].permute(1, 2, 0), "conv_bias": conv.bias}
    module.load_state_dict(module.state_dict() | state)
    assert torch.equal(module.taps["5"].permute(2, 0, 1)[:, None], conv.weight.double())
    assert torch.equal(module.conv_bias, conv.bias.double())


def test_a_square_is_found_and_other_grids_have_to_be_told():
    module, square = randomise(LocalConvAdapter(K, H)), leaf(2, 10, K)
    torch.testing.assert_close(module(square), plain(module, square, (3, 3)), **EXACT)
    for patches in (6, 0):
        message = f"grid: expected a height and a width, as the {patches} tokens behind the prefix make no square, got None"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            module(leaf(2, 1 + patches, K))
    other = leaf(2, 7, K)
    torch.testing.assert_close(module(other, grid=(3, 2)), plain(module, other, (3, 2)), **EXACT)
    module.grid = (2, 3)
    torch.testing.assert_close(module(other), plain(module, other, (2, 3)), **EXACT)


def test_a_new_adapter_changes_nothing_and_trains():
    module, x = LocalConvAdapter(K, H, kernel_sizes=(3, 5)), torch.randn(2, 10, K)
    y = module(x, residual=x)
    assert torch.equal(y, x)
    assert 0 < module.down_proj.weight.abs().max() <= 1 / math.sqrt(K)
    assert all(1 / (2 * size) < module.taps[str(size)].abs().max() <= 1 / size for size in (3, 5))
    y.square().sum().backward()
    assert module.up_proj.weight.grad.abs().max() > 0


def test_a_module_made_on_meta_starts_as_others_do():
    module = LocalConvAdapter(K, H, kernel_sizes=(3, 7), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    zero = {"conv_bias", "up_proj.weight", "up_proj.bias"}
    assert all(parameter.any() == (name not in zero) for name, parameter in module.named_parameters())


def test_the_names_and_the_count_of_parameters():
    module = LocalConvAdapter(768, 64, kernel_sizes=(3, 5))
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    assert shapes == {
        "conv_bias": (64,),
        "down_proj.weight": (64, 768),
        "down_proj.bias": (64,),
        "taps.3": (3, 3, 64),
        "taps.5": (5, 5, 64),
        "up_proj.weight": (768, 64),
        "up_proj.bias": (768,),
    }
    assert sum(parameter.numel() for parameter in module.parameters()) == 2 * 64 * 768 + 64 * (1 + 9 + 25 + 1) + 768


def test_the_mode_of_training_does_not_matter():
    module, x = randomise(LocalConvAdapter(K, H)), leaf(2, 5, K)
    assert torch.equal(module.train()(x), module.eval()(x))


def test_a_frozen_input_leaves_the_parameters_their_gradients():
    module, x = randomise(LocalConvAdapter(K, H)), torch.randn(2, 5, K, dtype=torch.float64)
    torch.testing.assert_close(
        with_gradients(module(x), module), with_gradients(plain(module, x, (2, 2)), module), **EXACT
    )


def test_what_is_kept_for_the_backward():
    """x, and the hidden before and behind the convolution and the activation."""
    tokens, width, hidden = 2 * 17, 32, 8
    module, x = LocalConvAdapter(width, hidden, dtype=torch.bfloat16), leaf(2, 17, width, dtype=torch.bfloat16)
    kept = saved_bytes(lambda: module(x, residual=x, scale=0.1), exclude=[*module.parameters()])
    assert kept == 2 * tokens * (width + 3 * hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_as_near_as_eager(dtype):
    module, exact = (randomise(LocalConvAdapter(48, 16, kernel_sizes=(3, 5), scale=0.5)) for _ in range(2))
    exact.load_state_dict(module.to(dtype).state_dict())
    x = leaf(4, 26, 48, dtype=dtype)
    ours, eager = (with_gradients(y, module, x=x) for y in (module(x), plain(module, x, (5, 5), 0.5)))
    x = x.detach().double().requires_grad_()
    no_worse_than(ours, eager, with_gradients(plain(exact, x, (5, 5), 0.5), exact, x=x))


def test_float32_parameters_serve_an_input_in_16_bits():
    module, x = randomise(LocalConvAdapter(K, H)).float(), leaf(2, 10, K, dtype=torch.bfloat16)
    exact = plain(copy.deepcopy(module).double(), x.double(), (3, 3))
    y = module(x)
    assert y.dtype is torch.bfloat16
    assert torch.linalg.vector_norm(y.double() - exact) < 0.02 * torch.linalg.vector_norm(exact)
    y.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in module.parameters())
    scaled = module(x, scale=torch.full((2, 10), 0.5))
    assert scaled.dtype is torch.bfloat16 and torch.equal(scaled, y * 0.5)
    residual = torch.randn(2, 10, K)
    assert torch.equal(module(x, residual=residual), residual + y)


def kernels(module: LocalConvAdapter, x: Tensor, **options: object) -> list[str]:
    with as_on_cuda(), recording(arguments=False) as launches:
        module(x, **options)
    return [launch.name for launch in launches]


def test_the_one_operation_serves_where_no_gradient_is_wanted():
    module = LocalConvAdapter(768, 64, device="meta", dtype=torch.bfloat16)
    x = torch.empty(32, 1370, 768, device="meta", dtype=torch.bfloat16)
    residual, scale = torch.empty_like(x, requires_grad=True), torch.empty((), device="meta", requires_grad=True)
    assert kernels(module, x) == ["conv_kernel"]
    with torch.no_grad():
        assert kernels(module, x, residual=residual, scale=scale) == ["prepare_kernel", "adapter_kernel"]
        assert kernels(LocalConvAdapter(768, 384, device="meta", dtype=torch.bfloat16), x) == ["conv_kernel"]
    module.requires_grad_(False)
    assert kernels(module, x, residual=residual) == ["prepare_kernel", "adapter_kernel"]  # whose gradient is the result's
    assert kernels(module, x, scale=scale) == kernels(module, x.requires_grad_()) == ["conv_kernel"]


@pytest.mark.parametrize("scale", [0.3, "one tensor", "one a token"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_one_operation_is_the_equation(activation, scale, monkeypatch):
    monkeypatch.setattr(local_conv, "local_conv_adapter_path", lambda *sizes, **options: "fused")
    own = {"kernel_sizes": (5, 3), "dilation": 2, "prefix_tokens": 2, "grid": (3, 4), "activation": activation}
    module, x, residual = randomise(LocalConvAdapter(K, H, **own)), leaf(2, 14, K), leaf(2, 14, K)
    scale = {"one tensor": leaf(), "one a token": leaf(2, 14)}.get(scale, scale)
    got = with_gradients(module(x, scale=scale, residual=residual), module, x=x, residual=residual)
    expected = with_gradients(plain(module, x, (3, 4), scale, residual), module, x=x, residual=residual)
    torch.testing.assert_close(got, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
def test_the_one_operation_is_as_near_as_its_parts(parameters, monkeypatch):
    exact = randomise(LocalConvAdapter(48, 16, kernel_sizes=(3, 5), scale=0.5))
    module, x = copy.deepcopy(exact).to(parameters), leaf(1, 26, 48, dtype=torch.bfloat16)
    exact.load_state_dict(module.state_dict())
    parts = module(x, residual=x)
    monkeypatch.setattr(local_conv, "local_conv_adapter_path", lambda *sizes, **options: "fused")
    monkeypatch.setattr(local_conv, "local_conv_adapter", partial(local_conv_adapter, backend="triton"))
    with recording() as launches:
        found = module(x, residual=x)
    assert len(launches) == 2
    no_worse_than({"y": found}, {"y": parts}, {"y": plain(exact, x.double(), (5, 5), 0.5, x.double())})


def adapter_and_inputs() -> tuple[nn.Module, list[Tensor]]:
    return randomise(LocalConvAdapter(K, H, kernel_sizes=(3, 5))), [leaf(2, 10, K)]


def test_copies_and_state_dicts_keep_the_function():
    round_trips(*adapter_and_inputs(), run)


def test_compiled_without_a_graph_break_it_is_the_same():
    compiles(*adapter_and_inputs(), run)


def test_autocast_runs_and_is_near():
    runs_under_autocast(*adapter_and_inputs(), run)


def test_representations_tell_the_options():
    module = LocalConvAdapter(K, H, kernel_sizes=(3, 5), grid=(2, 3), scale=0.1)
    own = "kernel_sizes=[3, 5], grid=(2, 3), dilation=1, prefix_tokens=1, activation='gelu', scale=0.1"
    assert own in repr(module)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LocalConvAdapter(K, 0), "bottleneck: expected .* got 0"),
        (lambda: LocalConvAdapter(K, H, kernel_sizes=()), r"kernel_sizes: expected .* got \(\)"),
        (lambda: LocalConvAdapter(K, H, kernel_sizes=(3, 4)), r"kernel_sizes: expected .* got \(3, 4\)"),
        (lambda: LocalConvAdapter(K, H, kernel_sizes=(3, 3)), r"kernel_sizes: expected .* got \(3, 3\)"),
        (lambda: LocalConvAdapter(K, H, activation="tanh"), "activation: expected .* got 'tanh'"),
        (lambda: LocalConvAdapter(K, H, scale=math.inf), "scale: expected .* got inf"),
        (lambda: LocalConvAdapter(K, H, dilation=0)(torch.ones(2, 5, K)), "dilation: expected .* got 0"),
        (lambda: LocalConvAdapter(K, H)(None), "x: expected .* got NoneType"),
        (lambda: LocalConvAdapter(K, H)(torch.ones(2, 5, K + 1)), r"x: expected shape \(any, any, 12\)"),
        (lambda: LocalConvAdapter(K, H)(torch.ones(5, K)), r"x: expected shape \(any, any, 12\)"),
        (lambda: LocalConvAdapter(K, H)(torch.ones(2, 5, K), grid=(2, 3)), r"x: expected shape \(any, 7, any\)"),
        (lambda: LocalConvAdapter(K, H)(torch.ones(2, 5, K), scale=torch.ones(5)), r"scale: expected shape \(2, 5\)"),
        (
            lambda: LocalConvAdapter(K, H)(torch.ones(2, 5, K), residual=torch.ones(5, K)),
            r"residual: expected shape \(2, 5, 12\)",
        ),
        (
            lambda: LocalConvAdapter(K, H)(torch.ones(2, 5, K), residual=torch.ones(2, 5, K).half()),
            "residual: expected torch.float32, got torch.float16",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
