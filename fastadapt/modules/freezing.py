"""What a frozen model need not do: train its position embeddings, and run its frozen parts uncompiled."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastadapt.core.checks import fail

# positional_embedding (CLIP), position_embedding (transformers' CLIP), position_embeddings (ViT, BERT), pos_embed (timm)
_POSITIONS = re.compile(r"(^|\.)pos(ition(al)?)?_embed(ding)?s?(\.weight)?$")


def freeze_position_embeddings(model: nn.Module, frozen: bool = True) -> list[str]:
    """Freeze the model's position embeddings, or with frozen=False let them train.

    A table that trains at a tower's input takes the backward through the whole tower, frozen or not.  ETRIS as released trains
    both towers' (Xu et al., ICCV 2023), whose first bridge comes after block 4: with a ViT-B/16 at 416 pixels freezing them
    saves the backward of four blocks, 38.3 GFLOP of linears and 14.1 of flash attention a sample, and a third of what the
    tower keeps, 113 of 338 MiB in float32.

    Args:
        model: any module; its parameters named positional_embedding, position_embedding(s), position_embedding(s).weight or
            pos_embed are meant.
        frozen: what they become.

    Returns:
        Their names.

    Raises:
        ValueError: the model has none.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if _POSITIONS.search(name)}
    if not found:
        fail("model", "a model with parameters named as position embeddings", "one without any")
    for parameter in found.values():
        parameter.requires_grad_(not frozen)
    return list(found)


def compile_frozen(model: nn.Module, **options: Any) -> list[str]:
    """Compile the frozen parts of a model with torch.compile, in place, and leave what trains as it is.

    These are the largest submodules with children, a forward and parameters of which none requires grad: a frozen tower whole,
    a tower with adapters in some blocks block by block.  Inductor then fuses what a frozen part does element by element (bias
    and ReLU after a folded convolution, LayerNorm, activations).  Parameters, names and the state dict stay.  The parts
    compile when they first run, and must not be changed afterwards.

    Args:
        model: any module.
        options: for torch.compile, such as dynamic, mode or backend.

    Returns:
        The names of the parts compiled; "" is the model itself.

    Raises:
        ValueError: nothing in the model is frozen.
    """
    names = []
    _compile_frozen("", model, options, names)
    if not names:
        fail("model", "a model with a frozen submodule that has children", "one without any")
    return names


def _compile_frozen(name: str, module: nn.Module, options: dict[str, Any], names: list[str]) -> None:
    children = list(module.named_children())
    parameters = list(module.parameters())
    runs = type(module).forward is not nn.Module.forward  # a ModuleList does not
    if children and parameters and runs and not any(parameter.requires_grad for parameter in parameters):
        module.compile(**options)
        names.append(name)
        return
    for child_name, child in children:
        _compile_frozen(f"{name}.{child_name}".removeprefix("."), child, options, names)
