"""FrozenBlock with LoRA and adapters inside against the equations in torch's own modules, in float64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastadapt
from bench.memory import saved_bytes
from fastadapt import BottleneckAdapter, DynamicPriorAdapter, FrozenBlock, LoCA, LoraLinear
from fastadapt.core.philox import draw_seeds
from fastadapt.modules.attention_state import drop
from fastadapt.modules.frozen_run import SITES
from tests.tolerance import EXACT

WIDTH, HIDDEN, HEADS, BATCH, SIDE = 24, 40, 3, 2, 2
TOKENS = 1 + SIDE * SIDE
PRIOR = 12
GRID = {"loca": (SIDE, SIDE)}
CURVES = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def adapter(kind: str | None) -> nn.Module | None:
    made = {
        None: lambda: None,
        "bottleneck": lambda: BottleneckAdapter(WIDTH, 6, norm=True, scale=0.3),
        "loca": lambda: LoCA(WIDTH, 8),
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "dypa": lambda: DynamicPriorAdapter(WIDTH, PRIOR, 6),
    }
    return made[kind]()


def build(
    *, pre_norm: bool = True, layer_scale: bool = False, parallel: str | None = None, after: str | None = None,
    lora: bool = True, **options,
) -> FrozenBlock:  # fmt: skip
    torch.manual_seed(0)
    widths = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    widths |= {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
    linears = {name: nn.Linear(*sizes) for name, sizes in widths.items()}
    if lora:  # all but k, as is usual
        linears = {n: m if n == "k" else LoraLinear.from_linear(m, r=4, lora_alpha=6) for n, m in linears.items()}
    scales = {f"scale{i}": torch.rand(WIDTH) for i in (1, 2)} if layer_scale else {}
    block = FrozenBlock(
        norm1=nn.LayerNorm(WIDTH), norm2=nn.LayerNorm(WIDTH), **linears, **scales, heads=HEADS, pre_norm=pre_norm,
        parallel=adapter(parallel), after=adapter(after), **options,
    )  # fmt: skip
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    for module in (block.norm1, block.norm2, block.k, *([] if lora else linears.values())):
        module.requires_grad_(False)
    return block.double().train()


def composed(block: FrozenBlock, x: Tensor, mask=None, *, is_causal=False, position=None, prior=None) -> Tensor:
    """The equations of FrozenBlock's docstring, the dropout masks by the seeds that the block draws."""
    seeds = dict(zip(SITES, draw_seeds(x.device, len(SITES)))) if block.training and block.dropout else {}
    norm1, norm2 = block.norm1, block.norm2
    n = norm1(x) if block.pre_norm else x
    shifted = n if position is None else n + position
    heads = ((block.q, shifted), (block.k, shifted), (block.v, n))
    q, k, v = (layer(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, t in heads)
    branch = block.out(F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2).flatten(2))
    one, two = (1.0 if scale is None else scale for scale in (block.scale1, block.scale2))
    s = x + one * drop(branch, block.dropout, seeds.get("branch1"))
    s = s if block.pre_norm else norm1(s)
    n = norm2(s) if block.pre_norm else s
    branch = block.fc2(CURVES[block.activation](block.fc1(n)))
    if block.parallel is not None:
        branch = branch + (block.parallel.scale if isinstance(block.parallel, LoCA) else 1.0) * block.parallel(n)
    y = s + two * drop(branch, block.dropout, seeds.get("branch2"))
    y = y if block.pre_norm else norm2(y)
    return y if block.after is None else y + block.after(n, prior)


def step(function, block: FrozenBlock, **inputs: Tensor | None) -> dict[str, Tensor]:
    """Output, gradients of the inputs and of everything that trains, and the buffers afterwards."""
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.manual_seed(3)
    y = function(x, **inputs)
    wanted = {"x": x} | {n: p for n, p in block.named_parameters() if p.requires_grad}
    wanted |= {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), torch.linspace(-3, 3, y.numel(), dtype=y.dtype).view(y.shape).cos())
    return {"y": y.detach()} | dict(zip(wanted, grads)) | {n: b.clone() for n, b in block.named_buffers()}


