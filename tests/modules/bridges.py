"""Small cross-modal bridges, what goes into them, and their equations in torch's own functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import CrossModalBridges

B, L, T, DIM, TEXT, HEADS = 3, 7, 5, 16, 6, 4
SMALL = {"dim": DIM, "text_dim": TEXT, "num_tokens": T, "num_heads": HEADS}


def make(num_bridges: int = 2, dtype: torch.dtype = torch.float64, **options) -> CrossModalBridges:
    return CrossModalBridges(num_bridges, **{**SMALL, "dtype": dtype, **options})


def make_states(n: int = 1, batch: int = B, width: int = TEXT, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Text states as a tower gives them: far from normalised, and larger with depth."""
    return [(1 + i) * torch.randn(batch, T, width, dtype=dtype) + 0.5 for i in range(n)]


def make_h1(batch: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, L, DIM, dtype=dtype)


def plain_text(bridges: CrossModalBridges, i: int, states: list[Tensor]) -> Tensor:
    """t of bridge i, for every sample's own words."""
    if bridges.text_norm:
        states = [F.layer_norm(f, f.shape[-1:]) for f in states]
    if not bridges.adaptive:
        return states[0]
    gated = [f + bridges.token_weight[i, :, s] * f for s, f in enumerate(states)]
    return F.linear(torch.cat(gated, -1), bridges.gate_weight[i].T, bridges.gate_bias[i])


def plain_visual(bridges: CrossModalBridges, i: int, h1: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    """h2 of bridge i."""
    side, dim = bridges[i], h1.shape[-1]
    k = F.linear(t, bridges.kv_weight[i, :, :dim].T, bridges.kv_bias[i, :dim])
    v = F.linear(t, bridges.kv_weight[i, :, dim:].T, bridges.kv_bias[i, dim:])
    q = side.q_proj(F.layer_norm(h1, (dim,), side.norm.weight, side.norm.bias, 1e-5))
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None], -math.inf)
    hidden = side.fc1(side.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    return h1 + side.fc2(hidden * torch.sigmoid(1.702 * hidden))


def plain(bridges, h1: Tensor, states: list[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    return [plain_visual(bridges, i, h1, plain_text(bridges, i, states), mask) for i in range(len(bridges))]


def run(bridges, h1: Tensor, states, mask: Tensor | None = None) -> list[Tensor]:
    text = bridges.encode_text(states, mask)
    return [bridges[i](h1, text[i]) for i in range(len(bridges))]


def with_gradients(function, bridges, h1: Tensor, states: list[Tensor], *args) -> dict[str, Tensor]:
    """Outputs of all bridges and the gradients of h1, of the states and of every parameter."""
    h1, states = h1.detach().requires_grad_(), [f.detach().requires_grad_() for f in states]
    wanted = {"h1": h1, **{f"states[{i}]": f for i, f in enumerate(states)}, **dict(bridges.named_parameters())}
    outputs = torch.stack(function(bridges, h1, states, *args))
    grad = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape).sin().to(outputs.dtype)
    grads = torch.autograd.grad(outputs, list(wanted.values()), grad)
    return {"h2": outputs.detach(), **dict(zip(wanted, grads))}
