"""Fused transformers layers against transformers' own in float64: outputs and every gradient."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    DetrConfig,
    Dinov2Config,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.detr.modeling_detr import DetrEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.vit.modeling_vit import ViTLayer

import fastadapt
from bench.twin import with_fused_masks
from fastadapt.core.philox import draw_seeds
from fastadapt.integrations.transformers import at, call_of, fuse_layer
from fastadapt.modules.attention_state import drop
from fastadapt.modules.frozen_run import SITES
from tests.tolerance import EXACT, error

WIDTH, HEADS, HIDDEN, BATCH, TOKENS = 24, 3, 40, 2, 5
SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS}
DETR = {"d_model": WIDTH, "encoder_ffn_dim": HIDDEN, "encoder_attention_heads": HEADS, "dropout": 0.0}
KINDS = {
    "clip vision": (CLIPEncoderLayer, CLIPVisionConfig(**SIZES)),
    "clip text": (CLIPEncoderLayer, CLIPTextConfig(**SIZES)),
    "siglip": (SiglipEncoderLayer, SiglipVisionConfig(**SIZES)),
    "vit": (ViTLayer, ViTConfig(**SIZES)),
    "dinov2": (Dinov2Layer, Dinov2Config(hidden_size=WIDTH, num_attention_heads=HEADS, mlp_ratio=2, layerscale_value=0.5)),
    "bert": (BertLayer, BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "detr": (DetrEncoderLayer, DetrConfig(**DETR)),
}
LINEARS = r".*(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|query|key|value|dense)"
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, lora: bool = True, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options) -> nn.Module:
    """A training layer with random weights, frozen but for LoRA."""
    torch.manual_seed(0)
    cls, config = KINDS[kind]
    config._attn_implementation = attention
    layer = cls(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    layer.requires_grad_(False)
    if lora:
        options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": LINEARS} | options
        layer = inject_adapter_in_model(LoraConfig(**options), layer)
    return layer.to(dtype).train()


def arguments(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Those of a call beside hidden_states."""
    generator = torch.Generator().manual_seed(2)
    if kind == "clip text":
        return {"attention_mask": None, "is_causal": True}
    if kind == "bert":
        mask = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool)
        mask[1, ..., 3:] = False
        return {"attention_mask": mask.expand(BATCH, 1, TOKENS, TOKENS)}
    if kind == "detr":
        position = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        return {"attention_mask": None, "spatial_position_embeddings": position}
    return {"attention_mask": None}


