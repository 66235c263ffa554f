"""frozen_group: a branch added to the stream, LayerNorm or an activation, and the frozen linears with LoRA that read it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.core.backend import autocast_dtype, choose
from fastadapt.core.casts import frozen_cast
from fastadapt.core.checks import check_dtype, check_input, check_number, check_probability, check_tensor, fail
from fastadapt.core.operation import Operation, Tensors
from fastadapt.core.philox import draw_seed, threshold
from fastadapt.kernels.frozen_group import config, reference
from fastadapt.kernels.frozen_group.reference import PROLOGUES, Branch, Prologue
from fastadapt.kernels.lora_linear.op import operation as lora_linear
from fastadapt.kernels.lora_linear.op import run as lora_linears


class Group(NamedTuple):
    """What `frozen_group` returns: s, None without a branch; n, None unless it was asked for; and y_g of every member."""

    total: Tensor | None
    normed: Tensor | None
    outputs: tuple[Tensor, ...]


def frozen_group(
    x: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor | None] = (),
    lora_as: Sequence[Tensor | None] = (),
    lora_bs: Sequence[Tensor | None] = (),
    *,
    scales: Sequence[float] = (),
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    prologue: str = "identity",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    branch_dropout_p: float = 0.0,
    branch_seed: Tensor | None = None,
    return_normed: bool = False,
    backend: str | None = None,
) -> Group:
    """Add a branch to the stream, apply a frozen prologue, and run several frozen linears on the result, as one operation.

        s = x + c o dropout(branch)
        n = P(s)
        y_g = n W_g^T + b_g + scale_g dropout_g(n) A_g^T B_g^T

    What is kept for the backward is s, and with LoRA the rank-r products: never n, never a dropout mask, and neither of them
    where no gradient reads it.  The backward computes n anew and adds the gradients of n's readers and of s in one pass.

    Args:
        x: (..., K); float32, float16, bfloat16 or float64, any strides.
        weights, biases, lora_as, lora_bs, scales: one entry a member, as in `lora_linear_group`; there may be no member.  A
            member whose lora_a and lora_b are None is the frozen linear alone.  Weights and biases are frozen.
        dropout_p: of LoRA's dropout, 0 <= dropout_p < 1; 0 in eval mode.
        seed: int64 (1,) for its masks; None to draw one.
        prologue: P: "identity", "layer_norm", "relu", "gelu", "gelu_tanh" or "quick_gelu".
        norm_weight, norm_bias, norm_eps: LayerNorm's, frozen: (K,) or None, in x's dtype or float32 (under autocast any).
        branch: like x; None for s = x.
        branch_scale: c (K,), frozen, or None for ones.
        branch_dropout_p, branch_seed: of the branch's dropout, as dropout_p and seed.
        return_normed: whether n is wanted.  Its gradient joins those of the members.
        backend: as for `lora_linear`.

    Returns:
        Group(total=s or None, normed=n or None, outputs=(y_0, ...)), in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or a frozen tensor that requires a gradient.
        BackendError: the backend asked for cannot run this call.

    Gradients reach x, branch and the LoRA factors; none is computed that is not asked for, and where none is, nothing is kept.
    LayerNorm and activations are computed in float32 by the kernels, in x's dtype (LayerNorm: the widest of x's and its
    weight's) by the reference.  Frozen tensors of another dtype than autocast's are cast once (fastadapt.core.casts).
    Deterministic; the masks are a function of the seed.

    Hu et al., "LoRA", ICLR 2022, equation 3, inside the block of Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """
    check_input("x", x)
    compute_dtype = autocast_dtype(x)
    if compute_dtype is not None:
        x = x.to(compute_dtype)
        branch = None if branch is None else branch.to(compute_dtype)
        weights, biases = ([frozen_cast(tensor, compute_dtype) for tensor in each] for each in (weights, biases))
    members = _members(weights, biases, lora_as, lora_bs, scales)
    _check_members(x, members, scales, compute_dtype is not None)
    _check_around(x, prologue, norm_weight, norm_bias, norm_eps, branch, branch_scale, return_normed, compute_dtype is not None)
    bare = [member[2] is None for member in members]  # without LoRA
    dropout_p, seed = _dropout("dropout_p", dropout_p, seed, x, False in bare)
    branch_p, branch_seed = _dropout("branch_dropout_p", branch_dropout_p, branch_seed, x, branch is not None)
    chosen = choose("frozen_group", backend, x, BACKENDS, _why_not_triton(prologue, x.shape[-1]))
    flat, numbers = [tensor for member in members for tensor in member], [*map(float, scales)]
    if members and prologue == "identity" and branch is None and True not in bare:  # the linears alone
        return Group(None, None, tuple(lora_linears((x, seed, *flat), numbers, dropout_p, chosen)))
    outputs = _operations[prologue == "identity"](
        (x, branch, branch_scale, branch_seed, norm_weight, norm_bias, seed, *flat),
        prologue, float(norm_eps), numbers, dropout_p, branch_p, return_normed, chosen,
    )  # fmt: skip
    emitted = (branch is not None) + return_normed
    total = outputs[0] if branch is not None else None
    return Group(total, outputs[emitted - 1] if return_normed else None, tuple(outputs[emitted : emitted + len(members)]))


BACKENDS = ("reference", "native", "triton")
HEAD = 7  # tensors before the members' own
EACH = 4  # tensors of a member: weight (N, K), bias (N,) or None, lora_a (r, K) or None, lora_b (N, r) or None


def _members(*sequences: Sequence[Any]) -> list[tuple]:
    count = len(sequences[0])
    if [*map(len, sequences)] != [count] * len(sequences):
        for name, sequence in zip(("weights", "biases", "lora_as", "lora_bs", "scales"), sequences):
            if len(sequence) != count:
                fail(name, f"{count} entries, one a member", len(sequence))
    return list(zip(*sequences[:EACH]))


def _check_members(x: Tensor, members: Sequence[tuple], scales: Sequence[float], autocast: bool) -> None:
    for g, (weight, bias, lora_a, lora_b) in enumerate(members):
        if _plain(x, weight, bias, lora_a, lora_b, scales[g]):
            continue
        check_tensor(f"weights[{g}]", weight, (None, x.shape[-1]), x.device)
        _check_frozen(f"weights[{g}]", weight)
        check_dtype(f"weights[{g}]", weight, (x.dtype,))
        if bias is not None:
            check_tensor(f"biases[{g}]", bias, (weight.shape[0],), x.device)
            _check_frozen(f"biases[{g}]", bias)
            check_dtype(f"biases[{g}]", bias, (x.dtype,))
        if lora_a is None and lora_b is None:
            continue
        check_number(f"scales[{g}]", scales[g])
        check_tensor(f"lora_as[{g}]", lora_a, (None, x.shape[-1]), x.device)
        if lora_a.shape[0] == 0:
            fail(f"lora_as[{g}]", "a rank of at least 1", f"shape {tuple(lora_a.shape)}")
        check_tensor(f"lora_bs[{g}]", lora_b, (weight.shape[0], lora_a.shape[0]), x.device)
        if not autocast:
            check_dtype(f"lora_as[{g}]", lora_a, (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,))
        check_dtype(f"lora_bs[{g}]", lora_b, (lora_a.dtype,))


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scale: float) -> bool:
    """Whether the arguments are good in the commonest way, which costs the host less than saying what is wrong."""
    try:
        width, depth = weight.shape
        return (
            depth == x.shape[-1]
            and weight.dtype is x.dtype
            and weight.device == x.device
            and not weight.requires_grad
            and (bias is None or (bias.shape == (width,) and bias.dtype is x.dtype and not bias.requires_grad))
            and (bias is None or bias.device == x.device)
            and lora_a.dtype is lora_b.dtype is x.dtype
            and lora_a.device == lora_b.device == x.device
            and lora_b.shape == (width, lora_a.shape[0])
            and lora_a.shape[0] > 0
            and lora_a.shape == (lora_a.shape[0], depth)
            and type(scale) is float
            and -inf < scale < inf
        )
    except (AttributeError, ValueError, TypeError, IndexError):
        return False


def _check_around(
    x: Tensor,
    prologue: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    branch: Tensor | None,
    branch_scale: Tensor | None,
    return_normed: bool,
    autocast: bool,
) -> None:
    if prologue not in PROLOGUES:
        fail("prologue", "one of " + ", ".join(PROLOGUES), repr(prologue))
    if return_normed and prologue == "identity":
        fail("return_normed", "False where P is the identity: n is s", return_normed)
    check_number("norm_eps", norm_eps)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("branch_scale", branch_scale)):
        if tensor is None or (_same(tensor, x, x.shape[-1:]) and not tensor.requires_grad):
            continue
        check_tensor(name, tensor, (x.shape[-1],), x.device)
        _check_frozen(name, tensor)
        if not autocast:
            check_dtype(name, tensor, (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,))
    if branch is not None and not _same(branch, x, x.shape):
        check_tensor("branch", branch, tuple(x.shape), x.device)
        check_dtype("branch", branch, (x.dtype,))


def _same(tensor: Tensor, x: Tensor, shape: torch.Size) -> bool:
    """Whether it is a tensor of this shape like x, which costs the host less than `check_tensor`."""
    return isinstance(tensor, Tensor) and tensor.dtype is x.dtype and tensor.shape == shape and tensor.device == x.device


def _check_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(name, "a frozen tensor", "one that requires a gradient")


def _dropout(name: str, p: float, seed: Tensor | None, x: Tensor, used: bool) -> tuple[float, Tensor | None]:
    """Probability and seed of a dropout, 0 and None where nothing is dropped."""
    check_probability(name, p)
    if not used or threshold(p) == 0:
        return 0.0, None
    if seed is None:
        return float(p), draw_seed(x.device)
    if not isinstance(seed, Tensor) or seed.dtype is not torch.int64 or seed.shape != (1,) or seed.device != x.device:
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}" if isinstance(seed, Tensor) else type(seed).__name__
        fail(name.replace("dropout_p", "seed"), f"None or an int64 tensor of shape (1,) on {x.device}", got)
    return float(p), seed


def _why_not_triton(prologue: str, width: int) -> Sequence[str]:
    if prologue == "layer_norm" and width > config.WIDEST:
        return [f"LayerNorm of {width} columns, at most {config.WIDEST} fit one program"]
    return ()


@lru_cache(maxsize=None)
def _around(backend: str) -> ModuleType:
    """Who computes what is around the linears."""
    return importlib.import_module("fastadapt.kernels.frozen_group.triton_launch") if backend == "triton" else reference


def _split(tensors: Tensors) -> tuple[list[tuple], list[int]]:
    """The members of a flat list, and the numbers of those with LoRA."""
    members = [tuple(tensors[i : i + EACH]) for i in range(HEAD, len(tensors) - EACH + 1, EACH)]
    return members, [g for g, member in enumerate(members) if member[2] is not None]


def _rows(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _forward(
    tensors: Tensors, kind: str, eps: float, scales: Sequence[float], dropout_p: float, branch_p: float, return_normed: bool,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    """[s where there is a branch, n where it is wanted, y_0, ..., and the product of every member with LoRA]."""
    x, delta, branch_scale, branch_seed, norm_weight, norm_bias, seed = tensors[:HEAD]
    members, adapted = _split(tensors)
    prologue, branch = Prologue(kind, norm_weight, norm_bias, eps), Branch(branch_scale, branch_seed, branch_p)
    apply = return_normed or bool(members)
    total, normed = _around(backend).forward(prologue, branch, _rows(x), _rows(delta), apply)
    outputs, products = [None] * len(members), []
    if adapted:
        flat = [tensor for g in adapted for tensor in members[g]]
        results = lora_linear.forward((normed, seed, *flat), [scales[g] for g in adapted], dropout_p, backend)
        products = list(results[len(adapted) :])
        for g, y in zip(adapted, results):
            outputs[g] = y
    for g, (weight, bias, lora_a, _) in enumerate(members):
        if lora_a is None:
            outputs[g] = F.linear(normed, weight, bias)
    emitted = [tensor for tensor, wanted in ((total, delta is not None), (normed, return_normed)) if wanted]
    return [tensor.view(*x.shape[:-1], tensor.shape[-1]) for tensor in emitted + outputs] + products


def _saver(linear: bool) -> Any:
    """Which tensors are kept: the flat list with s in x's place where a gradient reads it, and the products that one does.

    linear: P is the identity, whose own gradient reads nothing.
    """

    def save(tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        _, adapted = _split(tensors)
        factors = [needs[HEAD + EACH * g + 2 : HEAD + EACH * (g + 1)] for g in adapted]
        read = any(need_a for need_a, _ in factors) or ((needs[0] or needs[1]) and not linear)
        s = None if not read else tensors[0] if tensors[1] is None else outputs[0]
        products = outputs[len(outputs) - len(adapted) :]
        return [s, None, *tensors[2:], *(p if need_b else None for p, (_, need_b) in zip(products, factors))]

    return save


def _split_saved(saved: Tensors, count: int) -> tuple[Tensors, list[tuple], list[int], Tensors]:
    """The flat list, its `count` members, the numbers of those with LoRA, and their products, of what was kept."""
    end = HEAD + EACH * count
    return saved[:end], *_split(saved[:end]), saved[end:]


def _backward(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], kind: str, eps: float, scales: Sequence[float], dropout_p: float,
    branch_p: float, return_normed: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, branch and the LoRA factors that `needs` marks."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return [None for need in needs if need]
    flat, members, adapted, products = _split_saved(saved, len(scales))
    _, _, branch_scale, branch_seed, norm_weight, norm_bias, seed = flat[:HEAD]
    s, *grads = [_rows(tensor) for tensor in (flat[0], *grads)]
    emitted = len(grads) - len(members) - len(adapted)
    ds = grads[0] if emitted > return_normed else None
    dns = [grads[emitted - 1]] if return_normed and grads[emitted - 1] is not None else []
    dys, dproducts = grads[emitted : emitted + len(members)], grads[emitted + len(members) :]
    around, prologue = _around(backend), Prologue(kind, norm_weight, norm_bias, eps)
    branch = Branch(branch_scale, branch_seed, branch_p)
    factors = [needs[HEAD + EACH * g : HEAD + EACH * (g + 1)] for g in adapted]
    need_stream, need_n = needs[0] or needs[1], any(need[2] for need in factors)

    def through(dn: Tensor | None, need_n: bool) -> tuple[Tensor | None, ...]:
        """n, dx and dbranch, those that are needed, from the part of dn that comes from LoRA's members."""
        for dy, (weight, _, lora_a, _) in zip(dys, members):
            if need_stream and lora_a is None and dy is not None:
                dn = dy @ weight if dn is None else dn.addmm_(dy, weight)
        parts = dns if dn is None else [dn, *dns]
        return around.gradients(prologue, branch, s, moments, parts, ds, need_n, *needs[:2])

    stream: list[Tensor | None] = []
    n, moments = None, None
    if around is reference:
        if s is not None:
            n, moments = reference.applied(prologue, s)
    elif need_n:

        def n(*dn: Tensor | None) -> Tensor:
            """n as the linears ask for it: with their part of dn, so that one launch makes n and dx, or before they have it."""
            if not dn:
                return around.forward(prologue, branch, s, None, True)[1]
            normed, *stream[:] = through(*dn, need_n=True)
            return normed

    results: list[Tensor] = []
    if adapted:
        given = [like.new_zeros(like[..., 0].numel(), members[g][0].shape[0]) if dys[g] is None else dys[g] for g in adapted]
        kept = [n if need_n else None, seed, *(tensor for g in adapted for tensor in members[g]), *products]
        wanted = [need_stream, False, *(need for each in factors for need in each)]
        results = lora_linear.backward(kept, [*given, *dproducts], wanted, [scales[g] for g in adapted], dropout_p, backend)
    dn = results.pop(0) if adapted and need_stream else None
    if need_stream and not stream:
        _, *stream = through(dn, need_n=False)
    return [grad.view(*like.shape[:-1], grad.shape[-1]) for grad, need in zip(stream, needs) if need] + results


