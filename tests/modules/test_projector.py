"""Projector against its two last convolutions run one after the other; ConvNormReLU folded for inference."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.memory import saved_bytes
from fastadapt import HierarchicalAlignment, Projector
from fastadapt.modules.convolution import ConvNormReLU, fold_batch_norms
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast
from tests.tolerance import EXACT, SLACK, no_worse_than

B, DS, C, WIDTH, H, W = 3, 10, 6, 5, 3, 4
DOUBLE = torch.float64


def make(height: int = H, width: int = W) -> tuple[Projector, torch.Tensor, torch.Tensor]:
    """A projector, a map and a sentence."""
    shapes = (B, C, height, width), (B, DS)
    inputs = (torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in shapes)
    return randomise(Projector(DS, C, WIDTH)), *inputs


def composed(projector: Projector, vision: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
    """The equations, with a padded 1x1 output and a convolution with a group for every sample."""
    x = vision
    for convolution, norm, _ in (projector.conv1, projector.conv2):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.conv2d(x, convolution.weight, padding=1)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True).relu()
    x = F.conv2d(x, projector.pointwise.weight, projector.pointwise.bias)
    kernel = F.linear(sentence, projector.kernel.weight, projector.kernel.bias)
    weight, bias = kernel[:, :-1].reshape(B, -1, 3, 3), kernel[:, -1]
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, bias, padding=1, groups=B)
    return y.transpose(0, 1)


@pytest.mark.parametrize("size", [(H, W), (1, 1), (1, 3), (5, 2)], ids=str)
def test_output_and_gradients_are_the_composition(size):
    projector, vision, sentence = make(height=size[0], width=size[1])
    got, expected = projector(vision, sentence), composed(projector, vision, sentence)
    assert got.shape == (B, 1, 4 * size[0], 4 * size[1])
    torch.testing.assert_close(got, expected, **EXACT)
    wanted, grad = [vision, sentence, *projector.parameters()], torch.randn_like(expected)
    got, expected = (torch.autograd.grad(y, wanted, grad) for y in (got, expected))
    torch.testing.assert_close(got, expected, **EXACT)


def test_border_sees_no_bias_outside_the_map():
    projector, vision, sentence = make()
    nn.init.zeros_(projector.pointwise.weight)
    y = projector(vision, sentence)[:, 0]
    # with W = 0 the 1x1 output is its bias inside and 0 outside: what is left is a sum over the taps inside
    weight = projector.kernel(sentence)[:, :-1].reshape(B, WIDTH, 3, 3)
    tap = torch.einsum("bcij,c->bij", weight, projector.pointwise.bias)
    shift = projector.kernel(sentence)[:, -1]
    inside = {0: slice(1, 3), 5: slice(0, 3), -1: slice(0, 2)}
    for (i, rows), (j, columns) in itertools.product(inside.items(), repeat=2):
        torch.testing.assert_close(y[:, i, j], tap[:, rows, columns].sum((1, 2)) + shift, **EXACT)


def test_a_channels_last_map_gives_the_same():
    projector, vision, sentence = make()
    turned = vision.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(projector(turned, sentence), projector(vision, sentence), **EXACT)


def test_samples_do_not_see_one_another_in_eval():
    projector, vision, sentence = make()
    projector.eval()
    whole = projector(vision, sentence)
    torch.testing.assert_close(projector(vision[1:2], sentence[1:2]), whole[1:2], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_composition(dtype):
    # larger than elsewhere: the error of a few numbers is chance
    projector, vision, sentence = Projector(64, 32, 64, dtype=DOUBLE), torch.randn(B, 32, 6, 6), torch.randn(B, 64)
    exact = copy.deepcopy(projector)
    projector, inputs = projector.to(dtype), [x.detach().to(dtype).requires_grad_() for x in (vision, sentence)]
    exact.load_state_dict(projector.state_dict())
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for run, module, given in ((Projector.__call__, projector, inputs), (composed, projector, inputs), (composed, exact, wide)):
        y = run(module, *given)
        named = dict(zip(("vision", "sentence"), given)) | dict(module.named_parameters())
        grads = torch.autograd.grad(y.square().sum(), list(named.values()))
        results.append({"y": y.detach()} | dict(zip(named, grads)))
    # the folded kernel and z are rounded where the composition rounds one map: an error sqrt(2) times as large
    no_worse_than(*results, {order: math.sqrt(2) * factor for order, factor in SLACK.items()})


def test_it_has_the_parameters_of_the_methods_table():
    for config, count in (({}, 4_788_737), ({"sentence_dim": 1024}, 5_968_897)):
        assert sum(parameter.numel() for parameter in Projector(**config, device="meta").parameters()) == count


def test_the_last_two_convolutions_and_the_enlargements_keep_nothing_but_their_input():
    projector = Projector(device="meta")
    vision, sentence = torch.empty(1, 512, 26, 26, device="meta"), torch.empty(1, 512, device="meta")
    result = []
    kept = saved_bytes(
        lambda: result.append(projector(vision, sentence)), [*projector.parameters(), *projector.buffers(), vision, sentence]
    )
    assert result[0].shape == (1, 1, 104, 104)
    # conv1 and conv2: an output in front of its norm and a rectified one
    maps = 52 * 52 * (512 + 512) + 104 * 104 * (256 + 256)
    assert maps * 4 <= kept < 1.01 * maps * 4


def test_running_statistics_are_torchs():
    projector, vision, sentence = make()
    norm = nn.BatchNorm2d(C, dtype=DOUBLE)
    for _ in range(3):
        projector(vision, sentence)
        norm(projector.conv1[0](F.interpolate(vision, scale_factor=2, mode="bilinear")))
    torch.testing.assert_close(dict(projector.conv1[1].named_buffers()), dict(norm.named_buffers()), **EXACT)
    assert projector.conv2[1].num_batches_tracked == 3 and (projector.conv2[1].running_var != 1).all()


@pytest.mark.parametrize("check", [round_trips, compiles, runs_under_autocast])
def test_it_stands_what_every_module_does(check):
    projector, *inputs = make()
    check(projector, inputs, lambda module, inputs: module(*inputs))


@pytest.mark.parametrize("head", [True, False], ids=["projector", "neck"])
def test_folded_batch_norms_change_no_output(head):
    projector, vision, sentence = make()
    neck = HierarchicalAlignment((C, C, C), (1, 1, 1), DS, 8, dtype=DOUBLE)
    module, inputs = (projector, (vision, sentence)) if head else (neck, ([vision] * 3, sentence))
    for block in module.modules():
        if isinstance(block, nn.BatchNorm2d):
            nn.init.uniform_(block.weight, 0.5, 2), nn.init.normal_(block.bias)
    module(*inputs)
    expected = module.eval()(*inputs)
    folded = fold_batch_norms(copy.deepcopy(module))
    assert not any(isinstance(block, nn.BatchNorm2d) for block in folded.modules())
    torch.testing.assert_close(folded(*inputs), expected, **EXACT)
    torch.testing.assert_close(fold_batch_norms(folded)(*inputs), expected, **EXACT)


def test_only_a_module_in_eval_mode_folds():
    with pytest.raises(ValueError, match="module: expected a module in eval mode"):
        fold_batch_norms(nn.Sequential(ConvNormReLU(nn.Conv2d(1, 1, 1))))


@pytest.mark.parametrize(
    "vision, sentence, message",
    [
        ((B, C + 1, H, W), (B, DS), r"vision: expected shape \(any, 6, any, any\), got shape \(3, 7, 3, 4\)"),
        ((C, H, W), (B, DS), "vision: expected shape"),
        ((B, C, H, W), (B + 1, DS), r"sentence: expected shape \(3, 10\), got shape \(4, 10\)"),
    ],
)
def test_bad_arguments_are_named(vision, sentence, message):
    with pytest.raises(ValueError, match=message):
        Projector(DS, C, WIDTH)(torch.zeros(vision), torch.zeros(sentence))
