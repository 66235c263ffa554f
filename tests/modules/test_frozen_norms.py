"""Folding frozen batch norms: the same maps, which pairs are found, and the traffic that goes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ResNetBackbone, ResNetConfig
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d, replace_batch_norm

from fastadapt import fold_frozen_batch_norms
from tests.tolerance import EXACT


def randomise(model: nn.Module) -> nn.Module:
    """Frozen, with statistics, scales and biases that change something."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor) * 0.2)
    return model.requires_grad_(False)


def resnet(frozen_class: bool = True, **config: Any) -> ResNetBackbone:
    model = ResNetBackbone(ResNetConfig(**config))
    if frozen_class:
        replace_batch_norm(model)
    return model.requires_grad_(False)


TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "out_features": ["stage1", "stage2"]}


class Clips(nn.Module):
    """A bottleneck as in CLIP's ResNets: conv1, bn1, conv2, bn2 and a Sequential with pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.downsample = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + self.downsample(x)).relu()


@pytest.mark.parametrize("frozen_class", [True, False])
def test_a_resnets_maps_are_the_same_in_either_mode(frozen_class):
    model = randomise(resnet(frozen_class, **TINY).double()).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x).feature_maps
    assert len(fold_frozen_batch_norms(model)) == 1 + 3 + 7
    torch.testing.assert_close(model(x).feature_maps, expected, **EXACT)
    torch.testing.assert_close(model.train()(x).feature_maps, expected, **EXACT)
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())


def test_clips_names_and_the_gradient_of_the_image_are_found():
    model = randomise(Clips().double()).eval()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    y = model(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    assert fold_frozen_batch_norms(model) == ["bn1", "bn2", "downsample.2"]
    torch.testing.assert_close(model(x), y, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], expected, **EXACT)


def test_a_weight_of_16_bits_is_rounded_once():
    model = randomise(Clips()).eval()
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).double()
    fold_frozen_batch_norms(half), fold_frozen_batch_norms(exact)
    torch.testing.assert_close(half.conv1.weight, exact.conv1.weight.bfloat16(), rtol=0, atol=0)
    assert half.conv1.bias.dtype is torch.bfloat16


def test_the_memory_format_stays():
    model = randomise(Clips()).eval().to(memory_format=torch.channels_last)
    fold_frozen_batch_norms(model)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert model(torch.randn(2, 3, 4, 6)).is_contiguous(memory_format=torch.channels_last)


def hooked(model: Clips) -> None:
    model.conv1.register_forward_hook(lambda module, inputs, output: None)


def renamed(model: Clips) -> None:
    """Children in this order, whose names say nothing about it."""
    model.first, model.second = model.conv1, model.bn1
    del model.conv1, model.bn1


def preceding(model: Clips) -> None:
    """As in a ResNet with activation first: the batch norm reads what comes before the convolution."""
    conv = model.conv1
    del model.conv1
    model.conv1 = conv


class ActiveBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that does more."""


LEFT = {
    "trained statistics": lambda model: model.bn1.train(),
    "trained weight": lambda model: model.conv1.weight.requires_grad_(),
    "trained scale": lambda model: model.bn1.weight.requires_grad_(),
    "hooked": hooked,
    "names say nothing": renamed,
    "norm first": preceding,
    "other width": lambda model: setattr(model, "bn1", nn.BatchNorm2d(5).eval().requires_grad_(False)),
    "another class": lambda model: setattr(model, "bn1", ActiveBatchNorm2d(4).eval().requires_grad_(False)),
    "another convolution": lambda model: setattr(model, "conv1", nn.Conv1d(3, 4, 1).requires_grad_(False)),
    "no statistics": lambda model: setattr(model, "bn1", nn.BatchNorm2d(4, track_running_stats=False).requires_grad_(False)),
    "shared": lambda model: setattr(model, "again", model.conv1),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_no_frozen_pair_is_left(why: str):
    model = randomise(Clips()).eval()
    LEFT[why](model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fold_frozen_batch_norms(model) == ["bn2", "downsample.2"]
    after = model.state_dict()
    kept = [name for name in before if not name.startswith(("conv2", "bn2", "downsample"))]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_a_model_with_nothing_to_fold_raises():
    with pytest.raises(ValueError, match="model: expected a model with frozen batch norms .*, got one without any"):
        fold_frozen_batch_norms(Clips())


class _Traffic(TorchDispatchMode):
    """Bytes that elementwise operations read and write, but for those of single channels."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mul", "add"):
            maps = [t for t in (*args, result) if isinstance(t, Tensor) and math.prod(t.shape[2:]) > 1]
            self.bytes += sum(t.nbytes for t in maps)
        return result


def traffic(run: Callable[[], Any]) -> int:
    with _Traffic() as found:
        run()
    return found.bytes


def test_93_gigabytes_a_step_go_from_m2ists_resnet_50():
    with torch.device("meta"):
        model, image = resnet(), torch.empty(1, 3, 640, 640)
    assert sum(type(module) is DetrFrozenBatchNorm2d for module in model.modules()) == 53
    before = traffic(lambda: model(image))
    assert len(fold_frozen_batch_norms(model)) == 53
    after = traffic(lambda: model(image))
    print(f"elementwise traffic of 64 images: {before * 64 / 1e9:.1f} GB -> {after * 64 / 1e9:.1f} GB")
    assert round((before - after) * 64 / 1e9, 1) == 92.9
