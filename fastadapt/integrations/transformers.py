"""transformers' encoder layers, computed as frozen blocks whenever that means the same.

A fused layer is transformers' own object with another class, as a fused PEFT layer is PEFT's (integrations/peft.py):
parameters, names and submodules stay, and each call decides afresh whether the block can serve it.  A family is known by the
names of its classes, so this file imports neither transformers nor any of its models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.modules.frozen_parts import DROPOUTS, Parts, Tensors, load_readers, tensors_of, why_not_plain
from fastadapt.modules.frozen_run import Adapters, Inputs, run_block

_MODELS = "transformers.models."
_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
}
_DROPOUTS = ("dropout1", "dropout2", "attention_dropout")
_ATTENTIONS = ("sdpa", "eager")  # what torch's attention means the same as
# arguments that ask for nothing that a layer does
_IGNORED = {"output_attentions", "output_hidden_states", "return_dict", "use_cache", "interpolate_pos_encoding", "is_causal"}
_IGNORED |= {"position_ids", "encoder_attention_mask"}


@dataclass(frozen=True)
class Family:
    """Where the parts of a layer are, as dotted paths below it, and its classes, as those of the modules at these paths.

    dropout1, dropout2: where the probabilities of dropping an element of a branch are, as `(path of the module, attribute)`: an
    nn.Dropout's p, or a number that a functional call uses; attention_dropout: the same.  position: the argument that is added
    to q's and k's input.  refused: an attribute of the module at a path, 0 in a layer that can be fused while it trains.
    """

    classes: dict[str, str]
    attention: str
    norm1: str
    norm2: str
    q: str
    k: str
    v: str
    out: str
    fc1: str
    fc2: str
    activation: str
    heads: str
    attention_dropout: tuple[str, str]
    pre_norm: bool = True
    scale1: str | None = None
    scale2: str | None = None
    dropout1: tuple[str, str] | None = None
    dropout2: tuple[str, str] | None = None
    position: str | None = None
    refused: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        parts = (self.norm1, self.norm2, self.activation)
        places = (self.attention_dropout, self.dropout1, self.dropout2, *self.refused)
        found = (*self.classes, *parts, *(place[0] for place in places if place is not None))
        object.__setattr__(self, "modules", tuple(dict.fromkeys(path for path in found if path)))


def _encoder(model: str, name: str, attention: str, mlp: str, classes: dict[str, str] | None = None, **places: Any) -> Family:
    """A layer whose attention has q_proj, k_proj and v_proj, and whose `mlp` fc1 and fc2."""
    module = f"{_MODELS}{model}.modeling_{model}."
    return Family(
        classes={attention: f"{module}{name}Attention", "mlp": f"{module}{mlp}"} | (classes or {}),
        attention=attention,
        **{role: f"{attention}.{role}_proj" for role in "qkv"},
        fc1="mlp.fc1",
        fc2="mlp.fc2",
        activation="mlp.activation_fn",
        **places,
    )


def _clip(model: str, name: str) -> Family:
    return _encoder(
        model, name, "self_attn", f"{name}MLP", norm1="layer_norm1", norm2="layer_norm2", out="self_attn.out_proj",
        heads="num_heads", attention_dropout=("self_attn", "dropout"),
    )  # fmt: skip


_BERT = f"{_MODELS}bert.modeling_bert.Bert"
_DINO = f"{_MODELS}dinov2.modeling_dinov2.Dinov2"
FAMILIES: dict[str, Family] = {
    f"{_MODELS}clip.modeling_clip.CLIPEncoderLayer": _clip("clip", "CLIP"),
    f"{_MODELS}siglip.modeling_siglip.SiglipEncoderLayer": _clip("siglip", "Siglip"),
    f"{_MODELS}vit.modeling_vit.ViTLayer": _encoder(
        "vit", "ViT", "attention", "ViTMLP", norm1="layernorm_before", norm2="layernorm_after", out="attention.o_proj",
        heads="num_attention_heads", attention_dropout=("attention", "attention_dropout"), dropout1=("dropout", "p"),
        dropout2=("dropout", "p"),
    ),
    f"{_DINO}Layer": _encoder(
        "dinov2", "Dinov2", "attention", "Dinov2MLP", norm1="norm1", norm2="norm2", out="attention.o_proj",
        heads="num_attention_heads", attention_dropout=("attention", "attention_dropout"), scale1="layer_scale1.lambda1",
        scale2="layer_scale2.lambda1", refused=(("drop_path", "drop_prob"),),
        classes={f"layer_scale{i}": f"{_DINO}LayerScale" for i in (1, 2)},
    ),
    f"{_BERT}Layer": Family(
        classes={
            "attention": f"{_BERT}Attention", "attention.self": f"{_BERT}SelfAttention",
            "attention.output": f"{_BERT}SelfOutput", "intermediate": f"{_BERT}Intermediate", "output": f"{_BERT}Output",
        },
        attention="attention.self", norm1="attention.output.LayerNorm", norm2="output.LayerNorm", q="attention.self.query",
        k="attention.self.key", v="attention.self.value", out="attention.output.dense", fc1="intermediate.dense",
        fc2="output.dense", activation="intermediate.intermediate_act_fn", heads="num_attention_heads", pre_norm=False,
        attention_dropout=("attention.self.dropout", "p"), dropout1=("attention.output.dropout", "p"),
        dropout2=("output.dropout", "p"),
    ),
    # a block does not look for values that are not finite, which transformers' own clamps while it trains
    f"{_MODELS}detr.modeling_detr.DetrEncoderLayer": _encoder(
        "detr", "DetrSelf", "self_attn", "DetrMLP", norm1="self_attn_layer_norm", norm2="final_layer_norm",
        out="self_attn.o_proj", heads="", attention_dropout=("self_attn", "attention_dropout"), pre_norm=False,
        dropout1=("", "dropout"), dropout2=("mlp", "dropout"), position="spatial_position_embeddings",
        refused=(("mlp", "activation_dropout"),),
    ),
}  # fmt: skip


class FusedLayer:
    """What a fused layer's class has before transformers' own, `original`: its family, and the forward that chooses.

    recompute, which may be set on a layer: as for `FrozenBlock`.
    """

    family: Family
    original: type
    recompute = False

    def __reduce__(self) -> tuple:
        return _new, (self.original,), self.__dict__

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        found = call_of(self, hidden_states, attention_mask, *args, **kwargs)
        if isinstance(found, str):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        parts, tensors, inputs, causal = found
        return run_block(parts, tensors, inputs, attention_mask, causal, Adapters(), self.recompute)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def family_of(layer: nn.Module) -> Family:
    """The family of a known layer, fused or not."""
    return layer.family if isinstance(layer, FusedLayer) else FAMILIES[full_name(type(layer))]


def is_known(module: nn.Module) -> bool:
    """Whether the module is a layer of FAMILIES, fused or not."""
    return isinstance(module, FusedLayer) or full_name(type(module)) in FAMILIES


@lru_cache(maxsize=None)
def fused_class(cls: type) -> type:
    """The class of fused layers of transformers' class `cls`."""
    names = {"family": FAMILIES[full_name(cls)], "original": cls, "__module__": __name__}
    return type(f"Fused{cls.__name__}", (FusedLayer, cls), names)


