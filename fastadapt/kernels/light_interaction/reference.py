"""Light interaction in plain torch, forward and backward: the specification, the CPU path and the oracle of the tests.

Two directions, each with weights of its own, read the same x (B, Tx, d) and y (B, Ty, d):

    x' = x o A_0(x, y)          y' = y o A_1(y, x)

where A(s, t) is multi-head attention with queries from s and keys and values from t.  With t's masked rows set to zero,

    q = s Wq^T + bq             k = t Wk^T + bk             v = t Wv^T + bv
    P_h = softmax(c q_h k_h^T)  over the keys, zero where they are masked;  c = head width ** -0.5
    o_h = P_h v_h               a = o Wo^T + bo             out = s o a

and, with dout the gradient of out,

    da = dout o s               do = da Wo
    dP_h = do_h v_h^T           dS_h = c P_h o (dP_h - rowsum(P_h o dP_h))
    dq_h = dS_h k_h             dk_h = dS_h^T q_h           dv_h = P_h^T do_h
    ds = dout o a + dq Wq       dt = dk Wk + dv Wv          dt is zero in masked rows
    dWq = dq^T s                dWk = dk^T t                dWv = dv^T t          dWo = da^T o
    db* = column sums of d*

(Xu et al., "Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image Segmentation", ICCV 2023,
section 3.2, with the attention of Vaswani et al., "Attention Is All You Need", NeurIPS 2017.)  Only words, the rows of y, can
be masked.  Weights of another dtype than x are cast to x's where they are used; every gradient has its tensor's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD = 3  # tensors before the directions' own: x, y and the mask
EACH = 4  # tensors of a direction


class Direction(NamedTuple):
    """What belongs to one direction: its tensors, or for each of them whether its gradient is wanted."""

    in_weight: Any  # (3d, d): Wq, Wk and Wv, one after another
    in_bias: Any  # (3d,)
    out_weight: Any  # (d, d)
    out_bias: Any  # (d,)


def directions(flat: Sequence[Any]) -> tuple[Direction, Direction]:
    """Both directions of a flat list (x, y, mask, in_weight, in_bias, out_weight, out_bias, in_weight, ...)."""
    first, second = flat[HEAD : HEAD + EACH], flat[HEAD + EACH : HEAD + 2 * EACH]
    return Direction(*first), Direction(*second)


def unmasked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`tensor` (B, T, d) with zeros in the masked rows, so that what is there, be it NaN, reaches nothing."""
    return tensor if mask is None else tensor.masked_fill(mask[..., None], 0.0)


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(B, T, d) as (B, heads, T, d / heads)."""
    return tensor.unflatten(-1, (num_heads, tensor.shape[-1] // num_heads)).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """(B, heads, T, d / heads) as (B, T, d)."""
    return tensor.transpose(1, 2).flatten(2)


class Attention(NamedTuple):
    """One direction's attention: heads split (B, heads, T, d / heads), except `context`, o (B, T, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: Tensor
    context: Tensor
    scale: float


