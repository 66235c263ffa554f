"""The C++ side_fusion against float64, eager torch and the reference; it refuses lists that make no sense."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from fastadapt import native
from fastadapt.kernels.side_fusion import reference
from tests.kernels.side_fusion.calls import (
    ACTIVATIONS, IEA, KINDS, LEA, LINEAR, TEXT_IEA, VEA, Call, Spec, composed, few_bits, fused, make, results, tower,
)  # fmt: skip
from tests.tolerance import EXACT, no_worse_than

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [VEA, IEA, replace(TEXT_IEA, depth=9, hidden=3), LINEAR, replace(LEA, depth=2, hidden=17, activation="gelu")]
# rows enough for LN_out's backward by products of the hidden's width (csrc/side_fusion_backward.cpp), in several chunks
WIDE = [Spec(hidden=3, own=20, shared=4, out_norm=True, out_norm_eps=1e-12), replace(LEA, own=24, hidden=7)]
ours = fused("native")


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    assert native.load(), native.status().reason


def check(call: Call, grad: Tensor | None = None) -> None:
    torch.testing.assert_close(results(ours, call, grad), results(composed, call, grad), **EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_every_gradient(kind, activation):
    check(make((3, 5), [replace(KINDS[kind], activation=activation)] * 2, 1))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0, 3), (7,), (129,), (2, 3, 5), (700,)], ids=str)
@pytest.mark.parametrize("bases", [0, 2])
def test_any_mixture_of_adapters_and_any_number_of_rows(leading, bases):
    check(make(leading, MIXED, bases))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [True, False])
def test_out_norms_backward_by_products_of_the_hiddens_width(biases, activation):
    specs = [replace(spec, biases=biases, out_bias=biases, activation=activation) for spec in WIDE]
    check(make((650,), specs, 1))
    check(make((650,), replace(specs[0], scale=0.0, out_norm_eps=1e-3)))


def flat(call: Call) -> tuple[list, list]:
    """The arguments of the operators: the flat list of tensors and the options."""
    adapters = [call.adapter(i) for i in range(len(call.adapters))]
    tensors = [call.tensors[name].detach() for name in call.bases]
    for adapter in adapters:
        tensors += [None if (t := adapter.get(name)) is None else t.detach() for name in reference.Operands._fields]
    codes = [list(reference.ACTIVATIONS).index(adapter["activation"]) for adapter in adapters]
    numbers = [[adapter["scale"] for adapter in adapters], [1e-5] * len(adapters)]
    return tensors, [len(call.bases), codes, *numbers, [adapter["out_norm_eps"] for adapter in adapters]]


def backward_of(call: Call) -> dict:
    """Every gradient that there is, as the operator takes it."""
    tensors, (base_count, *options) = flat(call)
    roles = [role for name in call.adapters for role in reference.Operands._fields]
    gradless = ("tap", "out_norm_weight", "out_norm_bias")
    needs = [t is not None and role not in gradless for t, role in zip(tensors[base_count:], roles)]
    out = torch.ops.fastadapt_native.side_fusion(tensors, base_count, *options)[0]
    saved = [None] * base_count + tensors[base_count:]
    return {"saved": saved, "grads": [few_bits(out)], "needs": [False] * base_count + needs, "count": base_count} | dict(
        zip(("activations", "scales", "norm_eps", "out_norm_eps"), options)
    )


def gradients(arguments: dict) -> list[Tensor]:
    return torch.ops.fastadapt_native.side_fusion_backward(*arguments.values())


@pytest.mark.parametrize(
    ("spec", "rows"),
    [(VEA, 5), (TEXT_IEA, 5), (WIDE[0], 600), (LINEAR, 5)],
    ids=["norm", "out norm", "out norm by products", "linear"],
)
def test_any_subset_of_gradients_equals_those_of_all(spec, rows):
    arguments = backward_of(make((rows,), [replace(spec, activation="gelu"), spec]))
    every = dict(zip([i for i, need in enumerate(arguments["needs"]) if need], gradients(arguments)))
    own = [i for i in every if i < reference.EACH]
    for marks in product([True, False], repeat=len(own)):
        wanted = [i for i, mark in zip(own, marks) if mark] + [i for i in every if i >= reference.EACH][:1]
        needs = [i in wanted for i in range(len(arguments["needs"]))]
        found = gradients(arguments | {"needs": needs})
        torch.testing.assert_close(found, [every[i] for i in wanted], **EXACT)


def test_an_adapter_of_which_nothing_is_wanted_may_be_absent():
    arguments = backward_of(make((6,), [VEA, LEA, IEA]))
    every = dict(zip([i for i, need in enumerate(arguments["needs"]) if need], gradients(arguments)))
    last = range(2 * reference.EACH, 3 * reference.EACH)
    saved = [t if i in last else None for i, t in enumerate(arguments["saved"])]
    needs = [need and i in last for i, need in enumerate(arguments["needs"])]
    found = gradients(arguments | {"saved": saved, "needs": needs})
    assert len(found) == sum(needs) == 4
    assert all(torch.equal(gradient, every[i]) for gradient, i in zip(found, [i for i in every if i in last], strict=True))
    assert gradients(arguments | {"needs": [False] * len(needs), "saved": [None] * len(needs)}) == []


LAYOUTS = {
    "transposed": lambda: torch.randn(5, 3, 6).transpose(0, 1),
    "columns last": lambda: torch.randn(3, 6, 5).transpose(1, 2),
    "sliced": lambda: torch.randn(7, 5, 15)[1:4, :, 4:10],
    "every second column": lambda: torch.randn(3, 5, 12)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, 6).expand(3, 5, 6),
    "backwards negated": lambda: torch._neg_view(torch.randn(3, 5, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_taps_bases_gradients_and_parameters(layout, dtype):
    call = make(LAYOUTS[layout]().to(dtype), [replace(VEA, own=6), replace(LEA, own=6)], 1)
    strided = {"base 0": LAYOUTS[layout]().to(dtype)}
    strided |= {name: call.tensors[name].mT.contiguous().mT for name in call.tensors if name.endswith("down_weight")}
    strided |= {name: call.tensors[name].repeat_interleave(2)[::2] for name in call.tensors if name.endswith("down_bias")}
    trained = call.trained
    moved = replace(call, tensors={n: strided.get(n, t).detach().requires_grad_(n in trained) for n, t in call.tensors.items()})
    plain = moved.with_tensors(
        [t.detach().resolve_neg().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)
         for t in moved.tensors.values()]
    )  # fmt: skip
    grad = LAYOUTS[layout]().to(dtype)
    same_grad = grad.resolve_neg().clone(memory_format=torch.contiguous_format)
    near = EXACT if dtype is torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(results(ours, moved, grad), results(ours, plain, same_grad), **near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["vision", "text"])
def test_errors_are_no_worse_than_eagers(kind, activation, dtype):
    specs = [replace(spec, activation=activation) for spec in tower(kind, 40, 16, 16, layers=2)]
    call = make((300,), specs, 2, dtype=dtype)
    no_worse_than(results(ours, call), results(composed, call), results(composed, call.to(torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_parameters_and_bases(dtype):
    call = make((130,), MIXED, [torch.float32, dtype], dtype=dtype, parameter_dtype=torch.float32)
    found = results(ours, call)
    assert found["out"].dtype is torch.float32
    no_worse_than(found, results(composed, call), results(composed, call.to(torch.float64)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation):
    """z from -30 to 30 in float32, whose exponentials are the library's own."""
    z = torch.linspace(-30, 30, 4001).view(-1, 1)
    spec = Spec(depth=1, hidden=1, own=0, biases=False, activation=activation)
    call = make(z, spec)
    name = next(name for name in call.tensors if name.endswith("down_weight"))
    call = replace(call, tensors=call.tensors | {name: torch.ones(1, 1, requires_grad=True)})
    grad = torch.randn(z.shape)
    exact = call.to(torch.float64)
    want = results(composed, exact, grad.double())
    found = results(ours, call, grad)
    torch.testing.assert_close(found["out"].double(), want["out"], rtol=4e-7, atol=1e-7)
    torch.testing.assert_close(found[f"d {name}"].double(), want[f"d {name}"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_spoils_no_other(value):
    call = make((300,), MIXED, 1, dtype=torch.float32)
    clean = ours(call)
    tensors = {n: t.detach().clone().index_fill_(0, torch.tensor([17]), value) if n.endswith("tap") else t
               for n, t in call.tensors.items()}  # fmt: skip
    out = ours(replace(call, tensors=tensors))
    assert not out[17].isfinite().any()
    others = torch.arange(300) != 17
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("rows", [40, 1100])
def test_the_same_bits_every_time_and_near_for_any_number_of_threads(rows):
    call = make((rows,), [replace(IEA, shared=24), *WIDE, replace(VEA, own=24)], 1, dtype=torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 4, 4):
            torch.set_num_threads(count)
            found.append(results(ours, call))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bases", [0, 1])
def test_opcheck(bases):
    from fastadapt.kernels.side_fusion import native_kernel

    assert native_kernel, "it registers the fakes"
    call = make((4,), [TEXT_IEA, VEA], bases, dtype=torch.float32)
    tensors, options = flat(call)
    tests, ops = ("test_schema", "test_faketensor"), torch.ops.fastadapt_native
    torch.library.opcheck(ops.side_fusion.default, (tensors, *options), test_utils=tests)
    torch.library.opcheck(ops.side_fusion_backward.default, tuple(backward_of(call).values()), test_utils=tests)


def test_the_schemas_are_those_that_python_declares():
    from fastadapt.kernels.side_fusion import native_kernel

    for name, arguments in native_kernel.SCHEMAS.items():
        found = getattr(torch.ops.fastadapt_native, name).default._schema
        assert str(found) == str(torch._C.parse_schema(f"fastadapt_native::{name}{arguments}"))


def test_a_code_is_an_activations_place():
    from fastadapt.kernels.side_fusion import native_kernel

    for name in reference.ACTIVATIONS:
        tensors, options = flat(make((3,), Spec(activation=name)))
        base_count, codes, *numbers = options
        found = native_kernel.forward(tensors, base_count, [name], *numbers)
        torch.testing.assert_close(found, reference.forward(tensors, base_count, [name], *numbers), **EXACT)
        assert torch.equal(found[0], torch.ops.fastadapt_native.side_fusion(tensors, *options)[0])


def forward_arguments() -> dict:
    tensors, options = flat(make((4,), [TEXT_IEA, VEA], 1, dtype=torch.float32))
    return {"tensors": tensors, **dict(zip(("count", "activations", "scales", "norm_eps", "out_norm_eps"), options))}


def entry(key: str, index: int, value: object) -> partial:
    return partial(lambda arguments: arguments | {key: [*arguments[key][:index], value, *arguments[key][index + 1 :]]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"tensors": a["tensors"][:9]}, "tensors: expected 23 entries, got 9"),
        (lambda a: a | {"count": -1}, "base_count: expected 0 or more, got -1"),
        (lambda a: a | {"scales": []}, "scales: expected one entry an adapter, got none"),
        (lambda a: a | {"activations": [1]}, "activations: expected 2 entries.* got 1"),
        (lambda a: a | {"norm_eps": [1.0]}, "norm_eps: expected 2 entries.* got 1"),
        (lambda a: a | {"out_norm_eps": [1.0]}, "out_norm_eps: expected 2 entries.* got 1"),
        (lambda a: a | {"activations": [1, 4]}, r"activations\[1\]: expected 0 to 3, got 4"),
        (lambda a: a | {"activations": [-1, 1]}, r"activations\[0\]: expected 0 to 3, got -1"),
        (entry("tensors", 0, None), r"bases\[0\]: expected a tensor, got None"),
        (entry("tensors", 0, torch.zeros(4, 7)), r"bases\[0\]: .* then 8 columns, got \(4, 7\)"),
        (entry("tensors", 0, torch.zeros(3, 8)), r"bases\[0\]: .* got \(3, 8\)"),
        (entry("tensors", 0, torch.zeros(4, 8, dtype=torch.int32)), r"bases\[0\]: expected float64, .* got Int"),
        (entry("tensors", 1, None), r"adapters\[0\].tap: expected a tensor, got None"),
        (entry("tensors", 1, torch.tensor(1.0)), r"adapters\[0\].tap: expected 1 dimension or more"),
        (entry("tensors", 2, None), r"adapters\[0\].down_weight: expected a tensor, got None"),
        (entry("tensors", 2, torch.zeros(5, 7)), r"adapters\[0\].down_weight: expected shape \(any, 6\), got \(5, 7\)"),
        (entry("tensors", 3, torch.zeros(4)), r"adapters\[0\].down_bias: expected shape \(5\), got \(4\)"),
        (entry("tensors", 4, torch.zeros(5, 4)), r"adapters\[0\].up_weight: expected shape \(any, 5\), got \(5, 4\)"),
        (entry("tensors", 4, None), r"adapters\[0\].up_weight: expected a tensor, got None"),
        (entry("tensors", 5, torch.zeros(8)), r"adapters\[0\].up_bias: expected shape \(5\), got \(8\)"),
        (entry("tensors", 6, torch.zeros(5)), r"adapters\[0\].shared_weight: expected shape \(any, 5\), got \(5\)"),
        (entry("tensors", 7, torch.zeros(1)), r"adapters\[0\].shared_bias: expected shape \(3\), got \(1\)"),
        (entry("tensors", 9, torch.zeros(6)), r"adapters\[0\].norm_weight: expected a tensor, got None"),
        (entry("tensors", 10, torch.zeros(5)), r"adapters\[0\].out_norm_weight: expected shape \(8\), got \(5\)"),
        (entry("tensors", 10, None), r"adapters\[0\].out_norm_weight: expected a tensor, got None"),
        (entry("tensors", 12, torch.zeros(3, 6)), r"adapters\[1\].tap: .* a tap of \(4, 6\) .* got \(3, 6\)"),
        (entry("tensors", 12, torch.zeros(4, 6).double()), r"adapters\[1\].tap: expected the dtype of adapters\[0\].tap"),
        (entry("tensors", 15, torch.zeros(7, 5)), r"adapters\[1\].up_bias: expected shape \(7\), got \(8\)"),
        (
            lambda a: entry("tensors", 15, torch.zeros(7, 5))(entry("tensors", 16, None)(a)),
            r"adapters\[1\]: expected a result of 8 columns, got 7",
        ),
    ],
)  # fmt: skip
def test_forward_names_what_is_wrong(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastadapt_native.side_fusion(*change(forward_arguments()).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"saved": a["saved"][:9]}, "saved: expected 23 entries, got 9"),
        (lambda a: a | {"needs": a["needs"][:9]}, "needs: expected 23 entries, got 9"),
        (lambda a: a | {"grads": []}, "grads: expected 1 entries, got 0"),
        (lambda a: a | {"grads": [None]}, r"grads\[0\]: expected a tensor, got None"),
        (lambda a: a | {"grads": [torch.zeros(4, 9)]}, r"grads\[0\]: .* then 8 columns, got \(4, 9\)"),
        (lambda a: a | {"grads": [torch.zeros(8)]}, r"grads\[0\]: .* got \(8\)"),
        (entry("needs", 0, True), "needs: expected False for the bases"),
        (entry("needs", 1, True), r"needs: expected False for adapters\[0\].tap, got True"),
        (entry("needs", 8, True), r"needs: expected False for adapters\[0\].norm_weight, got True"),
        (entry("needs", 10, True), r"needs: expected False for adapters\[0\].out_norm_weight, got True"),
        (lambda a: a | {"saved": [None] * 23}, r"needs: expected False for adapters\[0\].down_weight, got True"),
        (entry("saved", 13, torch.zeros(5, 7)), r"adapters\[1\].down_weight: expected shape \(any, 6\), got \(5, 7\)"),
    ],
)
def test_backward_names_what_is_wrong(change, message):
    with pytest.raises(RuntimeError, match=message):
        gradients(change(backward_of(make((4,), [TEXT_IEA, VEA], 1, dtype=torch.float32))))