def _new(cls: type) -> nn.Module:
    """A fused layer for unpickling to fill."""
    load_readers()
    return fused_class(cls).__new__(fused_class(cls))


def fuse_layer(layer: nn.Module) -> None:
    """Make a known layer a fused one; a fused one stays as it is."""
    load_readers()
    if not isinstance(layer, FusedLayer):
        layer.__class__ = fused_class(type(layer))


def unfuse_layer(layer: nn.Module) -> None:
    """Undo `fuse_layer`."""
    if "original" in vars(type(layer)):
        layer.__class__ = type(layer).original


def arguments_of(layer: nn.Module) -> dict[str, Any] | str:
    """What FrozenBlock is made of for the same computation, with the probabilities of training, or why it cannot be."""
    load_readers()
    if not is_known(layer):
        return f"{type(layer).__name__} is no layer of a known family"
    family = family_of(layer)
    if reason := _why_not_modules(family, layer, {}):
        return reason
    parts = parts_of(family, layer, at(layer, family.attention))
    if isinstance(parts, str):
        return parts
    places = [getattr(family, name) for name in _DROPOUTS]
    first, second, of_attention = (0.0 if p is None else float(getattr(at(layer, p[0]), p[1], 0.0)) for p in places)
    if first != second:
        return f"its branches are dropped with probabilities {first} and {second}"
    given = {name: value for name, value in parts._asdict().items() if name not in _DROPOUTS}
    return given | {"dropout": first, "attention_dropout": of_attention}


