"""frozen_group on every backend: what it refuses, keeps and launches; compilation, checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt.core.backend import BackendError
from fastadapt.core.casts import forget, frozen_cast
from fastadapt.core.launch import recording
from fastadapt.kernels.frozen_group.op import frozen_group
from tests.kernels.frozen_group.calls import BACKENDS, Call, composed, flat, fused, make, results
from tests.tolerance import EXACT, no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)
x, weight = torch.randn(3, 8), torch.randn(4, 8)
LORA = {"lora_as": [torch.randn(2, 8)], "lora_bs": [torch.randn(4, 2)], "scales": [1.0]}
PLAIN = {"weights": [weight], "biases": [None], "lora_as": [None], "lora_bs": [None], "scales": [1.0]}
WRONG = {
    "prologue": ({"prologue": "tanh"}, "prologue: expected one of identity, layer_norm"),
    "norm_weight's shape": ({"prologue": "layer_norm", "norm_weight": torch.ones(7)}, r"norm_weight: expected shape \(8\)"),
    "norm_weight trains": (
        {"prologue": "layer_norm", "norm_weight": torch.ones(8, requires_grad=True)}, "norm_weight: expected a frozen tensor",
    ),
    "weight trains": (PLAIN | {"weights": [weight.clone().requires_grad_()]}, r"weights\[0\]: expected a frozen tensor"),
    "weight's dtype": (PLAIN | {"weights": [weight.double()]}, r"weights\[0\]: expected torch.float32, got torch.float64"),
    "bias's shape": (PLAIN | {"biases": [torch.ones(3)]}, r"biases\[0\]: expected shape \(4\)"),
    "half a LoRA": (PLAIN | {"lora_as": [torch.ones(2, 8)]}, r"lora_bs\[0\]: expected a tensor, got NoneType"),
    "rank 0": (PLAIN | {"lora_as": [torch.ones(0, 8)], "lora_bs": [torch.ones(4, 0)]}, r"lora_as\[0\]: expected a rank"),
    "one scale missing": (PLAIN | {"scales": []}, "scales: expected 1 entries, one a member, got 0"),
    "scale": (PLAIN | LORA | {"scales": [float("inf")]}, r"scales\[0\]: expected a finite number"),
    "branch's shape": ({"branch": torch.ones(3, 7)}, r"branch: expected shape \(3, 8\)"),
    "branch's dtype": ({"branch": torch.ones(3, 8).double()}, "branch: expected torch.float32, got torch.float64"),
    "scale of a branch trains": (
        {"branch": x, "branch_scale": torch.ones(8, requires_grad=True)}, "branch_scale: expected a frozen tensor",
    ),
    "dropout": (PLAIN | {"dropout_p": 1.0}, "dropout_p: expected a number p with 0 <= p < 1"),
    "seed": (
        PLAIN | LORA | {"dropout_p": 0.1, "seed": torch.zeros(1)}, r"^seed: expected None or an int64 tensor of shape \(1,\)",
    ),
    "branch's seed": (
        {"branch": x, "branch_dropout_p": 0.1, "branch_seed": torch.zeros(2).long()}, "branch_seed: expected None or an int64",
    ),
    "branch's dropout": ({"branch": x, "branch_dropout_p": -0.1}, "branch_dropout_p: expected a number p"),
    "the identity's n": ({"return_normed": True}, "return_normed: expected False where P is the identity"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    arguments, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        frozen_group(x, **arguments)


def test_a_row_that_does_not_fit_one_program():
    wide = torch.ones(1, 16385)
    with pytest.raises(BackendError, match="LayerNorm of 16385 columns, at most 16384 fit one program"):
        frozen_group(wide, prologue="layer_norm", return_normed=True, backend="triton")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prologue", ["layer_norm", "gelu", "quick_gelu"])
def test_as_exact_as_torch_in_the_same_dtype(prologue, dtype, backend):
    options = {"branch": True, "scale": True, "dropout": 0.2, "branch_dropout": 0.3, "normed": True}
    call = make(prologue, **options, shape=(4, 37, 24), dtype=dtype)
    found, eager = results(fused(backend), call), results(composed, call)
    no_worse_than(found, eager, results(composed, call.to(torch.float64)), slack={2: 1.5, torch.inf: 2.5})  # sums of few rows


@every_backend
def test_float32_factors_of_a_bfloat16_model(backend):
    call = make(branch=True, dtype=torch.bfloat16, factor_dtype=torch.float32)
    found = results(fused(backend), call)
    assert {found[f"d {name}"].dtype for name in call.trained if "lora" in name} == {torch.float32}
    no_worse_than(found, results(composed, call), results(composed, call.to(torch.float64)))


@every_backend
@pytest.mark.parametrize("prologue", ["layer_norm", "gelu", "identity"])
def test_compiled_is_eager(prologue, backend):
    call = make(prologue, branch=True, dropout=0.2, branch_dropout=0.3, normed=prologue != "identity", dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, call), results(fused(backend), call)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, backend):
    call = make(branch=True, dropout=0.2, branch_dropout=0.3, normed=True, dtype=torch.float32)
    for name in ("seed", "branch_seed"):  # drawn in the call, and again in the backward
        call.tensors.pop(name)
    torch.manual_seed(5)
    expected = results(fused(backend), call)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat(fused(backend)(call.with_tensors(*tensors))).values())

    torch.manual_seed(5)
    outputs = checkpoint(run, *call.tensors.values(), use_reentrant=use_reentrant)
    grads = [torch.linspace(-3, 3, y.numel()).view(y.shape).cos() for y in outputs]
    torch.autograd.backward(outputs, grads)
    for name, tensor in call.trained.items():
        assert torch.equal(tensor.grad, expected[f"d {name}"]), name


@every_backend
def test_autocast(backend):
    call = make(branch=True, normed=True, dropout=0.2, dtype=torch.float32)
    with torch.autocast(call.tensors["x"].device.type, torch.bfloat16):
        found, twin = results(fused(backend), call), results(fused(backend), call)
    assert all(found[name].dtype == torch.bfloat16 for name in ("total", "normed", "y0", "y1", "y2"))
    assert all(torch.equal(found[name], twin[name]) for name in found)
    narrow, exact = call.to(torch.bfloat16), call.to(torch.float64)
    eager = {name: t.to(found[name].dtype) for name, t in results(composed, narrow).items()}
    no_worse_than(found, eager, results(composed, exact), slack={2: 1.5})


@every_backend
def test_empty(backend):
    call = make(branch=True, shape=(0, 5, 24), normed=True, dtype=torch.float32)
    found = results(fused(backend), call)
    assert found["y0"].shape == (0, 5, 16) and not found["d lora_a0"].any() and not found["d lora_b2"].any()


@every_backend
def test_strided_operands(backend):
    call = make(branch=True, dtype=torch.float32)
    laid = {name: t.detach().t().contiguous().t() if t.ndim == 2 else t.detach() for name, t in call.tensors.items()}
    laid["x"] = torch.randn(2, 24, 5).transpose(1, 2)
    laid = {name: t.requires_grad_(call.tensors[name].requires_grad) for name, t in laid.items()}
    call = Call(laid, call.prologue, call.options, call.ranks)
    no_worse_than(results(fused(backend), call), results(composed, call), results(composed, call.to(torch.float64)))


def kept(needs: bool = True, **options) -> int:
    call = make(shape=(4, 8, 24), dtype=torch.float32, frozen=() if needs else ("x", "branch"), **options)
    tensors = list(call.tensors.values())
    return saved_bytes(lambda: fused("reference")(call), exclude=tensors)


def test_what_is_kept():
    stream, product = 4 * 32 * 24, 4 * 32
    none = (None, None, None)
    assert kept(ranks=none) == 0  # x alone, which is excluded
    assert kept(ranks=none, branch=True) == stream  # s
    assert kept(ranks=none, branch=True, prologue="identity", dropout=0.1) == 0
    assert kept(branch=True, prologue="gelu", dropout=0.1, normed=True) == stream + product * (4 + 3)
    assert kept(ranks=none, branch=True, needs=False) == 0


def test_nothing_is_recorded_where_nothing_needs_a_gradient():
    call = make(ranks=(None, None, None), frozen=("x", "branch"), branch=True, dtype=torch.float32)
    assert not any(y.requires_grad for y in flat(fused()(call)).values())


def test_launches():
    call = make(branch=True, normed=True, ranks=(4, 4, 4), widths=(16, 16, 16), dropout=0.1, dtype=torch.bfloat16)
    call = Call({name: t.detach().to("meta").requires_grad_(t.requires_grad) for name, t in call.tensors.items()},
                call.prologue, call.options, (4, 4, 4))  # fmt: skip
    with as_on_cuda(), recording() as forward:
        outputs = list(flat(fused()(call)).values())
    with as_on_cuda(), recording() as backward:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    assert [launch.name for launch in forward][0] == "prologue_kernel" and len(forward) <= 3
    names = [launch.name for launch in backward]
    assert names.count("prologue_grad_kernel") == 1 and "prologue_kernel" not in names  # n is made beside dx


def test_casts_of_frozen_tensors():
    tensor = torch.randn(3, 4)
    first = frozen_cast(tensor, torch.bfloat16)
    assert frozen_cast(tensor, torch.bfloat16) is first and frozen_cast(tensor, torch.float32) is tensor
    assert frozen_cast(tensor, torch.float16) is not first and frozen_cast(tensor, torch.bfloat16) is first
    tensor.zero_()
    assert not frozen_cast(tensor, torch.bfloat16).any()
    for value in (1.0, 2.0, 3.0):  # the memory of the first may be that of the third
        tensor.data = torch.full((3, 4), value)
        if value != 2.0:
            assert (frozen_cast(tensor, torch.bfloat16) == value).all()
    tensor.data.zero_()
    forget([tensor])
    assert not frozen_cast(tensor, torch.bfloat16).any()
    with torch.inference_mode():
        other = torch.ones(2)
        assert frozen_cast(other, torch.bfloat16).dtype == torch.bfloat16
        inside = frozen_cast(tensor, torch.float64)
    assert not inside.is_inference()
    trained = torch.ones(2, requires_grad=True)
    assert frozen_cast(trained, torch.bfloat16).requires_grad
    assert frozen_cast(None, torch.bfloat16) is None


@every_backend
def test_opcheck(backend):
    call = make(branch=True, dropout=0.2, branch_dropout=0.3, normed=True, dtype=torch.float32)
    tensors = call.tensors
    names = ("x", "branch", "branch_scale", "branch_seed", "norm_weight", "norm_bias", "seed")
    arguments = [*map(tensors.get, names), *(t for g in range(3) for t in call.member(g))]
    options = ("layer_norm", 1e-5, [0.5, 1.5, 2.5], 0.2, 0.3, True, backend)
    torch.library.opcheck(torch.ops.fastadapt.frozen_group, (arguments, *options))
    found = torch.ops.fastadapt.frozen_group(arguments, *options)
    torch.testing.assert_close(found[0], fused(backend)(call).total, **EXACT)