def _forward_fake(
    tensors: Tensors, kind: str, eps: float, scales: Sequence[float], dropout_p: float, branch_p: float, return_normed: bool,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    x, members, adapted = tensors[0], *_split(tensors)
    emitted = [x.new_empty(x.shape) for _ in range((tensors[1] is not None) + return_normed)]
    outputs = [x.new_empty(*x.shape[:-1], member[0].shape[0]) for member in members]
    return emitted + outputs + [x.new_empty(x.shape[:-1].numel(), members[g][2].shape[0]) for g in adapted]


def _backward_fake(
    saved: Tensors, grads: Tensors, needs: Sequence[bool], kind: str, eps: float, scales: Sequence[float], *options: Any
) -> list[Tensor]:
    flat, members, _, _ = _split_saved(saved, len(scales))
    like = next(grad for grad in grads if grad is not None)
    width = members[0][0].shape[1] if members else like.shape[-1]
    stream = [like.new_empty(*like.shape[:-1], width) for need in needs[:2] if need]
    own = [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(flat[2:], needs[2:]) if need]
    return stream + own


def _operation(linear: bool) -> Operation:
    return Operation(
        name="frozen_linear_group" if linear else "frozen_group",
        options_schema=(
            "str prologue, float eps, float[] scales, float dropout_p, float branch_p, bool return_normed, str backend"
        ),
        forward=_forward,
        backward=_backward,
        reference_backward=lambda *args: _backward(*args[:-1], "reference"),
        forward_fake=_forward_fake,
        primary=lambda count: 0,  # the backward takes None for the gradient of any output
        save=_saver(linear),
        backward_fake=_backward_fake,
    )


_operations = {linear: _operation(linear) for linear in (False, True)}