def step(layer: nn.Module, kind: str, needs_x: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Output, and the gradients of x and of every trained parameter."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(needs_x)
    torch.manual_seed(3)
    y = layer(x, **arguments(kind, dtype))
    wanted = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    wanted |= {"x": x} if needs_x else {}
    grads = torch.autograd.grad(y, list(wanted.values()), torch.linspace(-3, 3, y.numel(), dtype=y.dtype).view(y.shape).cos())
    return {"y": y.detach()} | dict(zip(wanted, grads))


def why_not(layer: nn.Module, kind: str, dtype: torch.dtype = torch.float64) -> str | None:
    found = call_of(layer, torch.zeros(BATCH, TOKENS, WIDTH, dtype=dtype), **arguments(kind, dtype))
    return found if isinstance(found, str) else None


@every_kind
@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
def test_outputs_and_gradients(kind, lora):
    layer = build(kind, lora)
    expected = step(layer, kind)
    fuse_layer(layer)
    assert why_not(layer, kind) is None
    torch.testing.assert_close(step(layer, kind), expected, **EXACT)
    layer.recompute = True
    torch.testing.assert_close(step(layer, kind), expected, **EXACT)


@every_kind
def test_a_first_block_without_a_gradient_for_x(kind):
    layer = build(kind)
    expected = step(layer, kind, needs_x=False)
    fuse_layer(layer)
    torch.testing.assert_close(step(layer, kind, needs_x=False), expected, **EXACT)


@every_kind
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_of_lora_and_of_the_branches(kind, recompute):
    layer = build(kind, lora_dropout=0.2)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and "lora" not in name and not name.endswith("self.dropout"):
            module.p = 0.3
    twin = with_fused_masks(copy.deepcopy(layer))
    fuse_layer(layer)
    layer.recompute = recompute
    assert why_not(layer, kind) is None
    found = step(layer, kind)
    torch.testing.assert_close(found, step(twin, kind), **EXACT)
    layer.eval(), twin.eval()
    assert not torch.allclose(step(layer, kind)["y"], found["y"])
    torch.testing.assert_close(step(layer, kind), step(twin, kind), **EXACT)


def test_detrs_functional_dropout():
    layer = build("detr")
    layer.dropout = layer.mlp.dropout = 0.3
    twin = copy.deepcopy(layer)
    fuse_layer(layer)
    found = step(layer, "detr")
    torch.manual_seed(3)
    seeds = dict(zip(SITES, draw_seeds(torch.device("cpu"), len(SITES))))
    sites = iter(("branch1", "branch2"))

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        return x if p == 0 else drop(x, p, seeds[next(sites)])

    with mock.patch("torch.nn.functional.dropout", dropout):
        torch.testing.assert_close(step(twin, "detr"), found, **EXACT)
    layer.eval(), twin.eval()
    torch.testing.assert_close(step(layer, "detr"), step(twin, "detr"), **EXACT)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_attentions_dropout_is_torchs(kind):
    layer = build(kind)
    if kind == "bert":
        layer.attention.self.dropout.p = 0.3
    else:
        layer.attention.attention_dropout = 0.3
    expected = step(layer, kind)
    fuse_layer(layer)
    assert why_not(layer, kind) is None
    torch.testing.assert_close(step(layer, kind), expected, **EXACT)
    layer.recompute = True  # with masks of another stream, the same ones in the backward
    once = step(layer, kind)
    torch.testing.assert_close(step(layer, kind), once, rtol=0, atol=0)
    assert not torch.allclose(once["y"], expected["y"])


@every_kind
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_is_as_exact_as_transformers_own(kind, recompute):
    layer, exact = build(kind, dtype=torch.float32), step(build(kind), kind)
    narrow = step(build(kind, dtype=torch.bfloat16), kind, dtype=torch.bfloat16)  # where the stream is in bfloat16, too
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(layer, kind, dtype=torch.float32)
        fuse_layer(layer)
        layer.recompute = recompute
        assert why_not(layer, kind, torch.float32) is None
        found = step(layer, kind, dtype=torch.float32)
    assert found["y"].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for name, grad in found.items() if name != "y")
    errors = [sum(error(results[name], want) for name, want in exact.items()) for results in (found, expected, narrow)]
    assert errors[0] <= 1.5 * max(errors[1:])


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kind, use_reentrant):
    layer = build(kind, lora_dropout=0.2)
    fuse_layer(layer)
    expected = step(layer, kind)
    inner = layer.forward

    def forward(x: Tensor, **kwargs) -> Tensor:
        return checkpoint(lambda x: inner(x, **kwargs), x, use_reentrant=use_reentrant)

    layer.forward = forward
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.manual_seed(3)
    y = layer(x, **arguments(kind))
    y.backward(torch.linspace(-3, 3, y.numel(), dtype=y.dtype).view(y.shape).cos())
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close({"y": y.detach()} | found | {"x": x.grad}, expected, **EXACT)


@pytest.mark.parametrize("kind, recompute", [("clip text", False), ("dinov2", True), ("bert", False), ("detr", False)])
def test_compiled_without_a_graph_break(kind, recompute):
    torch.compiler.reset()
    layer = build(kind, lora_dropout=0.2)
    fuse_layer(layer)
    layer.recompute = recompute
    expected = step(layer, kind)
    layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(layer, kind), expected, **EXACT)


def hooked(path: str):
    return lambda layer: at(layer, path).register_forward_hook(lambda module, args, output: output)