def call_of(
    layer: nn.Module, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> tuple[Parts, Tensors, Inputs, bool] | str:
    """What `run_block` takes for a call of the layer with these arguments, or why it cannot serve it."""
    x, mask = hidden_states, attention_mask
    family = family_of(layer)
    position = kwargs.pop(family.position, None) if family.position else None
    more = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED]
    if more or any([value is not None for value in args]):
        return f"called with {', '.join(more) or 'further arguments'}"
    if reason := _why_not_modules(family, layer, kwargs):
        return reason
    attention = at(layer, family.attention)
    kind = attention.config._attn_implementation
    if kind not in _ATTENTIONS:
        return f"attention is {kind}"
    if mask is not None and (type(mask) is not Tensor or mask.ndim != 4):
        return "the attention mask is not a tensor of four dimensions"
    causal = kwargs.get("is_causal")
    causal = attention.is_causal if causal is None else causal
    parts = parts_of(family, layer, attention)
    if isinstance(parts, str):
        return parts
    tensors = tensors_of(parts, x)
    if isinstance(tensors, str):
        return tensors
    return parts, tensors, Inputs(x, position), bool(causal and kind == "sdpa" and mask is None and x.shape[1] > 1)


def parts_of(family: Family, layer: nn.Module, attention: nn.Module) -> Parts | str:
    """The layer's parts as they are now, or what cannot be one."""
    activation = _ACTIVATIONS.get(full_name(type(at(layer, family.activation))))
    if activation is None:
        return f"the activation is {type(at(layer, family.activation)).__name__}"
    if activation.startswith("gelu") and not _is_torch(at(layer, family.activation).act):
        return "the activation is a GELU that is not torch's"
    linears = {role: at(layer, getattr(family, role)) for role in ("norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2")}
    heads = getattr(attention, family.heads) if family.heads else attention.q_proj.out_features // attention.head_dim
    places = {name: getattr(family, name) for name in _DROPOUTS}
    dropouts = {name: 0.0 if place is None else probability(layer, *place) for name, place in places.items()}
    scales = {name: at(layer, getattr(family, name)) for name in ("scale1", "scale2") if getattr(family, name)}
    return Parts(**linears, activation=activation, heads=heads, pre_norm=family.pre_norm, **scales, **dropouts)


def _is_torch(function: Any) -> bool:
    return getattr(function, "func", function) is nn.functional.gelu


def probability(layer: nn.Module, path: str, attribute: str) -> float:
    """A dropout's probability as it is now: 0 where its module is not training."""
    module = at(layer, path)
    return float(getattr(module, attribute)) if module.training and not isinstance(module, nn.Identity) else 0.0


def _why_not_modules(family: Family, layer: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """Why the layer's modules do more than their classes say."""
    for path, name in family.classes.items():
        if full_name(type(at(layer, path))) != name:
            return f"{path} is {type(at(layer, path)).__name__}"
    for path in family.modules:
        module = at(layer, path)
        if path == family.attention and module._forward_hooks and _only_capture(module):
            if kwargs.get("output_attentions") or module.config.output_attentions:
                return "attention weights are asked for"
            continue
        if reason := why_not_plain(module):
            return f"{path} {reason}"
    for place in (family.dropout1, family.dropout2, family.attention_dropout):
        if place is not None and place[1] == "p" and not isinstance(at(layer, place[0]), DROPOUTS):
            return f"{place[0]} is {type(at(layer, place[0])).__name__}"
    for path, attribute in family.refused:
        module = at(layer, path)
        if module.training and getattr(module, attribute, 0.0):
            return f"{path}.{attribute} is {getattr(module, attribute)}"
    return None


def _only_capture(module: nn.Module) -> bool:
    """Whether all forward hooks are transformers' own, which do nothing but collect what is asked for."""
    return all(hook.__name__ == "output_capturing_hook" for hook in module._forward_hooks.values()) and not (
        module._forward_pre_hooks or module._backward_pre_hooks or module._backward_hooks or "forward" in module.__dict__
    )


def at(module: nn.Module, path: str) -> Any:
    """What is at a dotted path below the module; the module itself at ""."""
    for name in path.split(".") if path else ():
        module = module._modules[name] if name in module._modules else getattr(module, name)
    return module
