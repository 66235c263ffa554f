"""The main job's case: one training step of CLIP ViT-B/16 with LoRA on every linear of every block, on photographs.

The model learns, without labels, to tell which two views show the same scene; only the LoRA factors are trained.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import fastadapt
from bench.case import COMPILED, FASTADAPT, FROZEN, GRAPHED, PEFT, Arm, Case, Unavailable
from bench.cases.common import SEED, autocasting
from bench.clocks import ROTATION
from bench.compiled import compile_in_place
from bench.photos import views
from bench.twin import with_fused_masks
from fastadapt.prove.judge import Verdict, judge, poisoned

LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK, ALPHA, DROPOUT = 16, 16, 0.1
TEMPERATURE, LEARNING_RATE = 0.1, 1e-4
# rounding errors grow through twelve blocks: those of two right answers differ by several per cent either way
SLACK = 1.2
ARCHITECTURE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
ARCHITECTURE |= {"projection_dim": 512}
IMAGES = {  # by the tokens that they become: those of CLIP's ViT-B/16, and of DINOv2's ViT-B/14 at 518 pixels
    197: {"patch_size": 16, "image_size": 224},
    1370: {"patch_size": 14, "image_size": 518},
}

# weights' dtype (PEFT's adapters have it too), and autocast's
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float32 under bfloat16 autocast": (torch.float32, torch.bfloat16),
}


def case(precision: str, batch: int, activation: str = "quick_gelu", tokens: int = 197) -> Case:
    """The Case at one of PRECISIONS with `batch` images a step, two for each scene.

    activation: CLIP's own, or "gelu" for what ViT and DINOv2 have in its place, which keeps less for the backward.
    tokens: one of IMAGES.
    """
    dtype, autocast = PRECISIONS[precision]
    extras = [*[activation] * (activation != "quick_gelu"), *[f"{tokens} tokens"] * (tokens != 197)]
    return Case(
        name=", ".join([f"CLIP ViT-B/{IMAGES[tokens]['patch_size']}, batch {batch}, {precision}", *extras]),
        params={
            "model": os.environ.get("CHECKPOINT") or "configuration, random weights",
            "batch": batch,
            "tokens": tokens,
            "r": RANK,
            "alpha": ALPHA,
            "dropout": DROPOUT,
            "precision": precision,
            "linears": LINEARS,
            "activation": activation,
            "optimizer": f"AdamW, lr {LEARNING_RATE}",
            **ARCHITECTURE,
            **IMAGES[tokens],
        },
        dtype=autocast or dtype,
        autocast=autocast is not None,
        make_inputs=lambda device: Inputs(device, dtype, autocast, batch, activation, tokens),
        arms={
            FROZEN: _frozen,
            PEFT: lambda inputs: _trained(inputs, inputs.model()),
            COMPILED: lambda inputs: _trained(inputs, _compile_blocks(inputs.model())),
            FASTADAPT: lambda inputs: _trained(inputs, fastadapt.fuse(inputs.model())),
            GRAPHED: _graphed,
        },
        verify=_verify,
        work={"training step": None},
    )


def build(device: torch.device, activation: str = "quick_gelu", tokens: int = 197) -> nn.Module:
    """CLIP's vision tower with PEFT LoRA, float32, every factor random; CHECKPOINT names a folder of real weights, of 197
    tokens."""
    checkpoint = os.environ.get("CHECKPOINT")
    if checkpoint and device.type != "meta" and tokens == 197:
        tower = CLIPVisionModelWithProjection.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32)
    else:
        torch.manual_seed(SEED)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**ARCHITECTURE, **IMAGES[tokens], hidden_act=activation))
    torch.manual_seed(SEED)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=LINEARS)
    model = get_peft_model(tower, config)
    for layer in lora_layers(model):  # PEFT starts B at zero, where A's gradient would be zero and prove nothing
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return model.to(device).train()


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The model's PEFT LoRA layers."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def contrastive_loss(embeddings: Tensor) -> Tensor:
    """Cross-entropy of finding each view's partner (row i ^ 1) among all other views, by cosine similarity.

        L = - mean_i log softmax_j(z_i . z_j / temperature, j != i)[i ^ 1],      z = e / |e|

    embeddings: (2 n, d), taken to at least float32 (van den Oord et al., 2018; Chen et al., "SimCLR", ICML 2020).
    """
    z = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.t() / TEMPERATURE).masked_fill(itself, float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device) ^ 1)


class Inputs:
    """What the arms share: photographs, the PEFT model they all start from, and its results in float64."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        batch: int,
        activation: str = "quick_gelu",
        tokens: int = 197,
    ) -> None:
        self.device, self.dtype, self.autocast = device, dtype, autocast
        self._model, size = build(device, activation, tokens).to(dtype), IMAGES[tokens]["image_size"]
        if device.type == "meta":
            self.photos = [torch.empty(batch, 3, size, size, dtype=dtype, device=device)]
        else:
            self.photos = [views(batch // 2, size, seed=i).to(device, dtype) for i in range(ROTATION)]
        self.eager = cache(lambda dropout: self._twin(dropout, dtype))
        self.exact = cache(lambda dropout: self._twin(dropout, torch.float64))

    def model(self) -> nn.Module:
        """A copy of the PEFT model, for an arm to change and train."""
        return copy.deepcopy(self._model)

    def loss(self, model: nn.Module, photos: Tensor) -> Tensor:
        with autocasting(self.device, self.autocast):
            return contrastive_loss(model(pixel_values=photos).image_embeds)

    def outputs(self, model: nn.Module, dropout: bool) -> dict[str, Tensor]:
        """Embeddings, loss and the gradient of every LoRA factor, from SEED."""
        model.train(dropout)
        torch.manual_seed(SEED)
        found = self.gradients(model, self.photos[0].to(model.dtype))
        model.train()
        return found

    def gradients(self, model: nn.Module, photos: Tensor) -> dict[str, Tensor]:
        """The same of these photographs, with the generator and the model as they are."""
        model.zero_grad(set_to_none=True)
        with poisoned(), autocasting(self.device, self.autocast if model.dtype != torch.float64 else None):
            embeddings = model(pixel_values=photos).image_embeds
            loss = contrastive_loss(embeddings)
            loss.backward()
        found = {"image_embeds": embeddings.detach(), "loss": loss.detach()}
        found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.zero_grad(set_to_none=True)
        return found

    def _twin(self, dropout: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """PEFT's own outputs in `dtype`, with fastadapt's dropout masks in place of nn.Dropout's."""
        return self.outputs(with_fused_masks(self.model().to(dtype)), dropout)


def _trained(inputs: Inputs, model: nn.Module) -> Arm:
    """A model whose trainable parameters AdamW updates."""
    optimizer = _optimizer(inputs, model)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Arm(
        forward=lambda i: inputs.loss(model, inputs.photos[i]),
        backward=lambda loss: loss.backward(),
        update=update,
        outputs=lambda dropout: inputs.outputs(model, dropout),
        constants=[*model.parameters(), *model.buffers(), *inputs.photos],
    )


def _optimizer(inputs: Inputs, model: nn.Module) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = inputs.device.type == "cuda"
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE, capturable=on_gpu, fused=on_gpu)


def _graphed(inputs: Inputs) -> Arm:
    """The fused model's step as one call, which `fastadapt.graph_step` captures and replays; verified by a graph without the
    update."""
    if inputs.device.type != "cuda":
        raise Unavailable("graph_step captures a CUDA graph, which needs a CUDA device")
    model = fastadapt.fuse(inputs.model())
    optimizer = _optimizer(inputs, model)

    def step(photos: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = inputs.loss(model, photos)
        loss.backward()
        optimizer.step()
        return loss.detach()

    graphed = fastadapt.graph_step(step, optimizer)

    def forward(i: int) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise Unavailable("graph_step's step is a CUDA graph already, which no other can contain: see the wall clock")
        return graphed(inputs.photos[i])

    return Arm(
        forward=forward,
        backward=lambda loss: None,
        outputs=lambda dropout: _replayed(inputs, model, dropout),
        constants=[*model.parameters(), *model.buffers(), *inputs.photos],
    )


def _replayed(inputs: Inputs, model: nn.Module, dropout: bool) -> dict[str, Tensor]:
    """`Inputs.outputs` from the replay of a graph."""
    graphed = fastadapt.graph_step(lambda photos: inputs.gradients(model, photos))
    model.train(dropout)
    for _ in range(graphed.warmup + 1):
        torch.manual_seed(SEED)
        found = graphed(inputs.photos[0])
    model.train()
    return {name: tensor.clone() for name, tensor in found.items()}


def _frozen(inputs: Inputs) -> Arm:
    """The model without LoRA, its gradient taken back to the first block's input: no adapter can cost less."""
    model = inputs.model().unload().requires_grad_(False)
    blocks_input: list[Tensor] = []

    def require_gradient(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        blocks_input[:] = [output.requires_grad_()]
        return output

    model.vision_model.pre_layrnorm.register_forward_hook(require_gradient)
    return Arm(
        forward=lambda i: inputs.loss(model, inputs.photos[i]),
        backward=lambda loss: torch.autograd.grad(loss, blocks_input),
        outputs=lambda dropout: {},
        constants=[*model.parameters(), *model.buffers(), *inputs.photos],
    )


def _compile_blocks(model: nn.Module) -> nn.Module:
    """Each block under torch.compile: compiled once and used by all, where the whole model takes minutes."""
    compile_in_place(model.base_model.model.vision_model.encoder.layers)
    return model


def _verify(name: str, arm: Arm, inputs: Inputs) -> dict[str, Verdict]:
    """Against PEFT in float64: every arm without dropout, and those that draw fastadapt's masks with it."""
    if name == FROZEN:
        return {}
    settings = {"dropout 0": False}
    if name in (FASTADAPT, GRAPHED):
        settings[f"dropout {DROPOUT}"] = True
    dtype = inputs.autocast or inputs.dtype
    return {
        label: judge(arm.outputs(dropout), inputs.eager(dropout), inputs.exact(dropout), dtype, SLACK)
        for label, dropout in settings.items()
    }
