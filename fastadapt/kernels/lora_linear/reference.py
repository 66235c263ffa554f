"""LoRA linear in plain torch, forward and backward: the specification, the CPU path and the oracle of the tests.

For each member g of a group that reads the same x (one member: lora_linear itself),

    s_g = m_g(x) A_g^T                                    m_g: dropout's 0/1 mask, no rescaling
    y_g = x W_g^T + b_g + alpha_g s_g B_g^T               alpha_g = scale_g / (1 - p)

and, with dy_g and (when the backward is differentiated) ds_g the gradients of y_g and s_g,

    d_g  = alpha_g dy_g B_g + ds_g
    dx   = sum_g dy_g W_g + m_g(d_g A_g)
    dA_g = d_g^T m_g(x)         dB_g = alpha_g dy_g^T s_g         dW_g = dy_g^T x         db_g = sum_rows dy_g

(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3.)  Weights of another dtype than x are
cast to x's where they are used; every gradient has its tensor's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.core import philox

HEAD = 2  # tensors before the members' own: x and seed
EACH = 4  # tensors of a member: weight (N, K), bias (N,) or None, lora_a (r, K), lora_b (N, r)


def members(flat: Sequence[Any]) -> list[tuple]:
    """(weight, bias, lora_a, lora_b) of each member of a flat list (x, seed, weight, bias, lora_a, lora_b, weight, ...)."""
    return [tuple(flat[i : i + EACH]) for i in range(HEAD, len(flat), EACH)]


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in `dtype`; no call to torch where it is that already."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def flat_rows(tensor: Tensor) -> Tensor:
    """`tensor` as (rows, width), a view wherever its strides allow one."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def dropped(x: Tensor, seed: Tensor | None, p: float, member: int) -> Tensor:
    """m_g(x); x itself when there is no dropout."""
    return x if seed is None else philox.masked(x, seed, p, member)


def forward(tensors: Sequence[Tensor | None], scales: Sequence[float], dropout_p: float) -> list[Tensor]:
    """[y_0, ..., s_0, ...]: outputs (..., N_g), then low-rank products (rows, r_g), in x's dtype."""
    x, seed = tensors[:HEAD]
    rows, dtype = flat_rows(x), x.dtype
    outputs, products = [], []
    for g, (weight, bias, lora_a, lora_b) in enumerate(members(tensors)):
        product = F.linear(dropped(rows, seed, dropout_p, g), cast(lora_a, dtype))
        y = F.linear(rows, cast(weight, dtype), cast(bias, dtype))
        y.addmm_(product, cast(lora_b, dtype).t(), alpha=scales[g] * philox.inv_keep(dropout_p))
        outputs.append(y if rows is x else y.view(*x.shape[:-1], y.shape[-1]))
        products.append(product)
    return outputs + products


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The flat list itself with x left out where no gradient reads it, and the low-rank products that one does.

    x is read by the gradients of weight and lora_a, a member's product by that of its lora_b.
    """
    weight, lora_a, lora_b = (needs[HEAD + i :: EACH] for i in (0, 2, 3))
    products = outputs[len(outputs) // 2 :]
    x = tensors[0] if True in weight or True in lora_a else None
    return [x, *tensors[1:], *(s if need else None for s, need in zip(products, lora_b))]


def split_saved(saved: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The flat list (x, seed, members' tensors) and the low-rank products of what `save` kept."""
    end = HEAD + (len(saved) - HEAD) // (EACH + 1) * EACH
    return saved[:end], saved[end:]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    scales: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    """The gradients that `needs` marks, in the order of the flat list; differentiable again.

    grads: dy_g for each member, then ds_g or None for each.
    """
    flat, products = split_saved(saved)
    x, seed = flat[:HEAD]
    dtype = grads[0].dtype
    dx = None
    wanted = []
    for g, ((weight, bias, lora_a, lora_b), need) in enumerate(zip(members(flat), members(needs))):
        dy, ds = flat_rows(grads[g]), grads[len(products) + g]
        need_weight, need_bias, need_a, need_b = need
        alpha = scales[g] * philox.inv_keep(dropout_p)
        if needs[0] or need_a:
            # d = factor * low: the factor costs nothing where low is multiplied
            low, factor = dy @ cast(lora_b, dtype), alpha
            if ds is not None:
                low, factor = alpha * low + ds, 1.0
        if needs[0]:
            frozen, down = cast(weight, dtype), cast(lora_a, dtype)
            dx = dy @ frozen if dx is None else dx.addmm_(dy, frozen)
            if seed is None:
                dx.addmm_(low, down, alpha=factor)
            else:
                dx.add_(dropped(low @ down, seed, dropout_p, g), alpha=factor)
        if need_weight:
            wanted.append(cast(dy.t() @ flat_rows(x), weight.dtype))
        if need_bias:
            wanted.append(cast(dy.sum(0), bias.dtype))
        if need_a:
            wanted.append(scaled_product(low, dropped(flat_rows(x), seed, dropout_p, g), factor, lora_a))
        if need_b:
            wanted.append(scaled_product(dy, products[g], alpha, lora_b))
    return wanted if dx is None else [dx.view(*grads[0].shape[:-1], dx.shape[-1]), *wanted]


def scaled_product(left: Tensor, right: Tensor, alpha: float, like: Tensor) -> Tensor:
    """alpha * left^T right in `like`'s dtype."""
    # beta = 0: `like` gives its shape and is not read
    return cast(torch.addmm(cast(like, left.dtype), left.t(), right, beta=0, alpha=alpha), like.dtype)
