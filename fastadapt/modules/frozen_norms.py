"""Frozen batch norms folded into the convolutions before them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastadapt.core.checks import fail

# By name, for every detector has its own class.  A name that goes on, as in timm's BatchNormAct2d, does something more.
_BATCH_NORM = re.compile(r"BatchNorm2d|SyncBatchNorm|\w*FrozenBatchNorm2d")
_FROZEN_EPS = 1e-5  # of the classes that have no attribute for it
# What a convolution and the batch norm that reads it are called: conv1 and bn1, convolution and normalization.
_PAIR = re.compile(r"conv(?:olution)?(\d*) (?:bn|norm|normalization)\1")


def fold_frozen_batch_norms(model: nn.Module) -> list[str]:
    """Fold every frozen batch norm of a frozen Conv2d into that convolution, in place: for training and inference.

        W' = W gamma / sqrt(var + eps),      b' = beta + (b - mean) gamma / sqrt(var + eps)

    (Ioffe and Szegedy, "Batch Normalization", 2015, with constant statistics.)  A batch norm is frozen if its class is a
    FrozenBatchNorm2d (transformers', torchvision's) or it is an nn.BatchNorm2d or nn.SyncBatchNorm in eval mode, and nothing in
    it or its convolution requires grad.  The two belong together if one directly follows the other in an nn.Sequential, or in
    the order of a module's children with names that pair them: conv1 and bn1, convolution and normalization.  This covers
    the ResNets of transformers, DETR, torchvision and CLIP.  A convolution or batch norm with hooks, or that occurs more than
    once, stays.  The batch norm becomes nn.Identity, whatever train() says later, and the state dict has a bias for each
    convolution in its place: load checkpoints first.

    A frozen batch norm is a multiplication and an addition of the whole map, four passes over it.  At the 53 of DETR's
    ResNet-50 and images of 640 pixels these are 92.9 GB a step of 64 images in float32.  The bias costs two passes instead
    where adding it is an operation of its own, as cuDNN's convolution does in eager mode, and none in a compiled kernel's
    epilogue (`compile_frozen`).  Memory formats stay: `model.to(memory_format=torch.channels_last)` may come before or after.

    Args:
        model: any module.

    Returns:
        The names of the batch norms folded, in the model's order.

    Raises:
        ValueError: there is none to fold.

    The weights are computed in float32 (float64 for float64) and rounded once.
    """
    folded = []
    for prefix, parent, (_, conv), (norm_name, norm) in list(_pairs(model)):
        _fold(conv, norm)
        setattr(parent, norm_name, nn.Identity())
        folded.append(f"{prefix}.{norm_name}".removeprefix("."))
    if not folded:
        fail("model", "a model with frozen batch norms that directly follow frozen convolutions", "one without any")
    return folded


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, nn.Conv2d], tuple[str, nn.Module]]]:
    """(name of the parent, parent, (name, convolution), (name, batch norm)) of everything to fold."""
    places = Counter(child for module in model.modules() for child in module._modules.values())
    for prefix, parent in model.named_modules():
        children = list(parent.named_children())
        for conv, norm in zip(children, children[1:]):
            named = isinstance(parent, nn.Sequential) or _PAIR.fullmatch(f"{conv[0]} {norm[0]}")
            if named and _belong(conv[1], norm[1]) and places[conv[1]] == places[norm[1]] == 1:
                yield prefix, parent, conv, norm


def _belong(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm` is a frozen batch norm that can be folded into `conv`."""
    name = type(norm).__name__
    if type(conv) is not nn.Conv2d or not _BATCH_NORM.fullmatch(name) or norm.running_mean is None:
        return False
    frozen = "Frozen" in name or not norm.training
    trained = any(parameter.requires_grad for module in (conv, norm) for parameter in module.parameters())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (conv, norm))
    return frozen and not trained and not hooked and norm.running_mean.shape == (conv.out_channels,)


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    mean, var, gamma, beta = (
        None if tensor is None else tensor.to(wide)
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    eps = getattr(norm, "eps", _FROZEN_EPS)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, eps, gamma, beta)
    conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
