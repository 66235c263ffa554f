"""CLIP's released state dicts, under the names of the towers here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}


def from_openai(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The states of `vision`, a CLIPViT or a CLIPResNet, and `text`, of OpenAI's CLIP; what is neither is left out."""
    visual = {name.removeprefix("visual."): t for name, t in state_dict.items() if name.startswith("visual.")}
    text = {name: tensor for name, tensor in state_dict.items() if not name.startswith("visual.")}
    if "proj" in visual:  # a ViT
        visual = _transformer(visual, "vision_model", _VISION, ("proj", "visual_projection"))
    return {"vision": visual, "text": _transformer(text, "text_model", _TEXT, ("text_projection", "text_projection"))}


def _transformer(
    state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str], projection: tuple[str, str]
) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        if name == projection[0]:
            found[f"{projection[1]}.weight"] = tensor.T
        elif name.startswith("transformer.resblocks."):
            _, _, index, inner = name.split(".", 3)
            layer = f"{prefix}.encoder.layers.{index}"
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                for role, part in zip("qkv", tensor.chunk(3)):
                    found[f"{layer}.self_attn.{role}_proj.{kind}"] = part
            else:
                found[f"{layer}.{_renamed(inner, _BLOCK)}"] = tensor
        elif (renamed := _renamed(name, names)) != name:
            found[f"{prefix}.{renamed}"] = tensor
    return found


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with its beginning replaced, where that is one of `names`."""
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)