def attend(source: Tensor, target: Tensor, mask: Tensor | None, weights: Direction, num_heads: int) -> Attention:
    """Queries of source over keys and values of target, whose masked rows (B, T) are zero already."""
    width, dtype = source.shape[-1], source.dtype
    in_weight, in_bias = weights.in_weight.to(dtype), weights.in_bias.to(dtype)
    query = split_heads(F.linear(source, in_weight[:width], in_bias[:width]), num_heads)
    key, value = (
        split_heads(part, num_heads) for part in F.linear(target, in_weight[width:], in_bias[width:]).chunk(2, -1)
    )
    scale = (width // num_heads) ** -0.5
    scores = (query * scale) @ key.transpose(-2, -1)
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    if mask is None:
        probabilities = torch.softmax(scores, -1)
    else:
        columns = mask[:, None, None, :]
        # the second fill is for samples whose keys are all masked, where softmax is NaN
        probabilities = torch.softmax(scores.masked_fill(columns, -torch.inf), -1).masked_fill(columns, 0.0)
    probabilities = probabilities.to(dtype)
    return Attention(query, key, value, probabilities, merge_heads(probabilities @ value), scale)


def forward(tensors: Sequence[Tensor | None], num_heads: int) -> list[Tensor]:
    """[x', y'] in x's dtype."""
    x, y, mask = tensors[:HEAD]
    over_words, over_image = directions(tensors)
    pairs = ((x, unmasked(y, mask), mask, over_words), (y, x, None, over_image))
    outputs = []
    for source, target, keys_mask, weights in pairs:
        context = attend(source, target, keys_mask, weights, num_heads).context
        outputs.append(source * F.linear(context, weights.out_weight.to(x.dtype), weights.out_bias.to(x.dtype)))
    return outputs


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The flat list and whatever the forward returns beside x' and y'; nothing that has a number for each query and key."""
    return [*tensors, *outputs[2:]]


def backward(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool], num_heads: int
) -> list[Tensor]:
    """The gradients that `needs` marks, in the order of the flat list; differentiable again.

    The attention is computed again from the flat list; what else was saved is not read.
    """
    x, y, mask = saved[:HEAD]
    (over_words, over_image), (need_words, need_image) = directions(saved), directions(needs)
    need_x, need_y = needs[:2]
    words = unmasked(y, mask)
    dx, dwords, first = direction_backward(x, words, mask, over_words, grads[0], (need_x, need_y), need_words, num_heads)
    dy, dimage, second = direction_backward(y, x, None, over_image, grads[1], (need_y, need_x), need_image, num_heads)
    wanted = [dx + dimage] if need_x else []
    if need_y:
        wanted.append(dy + unmasked(dwords, mask))
    return wanted + first + second


def direction_backward(
    source: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weights: Direction,
    grad: Tensor,
    needs: tuple[bool, bool],
    need: Direction,
    num_heads: int,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of source and target, as `needs` marks them, and the list of those of the weights, as `need` does."""
    if not any((*needs, *need)):
        return None, None, []
    width, dtype = source.shape[-1], source.dtype
    attention = attend(source, target, mask, weights, num_heads)
    in_weight, out_weight = weights.in_weight.to(dtype), weights.out_weight.to(dtype)
    dprojected = grad * source
    dsource = dtarget = None
    wanted = []
    if any((*needs, need.in_weight, need.in_bias)):
        dquery, dkeys = attention_backward(attention, split_heads(dprojected @ out_weight, num_heads))
        if needs[0]:
            projected = F.linear(attention.context, out_weight, weights.out_bias.to(dtype))
            dsource = grad * projected + dquery @ in_weight[:width]
        if needs[1]:
            dtarget = dkeys @ in_weight[width:]
        if need.in_weight:
            wanted.append(torch.cat((product(dquery, source), product(dkeys, target))).to(weights.in_weight.dtype))
        if need.in_bias:
            wanted.append(torch.cat((dquery.sum((0, 1)), dkeys.sum((0, 1)))).to(weights.in_bias.dtype))
    if need.out_weight:
        wanted.append(product(dprojected, attention.context).to(weights.out_weight.dtype))
    if need.out_bias:
        wanted.append(dprojected.sum((0, 1)).to(weights.out_bias.dtype))
    return dsource, dtarget, wanted


def attention_backward(attention: Attention, dcontext: Tensor) -> tuple[Tensor, Tensor]:
    """dq (B, Ts, d), and dk and dv side by side (B, Tt, 2d), of the gradient of o with its heads split."""
    query, key, value, probabilities, _, scale = attention
    dprobabilities = (dcontext @ value.transpose(-2, -1)).to(torch.promote_types(query.dtype, torch.float32))
    weighted = probabilities * dprobabilities
    dscores = scale * (weighted - probabilities * weighted.sum(-1, keepdim=True))
    dscores = dscores.to(query.dtype)
    dkey = merge_heads(dscores.transpose(-2, -1) @ query)
    dvalue = merge_heads(probabilities.transpose(-2, -1) @ dcontext)
    return merge_heads(dscores @ key), torch.cat((dkey, dvalue), -1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over all rows of (B, T, n) and (B, T, m): (n, m)."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)
