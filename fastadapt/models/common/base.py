"""The base classes of the methods: configuration, model and output."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from fastadapt import FusionEncoder
from fastadapt.core.checks import check_tensor, fail
from fastadapt.models.common.arms import ATTENTION, check_arm
from fastadapt.models.common.fusion import EagerFusionEncoder
from fastadapt.models.common.parity import Parity, chosen

ADAPTERS_FILE = "adapters.safetensors"

# What may differ between configurations, their towers' included, whose tuned parameters mean the same.
_FREE = {"arm", "recompute", "architectures", "dtype", "transformers_version", "name_or_path", "_name_or_path"}


class MethodConfig(PreTrainedConfig):
    """A method's configuration: sizes, the frozen towers' own configurations, the arm and the parity options.

    arm: "release", "strong" or "fastadapt"; the parameters, their names and, up to rounding, the function are the same.
    parity: "released", or the names of the departures of the released code to reproduce (`PARITY` lists them); none by default.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    PARITY: ClassVar[tuple[Parity, ...]] = ()

    arm: str = "fastadapt"
    parity: str | list[str] | tuple[str, ...] = ()
    tie_word_embeddings: bool = True  # transformers' word for: parameters with two names are one

    def __post_init__(self, **kwargs: Any) -> None:
        check_arm(self.arm)
        self.parity = list(chosen(self.PARITY, self.parity))
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MethodConfig:
        """The configuration of a published variant, or the "tiny" one that trains in seconds, with `changes` to it."""
        if name not in cls.PRESETS:
            fail("preset", f"one of {', '.join(cls.PRESETS)}", repr(name))
        return cls(**{**copy.deepcopy(cls.PRESETS[name]), **changes})

    def tower(self, key: str) -> PreTrainedConfig:
        """A copy of the frozen tower's configuration `key`, with the attention of this arm."""
        config = copy.deepcopy(getattr(self, key))
        config._attn_implementation = {"": ATTENTION[self.arm]}  # not its backbone's
        return config

    def fingerprint(self) -> str:
        """A hash of everything that the tuned parameters' meaning depends on; the arm is not part of it."""
        return hashlib.sha256(json.dumps(_kept(self.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class GroundingOutput(ModelOutput):
    """What a grounding model returns.

    loss: scalar, where boxes were given.
    pred_boxes: (B, 4), centre and size (cx, cy, w, h) as parts of the image's width and height.
    losses: the unweighted terms of the loss by name.
    """

    loss: Tensor | None = None
    pred_boxes: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class MethodModel(PreTrainedModel):
    """A method's model: frozen towers, and a tuned part that can be saved and loaded alone.

    A class names its frozen children in `towers`, each with the transformers class whose checkpoints it takes, gives `tuned`
    if there are trained modules inside of them, with patterns of the names of their parameters in `added`, and calls `finish()`
    at the end of its __init__.  `rates` has the parts of the learning rate that the paper's recipe gives to trained parameters,
    by patterns of their names, the first that fits.
    """

    towers: ClassVar[dict[str, type[PreTrainedModel]]] = {}
    added: ClassVar[tuple[str, ...]] = ()
    rates: ClassVar[dict[str, float]] = {}
    finished = False
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True

    def tuned(self) -> Iterable[nn.Module]:
        """The trained modules inside the towers."""
        return ()

    def finish(self) -> None:
        """Initialise the weights as transformers does, and freeze the towers."""
        self.post_init()
        self.freeze()
        self.finished = True
        self.train(self.training)

    def freeze(self) -> None:
        """Freeze the towers but for the trained modules inside them."""
        for name in self.towers:
            getattr(self, name).requires_grad_(False)
        for module in self.tuned():
            module.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' from_pretrained, whose new parameters all require a gradient, with the towers frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def has(self, option: str) -> bool:
        """Whether this departure of the released code is asked for."""
        return option in self.config.parity

    def check_inputs(self, pixel_values: Tensor, **ids: Tensor | None) -> None:
        """Images (B, 3, image_size, image_size), and ids by their names, (B, text_length) each, as the configuration has them."""
        size, sentences = self.config.image_size, (len(pixel_values), self.config.text_length)
        check_tensor("pixel_values", pixel_values, (None, 3, size, size), pixel_values.device)
        for name, given in ids.items():
            if given is None or given.shape != sentences:
                fail(name, f"shape {sentences}", None if given is None else tuple(given.shape))

    def train(self, mode: bool = True) -> MethodModel:
        """Towers stay in eval mode, their dropout off, unless `parity` asks for "tower_dropout"."""
        super().train(mode)
        if self.finished:
            for name in self.towers:
                getattr(self, name).train(mode and self.has("tower_dropout"))
            for module in self.tuned():
                module.train(mode)
        return self

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # of code that is not its own transformers skips the modules without parameters of their own, whose starts we need
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every module starts as its own reset_parameters says; transformers calls this for children before their parents."""
        if isinstance(module, (FusionEncoder, EagerFusionEncoder)):
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        elif "in_proj_weight" in module._parameters:  # attention, torch's or ours
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
            nn.init.zeros_(module.out_proj.bias)
        elif hasattr(module, "reset_parameters"):
            # of what a checkpoint had, transformers protects all from torch.nn.init alone
            tensors = (*module.parameters(), *module.buffers())
            loaded = [(tensor, tensor.clone()) for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
            module.reset_parameters()
            for tensor, value in loaded:
                tensor.copy_(value)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The trained parameters for an optimizer, those of one rate in a group, where `lr` is the rate of the rest."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                factor = next((factor for pattern, factor in self.rates.items() if fnmatchcase(name, pattern)), 1.0)
                groups.setdefault(factor, []).append(parameter)
        return [{"params": parameters, "lr": lr * factor} for factor, parameters in groups.items()]

    def load_towers(self, **sources: str | Path) -> None:
        """Take the weights of frozen towers from transformers checkpoints: tower=directory or name on the hub.

        Raises:
            ValueError: no such tower, or its checkpoint lacks a tensor or has one of another shape.
        """
        for name, source in sources.items():
            if name not in self.towers:
                fail("sources", f"some of {', '.join(self.towers)}", name)
            checkpoint, found = self.towers[name].from_pretrained(source, output_loading_info=True)
            own, loaded = getattr(self, name).state_dict(), self.fitted(name, checkpoint.state_dict())
            own = {key: t for key, t in own.items() if not any(fnmatchcase(f"{name}.{key}", p) for p in self.added)}
            for key in found["missing_keys"]:
                del loaded[key]  # transformers has drawn it at random
            for key, tensor in own.items():
                if key not in loaded or loaded[key].shape != tensor.shape:
                    got = f"shape {tuple(loaded[key].shape)}" if key in loaded else "none"
                    fail(f"{name}.{key}", f"shape {tuple(tensor.shape)} in {source}", got)
            getattr(self, name).load_state_dict({key: loaded[key] for key in own}, strict=False)  # but for what is added

    def fitted(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's state as the tower `name` takes it: the same, but where a method resizes position embeddings."""
        return state

    def adapters(self) -> dict[str, Tensor]:
        """The tuned part: every trainable parameter once, and the buffers of the modules that have one."""
        found = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = self.state_dict(keep_vars=True)
        for prefix, module in self.named_modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                names = (f"{prefix}.{name}".removeprefix(".") for name, _ in module.named_buffers(recurse=False))
                found.update({name: state[name] for name in names if name in state})
        return {name: tensor.detach() for name, tensor in found.items()}

    def save_adapters(self, directory: str | Path) -> Path:
        """Write the tuned part alone, with the configuration's fingerprint, to `directory`/adapters.safetensors."""
        file = Path(directory, ADAPTERS_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "method": self.config.model_type, "config": self.config.fingerprint()}
        save_file({name: tensor.contiguous() for name, tensor in self.adapters().items()}, file, header)
        return file

    @torch.no_grad()
    def load_adapters(self, directory: str | Path) -> None:
        """Take the tuned part from a directory that `save_adapters` wrote, of any arm.

        Raises:
            ValueError: it was saved by another method or with another configuration, or lacks a tensor, or one has another
                shape.  The model is then as it was.
        """
        wanted = self.adapters()
        with safe_open(Path(directory, ADAPTERS_FILE), "pt") as file:
            header = file.metadata() or {}
            if (saved := header.get("method")) != self.config.model_type:
                fail("directory", f"adapters of {self.config.model_type}", f"adapters of {saved}")
            if header.get("config") != self.config.fingerprint():
                fail("directory", "adapters saved with this model's configuration", "another configuration's fingerprint")
            if apart := set(file.keys()) ^ set(wanted):
                fail("directory", "the tensors of this model's tuned part", f"{len(apart)} more or fewer, {sorted(apart)[0]}")
            loaded = {name: file.get_tensor(name) for name in wanted}
        for name, tensor in wanted.items():
            if loaded[name].shape != tensor.shape:
                fail(name, f"shape {tuple(tensor.shape)}", f"shape {tuple(loaded[name].shape)}")
        for name, tensor in wanted.items():
            tensor.copy_(loaded[name])


def _kept(values: Any) -> Any:
    """A configuration's values, with those of the towers inside, without what is free."""
    if isinstance(values, dict):
        return {str(name): _kept(value) for name, value in values.items() if name not in _FREE}
    return values