CHANGES = {
    "hook on a norm": (hooked("layer_norm1"), "layer_norm1 has hooks"),
    "hook on attention": (hooked("self_attn"), "self_attn has hooks"),
    "hook on a linear": (hooked("mlp.fc1"), "fc1: has hooks"),
    "a weight trains": (lambda layer: layer.mlp.fc1.base_layer.weight.requires_grad_(), "fc1: trains"),
    "a norm trains": (lambda layer: layer.layer_norm1.requires_grad_(), "norm1: trains"),
    "another attention": (
        lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "flex_attention"), "attention is flex_attention",
    ),
    "another activation": (lambda layer: setattr(layer.mlp, "activation_fn", nn.Tanh()), "the activation is Tanh"),
    "another norm": (lambda layer: setattr(layer, "layer_norm2", nn.Identity()), "norm2 is Identity"),
    "another class": (lambda layer: setattr(layer, "mlp", nn.Sequential()), "mlp is Sequential"),
    "different LoRA dropouts": (
        lambda layer: setattr(layer.self_attn.q_proj.lora_dropout["default"], "p", 0.5),
        "the LoRA dropouts of q, k and v differ",
    ),
    "hook on the MLP": (hooked("mlp"), "mlp has hooks"),
    "a norm of another dtype": (lambda layer: layer.layer_norm1.float(), "norm1: x is torch.float64, it is torch.float32"),
    "a norm elsewhere": (lambda layer: layer.layer_norm2.to("meta"), "norm2: x is on cpu, it is on meta"),
    "nothing": (lambda layer: None, None),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_block_cannot_serve_is_transformers_own(change):
    apply, reason = CHANGES[change]
    layer = build("clip vision", lora_dropout=0.1)
    fuse_layer(layer)
    apply(layer)
    assert why_not(layer, "clip vision") == reason
    layer.self_attn.config._attn_implementation = "sdpa"


class Beside(nn.Module):
    """An MLP with an adapter beside it, for transformers' own layer."""

    def __init__(self, mlp: nn.Module, adapter: nn.Module, scale: float) -> None:
        super().__init__()
        self.mlp, self.adapter, self.scale = mlp, adapter, scale

    def forward(self, n: Tensor) -> Tensor:
        return self.mlp(n) + self.scale * self.adapter(n)


def randomised(adapter: nn.Module) -> nn.Module:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.4)
    return adapter.double()


def gradients(y: Tensor, *modules: nn.Module) -> list[Tensor]:
    """y and the gradient of everything that trains in these."""
    wanted = list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())
    return [y, *torch.autograd.grad(y, wanted, torch.linspace(-3, 3, y.numel(), dtype=y.dtype).view(y.shape).cos())]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["clip vision", "clip text", "siglip", "vit", "dinov2"])
