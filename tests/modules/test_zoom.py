"""The zooms of a Bridger: linear, batch norm and ReLU in one, and the class token that has no part in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bench.memory import saved_bytes
from fastadapt.modules.zoom import ConvZoom, LinearNormReLU, TokenZoom
from tests.tolerance import EXACT, no_worse_than

B, N = 3, 10

# narrow to wide, where the backward computes again, and wide to narrow, where the norm runs as a module
WIDTHS = [(5, 9), (9, 5)]


class OtherNorm(nn.BatchNorm1d):
    """A norm that must run as a module, as nn.SyncBatchNorm must."""


def make(widths: tuple[int, int], dtype: torch.dtype = torch.float64) -> LinearNormReLU:
    """A layer with nothing at its start."""
    layer = LinearNormReLU(*widths, dtype=dtype)
    for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return layer


def twin(layer: LinearNormReLU) -> nn.BatchNorm2d:
    """A BatchNorm2d of its own with the norm's state."""
    norm = nn.BatchNorm2d(layer.norm.num_features, dtype=layer.norm.weight.dtype)
    norm.load_state_dict(layer.norm.state_dict())
    return norm.train(layer.training)


def plain(layer: LinearNormReLU, norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """The 1x1 convolution, norm and ReLU on maps, with the layer's parameters and the statistics of `norm`."""
    z = F.conv2d(x.transpose(1, 2).unsqueeze(3), layer.weight[:, :, None, None])
    return functional_call(norm, dict(layer.norm.named_parameters()), z).relu().squeeze(3).transpose(1, 2)


def values_and_gradients(
    y: torch.Tensor, x: torch.Tensor, layer: nn.Module, where: torch.Tensor | float = 1.0
) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    wanted = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, wanted.values(), (torch.randn(y.shape, dtype=torch.float64) * where).to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads))}


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_output_and_gradients_are_those_of_the_convolution_the_norm_and_relu(widths, training, skip):
    layer = make(widths).train(training)
    x = torch.randn(B, N, widths[0], dtype=torch.float64, requires_grad=True)
    expected = values_and_gradients(plain(layer, twin(layer), x[:, skip:]), x, layer)
    got = values_and_gradients(layer(x, skip=skip), x, layer)
    assert 0.1 < (got["y"] == 0).double().mean() < 0.9
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("widths", WIDTHS)
def test_running_statistics_are_batch_norms(widths):
    layer = make(widths)
    norm = twin(layer)
    for step in range(3):
        x = torch.randn(B, N, widths[0], dtype=torch.float64) * (step + 1) + step
        layer(x)
        plain(layer, norm, x)
    assert norm.num_batches_tracked == 3
    torch.testing.assert_close(layer.norm.state_dict(), norm.state_dict(), **EXACT)
    x = torch.randn(B, N, widths[0], dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), plain(layer, norm.eval(), x), **EXACT)
    assert layer.norm.num_batches_tracked == 3


def test_a_norm_of_another_class_runs_as_a_module_and_gives_the_same():
    layer, x = make((5, 9)), torch.randn(B, N, 5, dtype=torch.float64, requires_grad=True)
    other = OtherNorm(9, dtype=torch.float64)
    other.load_state_dict(layer.norm.state_dict())
    expected = values_and_gradients(layer(x), x, layer)
    statistics, layer.norm = layer.norm.state_dict(), other
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(values_and_gradients(layer(x), x, layer), expected, **EXACT)
    torch.testing.assert_close(other.state_dict(), statistics, **EXACT)
    assert calls == [1]


