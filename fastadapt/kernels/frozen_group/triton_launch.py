"""The elementwise part of a group of frozen linears in Triton: one launch forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.core import philox
from fastadapt.core.launch import launch
from fastadapt.kernels.frozen_group import config
from fastadapt.kernels.frozen_group import triton_kernel as kernels
from fastadapt.kernels.frozen_group.reference import Branch, Prologue


def forward(prologue: Prologue, branch: Branch, x: Tensor, delta: Tensor | None, apply: bool) -> list[Tensor | None]:
    """[s, n], as reference.forward."""
    made = apply and prologue.kind != "identity"
    total = None if delta is None else new(x)
    normed = new(x) if made else None
    if made or delta is not None:
        start(
            kernels.prologue_kernel, prologue, branch,
            (dense(x), dense(delta), branch.scale, branch.seed, prologue.weight, prologue.bias, total, normed),
            x,
        )  # fmt: skip
    if apply and not made:
        normed = x if total is None else total
    return [total, normed]


def gradients(
    prologue: Prologue,
    branch: Branch,
    s: Tensor | None,
    moments: None,
    dns: Sequence[Tensor],
    ds: Tensor | None,
    need_n: bool,
    need_x: bool,
    need_delta: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """n, ds' and dbranch, those that are needed; dns are at most two parts of dn."""
    like = s if s is not None else ds if ds is not None else dns[0]
    made = prologue.kind != "identity"
    normed = (new(like) if made else s) if need_n else None
    own = need_delta and not branch.plain  # otherwise dbranch is ds'
    given = [grad for grad in (*dns, ds) if grad is not None]
    if not made and len(given) == 1:  # ds' is there already
        dx = given[0]
        given = [None, None, dx]
        stored = None
    else:
        stored = new(like) if need_x or (need_delta and not own) else None
        dx = stored
        given = [*(dense(dn) for dn in dns), *[None] * (2 - len(dns)), dense(ds)]
    d_delta = new(like) if own else None
    if stored is not None or own or (made and need_n):
        start(
            kernels.prologue_grad_kernel, prologue, branch,
            (dense(s) if made else None, branch.scale, branch.seed, prologue.weight, prologue.bias, *given[:2], dense(given[2]),
             normed if made else None, stored, d_delta),
            like,
        )  # fmt: skip
    return normed, dx if need_x else None, (d_delta if own else dx) if need_delta else None


def start(kernel: object, prologue: Prologue, branch: Branch, tensors: tuple, like: Tensor) -> None:
    """The kernel over all tiles of a (rows, width) tensor."""
    rows, width = like.shape
    tiles = config.tiles(width, prologue.kind == "layer_norm")
    launch(
        kernel, (-(-rows // tiles.rows), -(-width // tiles.columns)),
        *tensors, rows, width, prologue.eps, philox.threshold(branch.p), philox.inv_keep(branch.p),
        device=like.device, KIND=prologue.kind, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
        num_stages=1,
    )  # fmt: skip


def new(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def dense(tensor: Tensor | None) -> Tensor | None:
    """`tensor` with its rows one after the other, as the kernels address it."""
    return None if tensor is None else tensor.contiguous()