@pytest.mark.parametrize("adapter", ["bottleneck", "loca"])
def test_a_block_with_an_adapter_beside_the_mlp(kind, adapter, recompute):
    layer = build(kind)
    made = {"bottleneck": lambda: fastadapt.BottleneckAdapter(WIDTH, 6, scale=0.3), "loca": lambda: fastadapt.LoCA(WIDTH, 8)}
    adapter = randomised(made[adapter]())
    block = fastadapt.FrozenBlock.from_transformers(layer, parallel=copy.deepcopy(adapter), recompute=recompute)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    found = gradients(block(x, **arguments(kind)), layer, block.parallel)
    mlp = layer.mlp
    layer.mlp = Beside(mlp, adapter, adapter.scale if isinstance(adapter, fastadapt.LoCA) else 1.0)
    y = layer(x, **arguments(kind))
    layer.mlp = mlp  # the layer's parameters in their order
    torch.testing.assert_close(found, gradients(y, layer, adapter), **EXACT)
    torch.testing.assert_close(dict(block.parallel.named_buffers()), dict(adapter.named_buffers()), **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
def test_bert_with_mappers_adapter(recompute):
    layer, adapter = build("bert"), randomised(fastadapt.DynamicPriorAdapter(WIDTH, 12, 6))
    x, prior = torch.randn(BATCH, TOKENS, WIDTH).double(), torch.randn(BATCH, TOKENS, 12).double()
    given = arguments("bert")
    a = layer.attention(x, given["attention_mask"])[0]
    expected = gradients(layer(x, **given) + adapter(a, prior), layer, adapter)
    block = fastadapt.FrozenBlock.from_transformers(layer, after=adapter, recompute=recompute)
    torch.testing.assert_close(gradients(block(x, **given, prior=prior), layer, adapter), expected, **EXACT)


def test_detrs_positions_and_layers_that_no_block_is_made_of():
    layer = build("detr")
    given = arguments("detr")
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    block = fastadapt.FrozenBlock.from_transformers(layer)
    torch.testing.assert_close(block(x, position=given["spatial_position_embeddings"]), layer(x, **given), **EXACT)
    layer.dropout = 0.5
    with pytest.raises(ValueError, match="dropped with probabilities 0.5 and 0.0"):
        fastadapt.FrozenBlock.from_transformers(layer)
    with pytest.raises(ValueError, match="layer: expected an encoder layer of CLIP.* got Linear is no layer of a known family"):
        fastadapt.FrozenBlock.from_transformers(nn.Linear(2, 2))


def test_arguments_that_a_block_cannot_serve():
    layer = build("bert")
    fuse_layer(layer)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    assert call_of(layer, x, None, encoder_hidden_states=x) == "called with encoder_hidden_states"
    assert call_of(layer, x, None, x) == "called with further arguments"
    assert "four dimensions" in call_of(layer, x, torch.ones(BATCH, TOKENS))
    assert call_of(layer, x.float(), None) == "q: x is torch.float32, the weight torch.float64"
    for name in ("attention_mask", "past_key_values"):
        assert not isinstance(call_of(layer, x, **{name: None}), str)


def test_attention_weights_that_are_asked_for():
    close = {"rtol": 1e-6, "atol": 1e-6}  # their attention takes the softmax in float32
    config = ViTConfig(**SIZES, num_hidden_layers=2, image_size=8, patch_size=4, attn_implementation="eager")
    torch.manual_seed(0)
    model = ViTModel(config).double().requires_grad_(False).eval()
    fused = fastadapt.fuse(copy.deepcopy(model))
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    asked = {"output_attentions": True, "output_hidden_states": True}
    for options in (asked, {}, {"output_hidden_states": True}):
        torch.testing.assert_close(fused(pixels, **options).to_tuple(), model(pixels, **options).to_tuple(), **close)
    served = [row.path for row in fastadapt.explain(fused).blocks]
    assert served == ["fastadapt frozen block"] * 2  # though the hooks that collected the weights are still there


@every_kind
def test_eager_attention_means_the_same(kind):
    layer = build(kind, attention="eager")
    given = arguments(kind)
    if given["attention_mask"] is not None:  # transformers' masks for it are added
        bias = torch.zeros(given["attention_mask"].shape, dtype=torch.float64)
        given["attention_mask"] = bias.masked_fill(~given["attention_mask"], torch.finfo(torch.float32).min)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    given.pop("is_causal", None)
    expected = layer(x, **given)
    fuse_layer(layer)
    assert not isinstance(call_of(layer, x, **given), str)
    torch.testing.assert_close(layer(x, **given), expected, rtol=1e-6, atol=1e-6)  # theirs takes the softmax in float32


def test_a_float_mask_keeps_its_meaning_in_sixteen_bits():
    layer = build("bert", lora=False, dtype=torch.bfloat16)
    x = torch.randn(BATCH, TOKENS, WIDTH).bfloat16()
    mask = torch.zeros(BATCH, 1, TOKENS, TOKENS)
    mask[1] = torch.finfo(torch.float32).min  # a row without a key left: transformers' own gives it the mean
    fuse_layer(layer)
    assert layer(x, mask).isfinite().all()


def test_fuse_explain_and_unfuse_a_model():
    config = ViTConfig(**SIZES, num_hidden_layers=2, image_size=8, patch_size=4)
    model = ViTModel(config).requires_grad_(False)
    with pytest.raises(ValueError, match="encoder layers of transformers' CLIP.*got a Linear with neither"):
        fastadapt.fuse(nn.Linear(2, 2))
    classes, names = [type(module) for module in model.modules()], list(model.state_dict())
    assert {row.reason for row in fastadapt.explain(model).blocks} == {"fastadapt.fuse(model) would fuse it"}
    assert fastadapt.fuse(fastadapt.fuse(model)) is model
    assert list(model.state_dict()) == names
    assert isinstance(model.layers[0], ViTLayer) and type(model.layers[0]).__name__ == "FusedViTLayer"
    text = str(fastadapt.explain(model))
    assert "2 of 2 blocks run fused" in text and "layers.1  FusedViTLayer" in text
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model.layers[0])))
    assert type(twin) is type(model.layers[0])
    x = torch.randn(1, 3, WIDTH)
    torch.testing.assert_close(twin(x), model.layers[0](x))
    fastadapt.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
