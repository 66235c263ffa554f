"""fuse, unfuse and explain: the fused operation inside somebody else's model."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastadapt import lora_linear_path
from fastadapt.core.backend import BackendError, autocast_dtype, why_not_triton
from fastadapt.core.casts import forget
from fastadapt.modules.lora import LoraLinear

Model = TypeVar("Model", bound=nn.Module)

EXAMPLE_ROWS = 32 * 197  # 32 images of 224 pixels through a ViT-B/16


@dataclass(frozen=True)
class Row:
    """One LoRA layer: where it is, what it is, and what a call of it runs.

    shape is (out_features, in_features); rank and dropout are the active adapter's, None where there is none.  path is
    "PEFT", or "fastadapt" with the backend and, on a GPU, the algorithm; reason says why it is that one, and is empty
    for a fused layer on the best backend of its device.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    dropout: float | None
    path: str
    reason: str


@dataclass(frozen=True)
class BlockRow:
    """One transformer layer of a known family: where it is, its class, and what a call of it runs.

    path is "transformers", or "fastadapt" for a layer computed as a `FrozenBlock`, LoRA included; reason says why it is not.
    """

    name: str
    kind: str
    path: str
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found: one row for each LoRA layer and one for each transformer layer; as a string, two tables."""

    rows: tuple[Row, ...]
    blocks: tuple[BlockRow, ...] = ()

    def __str__(self) -> str:
        lines = _table(Row, self.rows, "LoRA layers run fused")
        return "\n".join(lines + (_table(BlockRow, self.blocks, "blocks run fused") if self.blocks else []))

    __repr__ = __str__


def _table(kind: type, rows: Sequence[object], what: str) -> list[str]:
    header = [field.name for field in fields(kind)]
    cells = [header, *([_cell(value) for value in astuple(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return [*lines, f"{sum(row.path.startswith('fastadapt') for row in rows)} of {len(rows)} {what}"]


def fuse(model: Model) -> Model:
    """Compute the model's PEFT LoRA linears and its frozen transformer layers with fastadapt's operations, in place.

        y = x W^T + b + scaling dropout(x) A^T B^T, one operation instead of PEFT's five

    Each `peft.tuners.lora.Linear` on a torch.nn.Linear changes its class and nothing else: parameters stay PEFT's
    objects, so state_dict, save_pretrained, merge_and_unload, set_adapter, disable_adapter and the rest are as before.
    Each call looks at PEFT's state again, and runs PEFT's own forward where the operation would not mean the same
    (several active adapters, adapters for parts of a batch, merged or disabled ones).  Layers that no call could fuse
    (DoRA and other variants, quantised bases, embeddings, convolutions) are left alone, with a warning; `explain` says
    why.

    The layers of transformers' CLIP, SigLIP, ViT, DINOv2, BERT and DETR encoders change their class likewise and run as a
    `FrozenBlock`, LoRA included: q, k and v read their input once, and neither a LayerNorm's output nor an activation nor
    a dropout mask is kept for the backward.  A call whose layer has more to it (hooks on its parts, weights that train,
    attention weights asked for, another attention than torch's) is transformers' own.

    Args:
        model: any module that contains PEFT LoRA layers or transformer layers of these families.  Fusing again is
            harmless, picks up layers added since, and casts frozen weights anew: under autocast a block casts them once,
            and sees every later change but one written through `.data`.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model has neither.

    Without dropout equal to PEFT up to rounding.  With it the masks have the same distribution but come from a seed
    (fastadapt.core.philox), not from nn.Dropout's random stream; `fastadapt.PhiloxDropout` gives an eager model them.
    """
    layers, blocks = _peft_layers(model), _blocks(model)
    if not layers and not blocks:
        raise ValueError(
            "model: expected a model with PEFT LoRA layers, as peft.get_peft_model makes, or with encoder layers of "
            f"transformers' CLIP, SigLIP, ViT, DINOv2, BERT or DETR, got a {type(model).__name__} with neither"
        )
    forget(model.parameters())
    for block in blocks.values():
        from fastadapt.integrations import transformers

        transformers.fuse_layer(block)
    reasons = []
    for layer in layers.values():
        from fastadapt.integrations import peft

        reasons.append(peft.fuse_layer(layer))
    left = Counter(reason for reason in reasons if reason is not None)
    if left:
        counts = "; ".join(f"{reason} ({count})" for reason, count in left.items())
        warnings.warn(f"fuse left {left.total()} of {len(layers)} LoRA layers to PEFT: {counts}", stacklevel=2)
    return model


def unfuse(model: Model) -> Model:
    """Give every layer that `fuse` changed its own class back, in place; returns the same model.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    for layer in _peft_layers(model).values():
        from fastadapt.integrations import peft

        peft.unfuse_layer(layer)
    for block in _blocks(model).values():
        from fastadapt.integrations import transformers

        transformers.unfuse_layer(block)
    return model


def explain(model: nn.Module) -> Explanation:
    """List the model's LoRA layers, PEFT's and `fastadapt.LoraLinear`, and its transformer layers of known families: the
    path that a call of each takes now, and why.

    The call is supposed to have x on the weight's device and in its dtype, the autocast that explain itself has, and
    32 * 197 rows: the algorithm may change with their number.  A layer that runs as a block computes its LoRA itself.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    layers = _peft_layers(model)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            rows.append(_own_row(name, module))
        elif name in layers:
            rows.append(_peft_row(name, module))
    return Explanation(tuple(rows), tuple(_block_row(name, block) for name, block in _blocks(model).items()))


def _peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if "peft" not in sys.modules:  # then nothing can have made such a layer, and importing peft would take seconds
        return {}
    from fastadapt.integrations import peft

    return dict(peft.lora_layers(model))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    if "transformers" not in sys.modules:
        return {}
    from fastadapt.integrations import transformers

    return {name: module for name, module in model.named_modules() if transformers.is_known(module)}


def _block_row(name: str, block: nn.Module) -> BlockRow:
    from fastadapt.integrations import transformers

    weight = transformers.at(block, transformers.family_of(block).norm1).weight
    found = transformers.call_of(block, weight.new_empty(1, 2, weight.shape[0]))
    reason = found if isinstance(found, str) else ""
    if not reason and not isinstance(block, transformers.FusedLayer):
        reason = "fastadapt.fuse(model) would fuse it"
    return BlockRow(name, type(block).__name__, "transformers" if reason else "fastadapt frozen block", reason)


def _own_row(name: str, layer: LoraLinear) -> Row:
    dropout = layer.lora_dropout
    if layer.merged:
        path, reason = "torch", "merged into the weight"
    else:
        path, reason = _path(layer.weight, layer.r, dropout, layer.training)
    shape = (layer.out_features, layer.in_features)
    return Row(name, type(layer).__name__, shape, layer.r, dropout, path, reason)


def _peft_row(name: str, layer: nn.Module) -> Row:
    from fastadapt.integrations import peft

    adapter = next((adapter for adapter in layer.active_adapters if adapter in layer.r), None)
    rank = layer.r.get(adapter)
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0) if adapter in layer.lora_dropout else None
    path, reason = "PEFT", peft.why_never(layer)
    if reason is None:
        weight = layer.base_layer.weight
        reason = peft.why_not(layer, _like(weight))
        if reason is None and not isinstance(layer, peft.FusedLinear):
            reason = "fastadapt.fuse(model) would fuse it"
        elif reason is None:
            path, reason = _path(weight, rank, dropout, layer.training)
    shape = (layer.out_features, layer.in_features)
    return Row(name, type(layer).__name__, shape, rank, dropout, path, reason)


def _like(weight: Tensor) -> Tensor:
    """The x that explain supposes, but for its number of rows."""
    return torch.empty(1, weight.shape[1], dtype=weight.dtype, device=weight.device)


def _path(weight: Tensor, rank: int, dropout: float, training: bool) -> tuple[str, str]:
    """What a call with this weight runs, and why nothing faster."""
    dtype, device = autocast_dtype(weight) or weight.dtype, weight.device
    sizes = EXAMPLE_ROWS, weight.shape[1], weight.shape[0], rank
    dropout_p = dropout if training else 0.0
    try:
        path = lora_linear_path(*sizes, dropout_p=dropout_p, dtype=dtype, weight_dtype=weight.dtype, device=device)
    except BackendError as error:
        return "none", str(error)
    return f"fastadapt {path}", "; ".join(why_not_triton(device, dtype)) if weight.is_cuda else ""


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
