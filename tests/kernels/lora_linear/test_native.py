"""The C++ lora_linear equals the reference bit for bit, and refuses lists that make no sense."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastadapt import native
from fastadapt.kernels.lora_linear import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
K = 24
GROUPS = {"one": [(16, 4)], "three": [(16, 4), (40, 1), (7, 8)]}  # (N, r) of each member
ALL_OF_A_MEMBER = (True, True, True, True)

# the (2, 3, K) input in memory layouts a model produces
LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, K),
    "transposed": lambda: torch.randn(3, 2, K).transpose(0, 1),
    "columns last": lambda: torch.randn(2, K, 3).transpose(1, 2),
    "sliced": lambda: torch.randn(4, 3, 2 * K)[1:3, :, 5 : 5 + K],
    "every second column": lambda: torch.randn(2, 3, 2 * K)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, K).expand(2, 3, K),
    "negated lazily": lambda: torch._neg_view(torch.randn(2, 3, K)),
}


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    assert native.load(), native.status().reason


def native_kernel() -> ModuleType:
    """The module, which cannot be imported before the library is loaded."""
    from fastadapt.kernels.lora_linear import native_kernel

    return native_kernel


def flat_list(
    x: Tensor,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    bias: bool = True,
    dropout: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """x, seed and the tensors of members of these (N, r)."""
    width = x.shape[-1]
    flat = [x.to(dtype), torch.tensor([-77], dtype=torch.int64) if dropout else None]
    for outputs, rank in sizes:
        flat += [torch.randn(outputs, width).to(dtype), torch.randn(outputs).to(dtype) if bias else None]
        flat += [torch.randn(size).to(adapter_dtype or dtype) for size in ((rank, width), (outputs, rank))]
    return flat


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.is_contiguous() and torch.equal(ours, theirs)


def assert_both_passes_equal(
    flat: list[Tensor | None],
    needs: tuple[bool, ...] | None = None,
    p: float = 0.0,
    grad_layout=lambda dy: dy,
) -> None:
    """Forward and backward against the reference's; by default every tensor but the seed wants its gradient."""
    count = len(reference.members(flat))
    scales = [0.5 + g for g in range(count)]
    outputs = reference.forward(flat, scales, p)
    assert_same(native_kernel().forward(flat, scales, p), outputs)
    if needs is None:
        needs = tuple(t is not None and t.is_floating_point() for t in flat)
    saved = reference.save(flat, outputs, needs)
    grads = [grad_layout(torch.randn(y.shape).to(y.dtype)) for y in outputs[:count]] + [None] * count
    expected = reference.backward(saved, grads, needs, scales, p)
    assert len(expected) == sum(needs)
    assert_same(native_kernel().backward(saved, grads, needs, scales, p), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_and_dtypes(dtype, sizes, p, bias):
    assert_both_passes_equal(flat_list(torch.randn(2, 3, K), sizes, dtype, bias, dropout=p > 0), p=p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_only_the_wanted_gradients(needs, need_x, p):
    flat = flat_list(torch.randn(5, K), GROUPS["three"], torch.float32, dropout=p > 0)
    assert_both_passes_equal(flat, (need_x, False, *needs, *ALL_OF_A_MEMBER, *needs), p)
    assert_both_passes_equal(flat, (need_x, False, *needs * 3), p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_x(layout, p):
    assert_both_passes_equal(flat_list(LAYOUTS[layout](), GROUPS["three"], torch.float32, dropout=p > 0), p=p)


@pytest.mark.parametrize(
    "layout",
    [
        lambda dy: dy[:1, :1, :1].expand(dy.shape),
        lambda dy: dy[..., :1].expand(dy.shape),
        lambda dy: dy.mT.contiguous().mT,
        lambda dy: dy.repeat(1, 2, 1)[:, ::2],
        torch._neg_view,
    ],
    ids=["a sum's", "expanded", "columns last", "sliced", "negated lazily"],
)
def test_any_strides_of_gradients(layout):
    assert_both_passes_equal(flat_list(torch.randn(2, 3, K), GROUPS["three"], torch.float32), grad_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_of_the_members(dtype):
    flat = flat_list(torch.randn(6, K), GROUPS["three"], dtype)
    strided = [t if t is None or t.ndim == 1 else t.t().contiguous().t() for t in flat]
    strided[3] = strided[3].repeat_interleave(2)[::2]
    assert_both_passes_equal(strided)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (1, 4, 1, K), (2, 1, 3, 2, K)], ids=str)
def test_any_leading_dimensions(shape, p):
    assert_both_passes_equal(flat_list(torch.randn(shape), GROUPS["three"], torch.float32, dropout=p > 0), p=p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors_beside_a_half_precision_layer(dtype, p):
    x = torch.randn(2, 3, K)
    flat = flat_list(x, GROUPS["three"], dtype, dropout=p > 0, adapter_dtype=torch.float32)
    assert_both_passes_equal(flat, p=p)


def test_half_precision_input_of_a_float32_layer():
    flat = flat_list(torch.randn(2, 3, K), GROUPS["three"], torch.float32)
    assert_both_passes_equal([flat[0].bfloat16(), *flat[1:]])


def test_enough_rows_for_several_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        flat = flat_list(torch.randn(1500, K), [(96, 4)], torch.float32, dropout=True)
        assert_both_passes_equal(flat, p=0.1)
    finally:
        torch.set_num_threads(threads)


def test_a_gradient_of_a_low_rank_product_is_the_references():
    flat = flat_list(torch.randn(5, K), GROUPS["one"], torch.float64)
    needs = (True, False, *ALL_OF_A_MEMBER)
    outputs = reference.forward(flat, [2.0], 0.0)
    arguments = (reference.save(flat, outputs, needs), [torch.randn_like(y) for y in outputs], needs, [2.0], 0.0)
    assert_same(native_kernel().backward(*arguments), reference.backward(*arguments))


def forward_arguments() -> dict:
    return {"tensors": flat_list(torch.randn(5, K), GROUPS["one"], torch.float32), "scales": [2.0], "threshold": 0}


def backward_arguments() -> dict:
    """Every gradient of a call of one member, as the operator takes them."""
    tensors, needs = forward_arguments()["tensors"], [True, False, True, True, True, True]
    y, low = reference.forward(tensors, [2.0], 0.0)
    saved = reference.save(tensors, [y, low], needs)
    return {"saved": saved, "grads": [torch.randn_like(y), None], "needs": needs, "scales": [2.0], "threshold": 0}


def with_entry(entries: list, index: int, entry: object) -> list:
    return [*entries[:index], entry, *entries[index + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"tensors": a["tensors"][:5]}, "tensors: expected 6 entries.* got 5"),
        (lambda a: a | {"scales": []}, "scales: expected one entry a member, got none"),
        (lambda a: a | {"scales": [1.0, 2.0]}, "tensors: expected 10 entries.* got 6"),
        (lambda a: a | {"threshold": 65536}, "threshold: expected 0 to 65535, got 65536"),
        (lambda a: a | {"threshold": -1}, "threshold: expected 0 to 65535, got -1"),
        (lambda a: a | {"tensors": with_entry(a["tensors"], 0, None)}, "x: expected a tensor"),
        (lambda a: a | {"tensors": with_entry(a["tensors"], 0, torch.tensor(1.0))}, "x: expected a tensor of 1 dim"),
        (lambda a: a | {"tensors": with_entry(a["tensors"], 1, torch.zeros(1))}, "seed: expected one int64 element"),
        (lambda a: a | {"tensors": with_entry(a["tensors"], 2, None)}, "weight of member 0: expected a tensor"),
        (
            lambda a: a | {"tensors": with_entry(a["tensors"], 2, torch.zeros(16, K + 1))},
            r"weight of member 0: expected shape \(-1, 24\).* got \(16, 25\)",
        ),
        (lambda a: a | {"tensors": with_entry(a["tensors"], 3, torch.zeros(1))}, r"bias of member 0: .* got \(1\)"),
        (lambda a: a | {"tensors": with_entry(a["tensors"], 4, torch.zeros(K))}, r"lora_a of member 0: .* got \(24\)"),
        (
            lambda a: a | {"tensors": with_entry(a["tensors"], 5, torch.zeros(15, 4))},
            r"lora_b of member 0: expected shape \(16, 4\).* got \(15, 4\)",
        ),
    ],
)
def test_forward_names_what_is_wrong(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastadapt_native.lora_linear(*change(forward_arguments()).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"saved": a["saved"][:6]}, "saved: expected 7 entries.* got 6"),
        (lambda a: a | {"grads": a["grads"][:1]}, "grads: expected 2 entries.* got 1"),
        (lambda a: a | {"needs": a["needs"][:3]}, "needs: expected 6 entries.* got 3"),
        (lambda a: a | {"scales": []}, "scales: expected one entry a member, got none"),
        (lambda a: a | {"grads": [None, None]}, "grads: expected a tensor"),
        (lambda a: a | {"grads": [a["grads"][0], torch.zeros(5, 4)]}, "grads: expected None for the low-rank product"),
        (lambda a: a | {"saved": with_entry(a["saved"], 0, None)}, "x: expected a tensor"),
        (lambda a: a | {"saved": with_entry(a["saved"], 3, None)}, "bias of member 0: expected a tensor, got None"),
        (lambda a: a | {"saved": with_entry(a["saved"], 6, None)}, "product of member 0: expected a tensor, got None"),
        (lambda a: a | {"saved": with_entry(a["saved"], 4, torch.zeros(4, 9))}, r"lora_a of member 0: .* got \(4, 9\)"),
    ],
)
def test_backward_names_what_is_wrong(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastadapt_native.lora_linear_backward(*change(backward_arguments()).values())


@pytest.mark.parametrize("grad", [torch.zeros(4, 16), torch.zeros(5, 15), torch.zeros(5, 16).double()], ids=str)
def test_a_gradient_that_does_not_fit_raises(grad):
    with pytest.raises(RuntimeError):
        torch.ops.fastadapt_native.lora_linear_backward(*(backward_arguments() | {"grads": [grad, None]}).values())


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    assert native_kernel(), "it registers the fake"
    arguments = tuple(forward_arguments().values())
    torch.library.opcheck(torch.ops.fastadapt_native.lora_linear.default, arguments, test_utils=tests)