def tensors(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    widths = {"position": WIDTH, "prior": PRIOR}
    made = {name: torch.randn(BATCH, TOKENS, width, generator=generator, dtype=torch.float64) for name, width in widths.items()}
    return {name: made[name].requires_grad_() for name in names}


BLOCKS = {
    "pre-LN": ({}, ()),
    "no LoRA": ({"lora": False}, ()),
    "quick_gelu": ({"activation": "quick_gelu"}, ()),
    "gelu_tanh, layer scale": ({"activation": "gelu_tanh", "layer_scale": True}, ()),
    "dropout": ({"dropout": 0.3}, ()),
    "dropout, layer scale, bottleneck": ({"dropout": 0.3, "layer_scale": True, "parallel": "bottleneck"}, ()),
    "bottleneck": ({"parallel": "bottleneck"}, ()),
    "any module": ({"parallel": "linear"}, ()),
    "LoCA": ({"parallel": "loca"}, ()),
    "LoCA, layer scale": ({"parallel": "loca", "layer_scale": True}, ()),
    "LoCA, layer scale, dropout": ({"parallel": "loca", "layer_scale": True, "dropout": 0.2}, ()),
    "position": ({}, ("position",)),
    "post-LN": ({"pre_norm": False, "activation": "relu"}, ("position",)),
    "post-LN, dropout": ({"pre_norm": False, "dropout": 0.3}, ()),
    "post-LN, bottleneck": ({"pre_norm": False, "parallel": "bottleneck"}, ()),
    "DyPA": ({"pre_norm": False, "after": "dypa"}, ("prior",)),
    "DyPA, dropout": ({"pre_norm": False, "after": "dypa", "dropout": 0.2}, ("prior",)),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients(kind, recompute):
    options, names = BLOCKS[kind]
    block = build(**options, recompute=recompute)
    twin = copy.deepcopy(block)
    expected = step(partial(composed, twin), twin, **tensors(*names))
    torch.testing.assert_close(step(block, block, **tensors(*names)), expected, **EXACT)


MASKS = {
    "bool": torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool).logical_and(torch.arange(TOKENS) < 3),
    "a bool for every pair": torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.8,
    "added": torch.randn(BATCH, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("recompute", [False, True])
def test_masks(mask, recompute):
    block = build(recompute=recompute)
    given = MASKS[mask].clone()
    if mask != "added":
        given[..., 0] = True
    expected = step(partial(composed, block), block, mask=given)
    torch.testing.assert_close(step(block, block, attention_mask=given), expected, **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_mask_with_a_gradient(recompute):
    block = build(recompute=recompute)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    found = []
    for function, name in ((partial(composed, block), "mask"), (block, "attention_mask")):
        mask = MASKS["added"].clone().requires_grad_()
        found += torch.autograd.grad(function(x, **{name: mask}).square().sum(), mask)
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_factor_changed_before_the_backward_is_an_error(recompute):
    block = build(recompute=recompute)
    y = block(torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64))
    with torch.no_grad():
        next(parameter for parameter in block.parameters() if parameter.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_query_sees_no_later_key(recompute):
    block = build(recompute=recompute)
    expected = step(partial(composed, block), block, is_causal=True)
    torch.testing.assert_close(step(block, block, is_causal=True), expected, **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_without_a_graph_break(recompute):
    torch.compiler.reset()
    block = build(parallel="bottleneck", dropout=0.2, layer_scale=True, recompute=recompute)
    expected = step(block, block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, block), expected, **EXACT)


def test_merged_lora_and_no_gradients():
    block = build().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    expected = block(x)
    for linear in block.modules():
        if isinstance(linear, LoraLinear):
            linear.merge()
    torch.testing.assert_close(block(x), expected, **EXACT)
    with torch.no_grad():
        assert not block(x).requires_grad
    block.requires_grad_(True)
    with torch.no_grad():  # then nothing trains
        torch.testing.assert_close(block(x), expected, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected, **EXACT)


def test_what_is_kept():
    """s, q, k, v, attention's output, h, and with LoRA a product a linear: nothing that P makes."""
    stream, rows = 8 * BATCH * TOKENS * WIDTH, BATCH * TOKENS
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)

    def kept(block: FrozenBlock) -> int:
        return saved_bytes(lambda: block(x), exclude=[x, *block.parameters()])

    statistics = 4 * 2 * rows * HEADS  # attention's, in float64
    frozen = 5 * stream + 8 * rows * HIDDEN + statistics
    assert kept(build(lora=False)) == frozen
    assert kept(build()) == frozen + 5 * 8 * rows * 4
    assert kept(build(recompute=True)) == stream + statistics


WRONG = {
    "after": (lambda: build(after="dypa"), "after: expected None in a pre-LN block, got DynamicPriorAdapter"),
    "scale": (lambda: build(pre_norm=False, layer_scale=True), "scale1 and scale2: expected None in a post-LN block"),
    "dropout": (lambda: build(dropout=1.0), "dropout: expected a number p"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_blocks_are_refused(wrong):
    make, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_calls_are_refused():
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x: expected shape \(any, any, 24\)"):
        build()(x[..., 1:])
    block = build()
    block.heads = 5
    with pytest.raises(ValueError, match="heads: expected a divisor of q's width 24, got 5"):
        block(x)
    block = build()
    block.k.weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen linears and norms, with or without LoRA, got k: trains"):
        block(x)
    block = build()
    block.activation = "tanh"
    with pytest.raises(ValueError, match="prologue: expected one of"):
        block(x)
    with pytest.raises(ValueError, match="q: x is torch.float32, the weight torch.float64"):
        build()(x.float())


def test_public_name():
    assert fastadapt.FrozenBlock is FrozenBlock
    assert "heads=3, activation='gelu', pre_norm=True" in repr(build())