def test_a_converted_norm_is_synchronised_and_evaluates_as_before():
    layer, x = make((5, 9)).eval(), torch.randn(B, N, 5, dtype=torch.float64)
    expected = layer(x)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(layer.norm) is nn.SyncBatchNorm and torch.equal(layer(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_second_derivatives(widths, training):
    layer = make(widths).train(training)
    names, parameters = zip(*layer.named_parameters())

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, parameters)), x)

    inputs = torch.randn(2, 4, widths[0], dtype=torch.float64, requires_grad=True), *parameters
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_folding_is_exact_and_final():
    layer, x = make((5, 9)), torch.randn(B, N, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="call eval"):
        layer.fold()
    expected = layer.eval()(x)
    for _ in range(2):
        layer.fold()
        torch.testing.assert_close(layer(x), expected, **EXACT)
    with pytest.raises(RuntimeError, match="for inference only"):
        layer.train()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_low_precision_is_no_worse_than_the_modules(widths, dtype, autocast, training):
    widths = [16 * width for width in widths]
    exact = make(widths).train(training)
    inputs = torch.rand(B, 64, widths[0], dtype=torch.float64)
    low = LinearNormReLU(*widths, dtype=torch.float32 if autocast else dtype).train(training)
    low.load_state_dict(exact.state_dict())
    exact.load_state_dict(low.state_dict())
    x = inputs.to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = plain(exact, twin(exact), wide)
    # no gradient where a rounding would decide whether ReLU passes it
    where = expected.detach() > 0.05
    results = {}
    for name, run in {"ours": lambda: low(x), "eager": lambda: plain(low, twin(low), x)}.items():
        low.norm.load_state_dict(exact.norm.state_dict())
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = run()
        results[name] = values_and_gradients(y, x, low, where)
    no_worse_than(results["ours"], results["eager"], values_and_gradients(expected, wide, exact, where))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_a_narrow_x_is_kept(training):
    layer = LinearNormReLU(64, 768, device="meta", dtype=torch.bfloat16).train(training)
    x = torch.empty(32, 676, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    kept = saved_bytes(lambda: layer(x), (x, *layer.parameters(), *layer.buffers()))
    assert kept <= 2 * 768 * 4  # mean and inverse standard deviation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_class_token_is_neither_read_nor_changed(batch_first, training):
    zoom = TokenZoom(12, 4, dtype=torch.float64).train(training)
    visual = torch.randn((B, 1 + N, 12) if batch_first else (1 + N, B, 12), dtype=torch.float64)
    visual = (visual if batch_first else visual.transpose(0, 1)).requires_grad_()
    tokens = zoom.zoom_in(visual)
    updated = zoom.zoom_out(tokens, visual)
    assert torch.equal(updated[:, 0], visual[:, 0])
    assert (updated[:, 1:] >= visual[:, 1:]).all() and not torch.equal(updated[:, 1:], visual[:, 1:])
    grad = torch.randn_like(updated)
    (got,) = torch.autograd.grad(updated, visual, grad)
    assert torch.equal(got[:, 0], grad[:, 0])
    other = torch.cat([visual[:, :1] + 100, visual[:, 1:]], 1)
    assert torch.equal(zoom.zoom_in(other), tokens) and torch.equal(zoom.zoom_out(tokens, other)[:, 1:], updated[:, 1:])


def test_an_update_of_another_dtype_is_added_in_the_wider_one():
    zoom = TokenZoom(12, 4, dtype=torch.float32).eval()
    visual, tokens = torch.randn(B, 1 + N, 12, requires_grad=True), torch.randn(B, N, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        updated, update = zoom.zoom_out(tokens, visual), zoom.outward(tokens)
    assert updated.dtype == torch.float32 and update.dtype == torch.bfloat16
    assert torch.equal(updated[:, 1:], visual[:, 1:] + update)
    updated.sum().backward()
    assert visual.grad.dtype == tokens.grad.dtype == torch.float32 and tokens.grad.any()


@pytest.mark.parametrize(
    "stride, kinds, kernel",
    [
        (8, (nn.Conv2d, nn.ConvTranspose2d), 2),
        (16, (nn.Conv2d, nn.ConvTranspose2d), 1),
        (32, (nn.ConvTranspose2d, nn.Conv2d), 2),
    ],
)
def test_a_map_is_shrunk_or_enlarged_to_the_bridge_and_back(stride, kinds, kernel):
    zoom, side = ConvZoom(6, 4, stride, 16, dtype=torch.float64), 416 // stride
    for convolution, kind in zip((zoom.inward, zoom.outward), kinds):
        assert type(convolution) is kind and convolution.kernel_size == convolution.stride == (kernel, kernel)
    visual = torch.randn(1, 6, side, side, dtype=torch.float64)
    tokens = zoom.zoom_in(visual)
    assert tokens.shape == (1, 26 * 26, 4) and tokens.is_contiguous()
    expected = visual + zoom.outward(zoom.inward(visual))
    torch.testing.assert_close(zoom.zoom_out(tokens, visual), expected, **EXACT)


def test_bad_maps_and_strides_are_named():
    with pytest.raises(ValueError, match="strides: expected a divisor or a multiple of bridge_stride = 16, got 12"):
        ConvZoom(6, 4, 12, 16)
    with pytest.raises(ValueError, match=r"visual: .* width that are multiples of 2, got shape \(1, 6, 4, 5\)"):
        ConvZoom(6, 4, 8, 16).zoom_in(torch.randn(1, 6, 4, 5))
    with pytest.raises(ValueError, match=r"visual: expected shape \(any, any, 12\), got shape \(1, 3, 11\)"):
        TokenZoom(12, 4).zoom_in(torch.randn(1, 3, 11))
