"""The computation of a frozen block, kept for the backward or run anew there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastadapt import frozen_group
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.philox import draw_seeds, threshold
from fastadapt.modules import attention_state
from fastadapt.modules.adapters import BottleneckAdapter
from fastadapt.modules.frozen_parts import Member, Parts, Tensors
from fastadapt.modules.loca import LoCA

# the places of a block that drop something, in the order of the seeds that a call draws for them
SITES = ("qkv", "v", "out", "branch1", "fc1", "fc2", "branch2")
Seeds = dict[str, "Tensor | None"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """The tensors of a call: x, what is added for q and k, and what `after` reads."""

    x: Tensor
    position: Tensor | None = None
    prior: Tensor | None = None


class Adapters(NamedTuple):
    """The modules beside a block's own: see FrozenBlock."""

    parallel: nn.Module | None = None
    after: nn.Module | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return [p for module in self if module is not None for p in module.parameters() if p.requires_grad]

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for module in self if module is not None for buffer in module.buffers()]


def run_block(
    parts: Parts,
    tensors: Tensors,
    inputs: Inputs,
    mask: Tensor | None,
    causal: bool,
    adapters: Adapters,
    recompute: bool,
) -> Tensor:
    """FrozenBlock's output; the stream has the compute dtype."""
    dtype = autocast_dtype(inputs.x)
    if dtype is not None:
        position = inputs.position
        inputs = inputs._replace(x=inputs.x.to(dtype), position=None if position is None else position.to(dtype))
    seeds: Seeds = dict.fromkeys(SITES)
    if tensors.drops or threshold(parts.dropout1) or threshold(parts.dropout2):
        seeds = dict(zip(SITES, draw_seeds(inputs.x.device, len(SITES))))
    if mask is not None and mask.dtype is not torch.bool and mask.dtype is not inputs.x.dtype:
        mask = mask.to(inputs.x.dtype).clamp(min=torch.finfo(inputs.x.dtype).min)  # what was finite stays so
    run = partial(_block, parts, tensors, adapters, seeds)
    p = parts.attention_dropout
    attention = partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=p, is_causal=causal)
    if not recompute or not torch.is_grad_enabled() or (mask is not None and mask.requires_grad):
        return run(inputs, attention)
    if torch.compiler.is_compiling():
        return checkpoint(run, inputs, attention, use_reentrant=False)
    bias = None if mask is None and not causal else _bias(mask, inputs.x)
    trained = [*tensors.trained, *adapters.parameters]
    return _Rerun.apply(run, bias, p, adapters.buffers, trained, *inputs, *trained)


def _block(
    parts: Parts, tensors: Tensors, adapters: Adapters, seeds: Seeds, inputs: Inputs, attention: Attention
) -> Tensor:
    x = inputs.x
    norm1 = _norm(parts.norm1)
    qkv = _queries_keys_values(tensors.attention, seeds, inputs, norm1 if parts.pre_norm else {})
    heads = [t.view(*x.shape[:2], parts.heads, t.shape[-1] // parts.heads).transpose(1, 2) for t in qkv]
    attended = attention(*heads).transpose(1, 2).flatten(2)
    (branch,) = _linears(attended, (tensors.out,), seeds["out"]).outputs
    norm = _norm(parts.norm2) if parts.pre_norm else norm1
    normed = not parts.pre_norm or adapters.parallel is not None
    branching = _branching(branch, parts.scale1, parts.dropout1, seeds["branch1"])
    middle = _linears(x, (tensors.fc1,), seeds["fc1"], **norm, **branching, return_normed=normed)
    stream, n = middle.total if parts.pre_norm else middle.normed, middle.normed
    (branch,) = _linears(*middle.outputs, (tensors.fc2,), seeds["fc2"], prologue=parts.activation).outputs
    if isinstance(adapters.parallel, LoCA) and parts.scale2 is not None and not threshold(parts.dropout2):
        return adapters.parallel(n, layer_scale=parts.scale2, mlp=branch, residual=stream)
    branch = _beside(adapters.parallel, n, branch)
    branching = _branching(branch, parts.scale2, parts.dropout2, seeds["branch2"])
    if not parts.pre_norm:
        y = frozen_group(stream, **_norm(parts.norm2), **branching, return_normed=True).normed
        return y if adapters.after is None else adapters.after(n, inputs.prior, residual=y)
    if parts.scale2 is None and not threshold(parts.dropout2):
        return stream + branch
    return frozen_group(stream, **branching).total


def _queries_keys_values(
    members: Sequence[Member], seeds: Seeds, inputs: Inputs, norm: dict[str, Any]
) -> Sequence[Tensor]:
    if inputs.position is None:
        return _linears(inputs.x, members, seeds["qkv"], **norm).outputs
    if norm:  # the position is added to what the norm returns
        n = frozen_group(inputs.x, **norm, return_normed=True).normed
        inputs = inputs._replace(x=n)
    queries_keys = _linears(inputs.x + inputs.position, members[:2], seeds["qkv"]).outputs
    return (*queries_keys, *_linears(inputs.x, members[2:], seeds["v"]).outputs)


def _linears(x: Tensor, members: Sequence[Member], seed: Tensor | None, **around: Any) -> Any:
    weights, biases, lora_as, lora_bs, scales, dropouts = zip(*members)
    dropout_p = max([p for p, lora_a in zip(dropouts, lora_as) if lora_a is not None], default=0.0)
    return frozen_group(x, weights, biases, lora_as, lora_bs, scales=scales, dropout_p=dropout_p, seed=seed, **around)


def _norm(norm: nn.LayerNorm) -> dict[str, Any]:
    return {"prologue": "layer_norm", "norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


def _branching(branch: Tensor, scale: Tensor | None, p: float, seed: Tensor | None) -> dict[str, Any]:
    return {"branch": branch, "branch_scale": scale, "branch_dropout_p": p, "branch_seed": seed}


def _beside(parallel: nn.Module | None, n: Tensor | None, branch: Tensor) -> Tensor:
    """The MLP's output and that of the adapter beside it."""
    if parallel is None:
        return branch
    if isinstance(parallel, BottleneckAdapter):
        return parallel(n, residual=branch)
    return branch + (parallel.scale * parallel(n) if isinstance(parallel, LoCA) else parallel(n))


def _bias(mask: Tensor | None, x: Tensor) -> Tensor:
    """What is added to the scores, for the kernels that give out what they leave: a causal mask where there is no other."""
    length = x.shape[1]
    shape = (1, 1, length, length) if mask is None else mask.expand(*[1] * (4 - mask.ndim), *mask.shape).shape
    keep = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() if mask is None else mask
    if keep.dtype is not torch.bool:
        return keep.view(shape)
    aligned = torch.zeros(*shape[:-1], -(-shape[-1] // 16) * 16, dtype=x.dtype, device=x.device)
    return aligned[..., : shape[-1]].masked_fill_(~keep, -math.inf)


class _Rerun(torch.autograd.Function):
    """A block of which the input, the attention's output and what its kernel left are kept, and the rest is run anew."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Inputs, Attention], Tensor],
        bias: Tensor | None,
        p: float,
        buffers: Sequence[Tensor],
        trained: Sequence[Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        left: list[Tensor] = []

        def attention(*heads: Tensor) -> Tensor:
            output, state = attention_state.forward(*heads, bias, p)
            left.extend((output, *state))
            return output

        inputs = Inputs(*tensors[: len(Inputs._fields)])
        y = run(inputs, attention)
        ctx.run, ctx.bias, ctx.p, ctx.buffers, ctx.trained = run, bias, p, buffers, trained
        kind = "cpu" if inputs.x.device.type == "meta" else inputs.x.device.type
        enabled = torch.is_autocast_enabled(kind)
        ctx.autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=enabled)
        ctx.save_for_backward(*inputs, *left, *trained)  # the last so that autograd sees if one was changed since
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fields = len(Inputs._fields)
        saved = ctx.saved_tensors[: len(ctx.saved_tensors) - len(ctx.trained)]
        given, (output, *state) = saved[:fields], saved[fields:]
        needs = ctx.needs_input_grad[5:]
        inputs = Inputs(
            *(None if t is None else t.detach().requires_grad_(need) for t, need in zip(given, needs))
        )
        before = [buffer.clone() for buffer in ctx.buffers]
        with torch.enable_grad(), ctx.autocast():
            y = ctx.run(inputs, lambda *heads: _Attended.apply(*heads, output, ctx.bias, ctx.p, *state))
        for buffer, value in zip(ctx.buffers, before):  # running statistics have seen this batch once already
            buffer.copy_(value)
        wanted = [t for t, need in zip((*inputs, *ctx.trained), needs) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return (None,) * 5 + tuple(next(found) if need else None for need in needs)


class _Attended(torch.autograd.Function):
    """Attention that has been computed before: its output, and its backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, output: Tensor, bias: Tensor | None, p: float, *state: Tensor
    ) -> Tensor:
        ctx.bias, ctx.p = bias, p
        ctx.save_for_backward(q, k, v, output, *state)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *state = ctx.saved_tensors
        grads = attention_state.backward(grad, q, k, v, ctx.bias, ctx.p, output, tuple(state))
        return (*grads, None, None, None, *(None for _ in state))
