"""lora_linear on a GPU: what no interpreter shows.  The other tests run their kernels compiled in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastadapt.core import philox
from fastadapt.kernels.lora_linear import config
from fastadapt.prove.judge import poisoned
from tests.kernels.lora_linear.calls import EVERYTHING, SEED, Call, Member, composed, few_bits, fused, make, results
from tests.tolerance import no_worse_than

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
ROWS = 32 * 197
triton = fused("triton")

SHAPES = {
    "768 to 768": (768, (768,), (16,)),
    "768 to 3072": (768, (3072,), (16,)),
    "3072 to 768": (3072, (768,), (16,)),
    "query, key and value": (768, (768, 768, 768), (16, 16, 16)),
    "rank 64": (1024, (1024,), (64,)),
    "rank 256": (768, (768,), (256,)),
    "rows that 16 bytes do not divide": (765, (771,), (5,)),
}
every_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.1])


def on_gpu(call: Call) -> Call:
    return call.to("cuda")


@contextmanager
def float32_matmul_precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@every_dropout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_model_sizes_round_no_more_than_eager(shape, dtype, dropout_p):
    depth, widths, ranks = SHAPES[shape]
    call = on_gpu(make((ROWS, depth), widths, ranks, dropout_p=dropout_p, dtype=dtype))
    with poisoned():
        ours = results(triton, call)
    no_worse_than(ours, results(composed, call), results(composed, call.to(torch.float64)))


@every_dropout
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_float32_and_tf32(setting, dropout_p):
    call = on_gpu(make((ROWS, 768), (768,), (16,), dropout_p=dropout_p, dtype=torch.float32))
    with float32_matmul_precision(setting), poisoned():
        ours, eager = results(triton, call), results(composed, call)
    no_worse_than(ours, eager, results(composed, call.to(torch.float64)))


@every_dropout
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_float32_weights(autocast, dropout_p):
    call = on_gpu(make((ROWS, 768), (768,), (16,), dropout_p=dropout_p, dtype=torch.float32))
    with torch.autocast("cuda", autocast), poisoned():
        ours, eager = results(triton, call), results(composed, call)
    assert ours["y[0]"].dtype == autocast and ours["d lora_a[0]"].dtype == torch.float32
    no_worse_than(ours, eager, results(composed, call.to(torch.float64)))


@every_dropout
def test_runs_are_bitwise_equal(dropout_p):
    call = on_gpu(make((ROWS, 768), (768,) * 3, (16,) * 3, dropout_p=dropout_p, dtype=torch.bfloat16, needs=EVERYTHING))
    first, second = (results(triton, call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_gpu_is_chosen_and_never_waited_for():
    call = on_gpu(make((64, 768), (768,), (16,), dropout_p=0.1, dtype=torch.bfloat16))
    expected = results(triton, call)
    grads = [few_bits(expected["y[0]"])]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(fused(), call, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


SIZE = 72


def transparent() -> Call:
    """x = 1, W = 0, A = B = I: y and, for a gradient of I, dA are the mask over 1 - p."""
    eye = torch.eye(SIZE, dtype=torch.bfloat16, device=GPU)
    member = Member(torch.zeros_like(eye), None, eye.clone(), eye.clone())
    return Call(torch.ones_like(eye), (member,), (1.0,), 0.3).requiring("x", "lora_a")


def masks_of(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dA, each of which is not zero where the mask kept."""
    (y,) = triton(call)
    eye = torch.eye(SIZE, dtype=y.dtype, device=GPU)
    (da,) = torch.autograd.grad(y, call.members[0].lora_a, eye, retain_graph=True)
    (dx,) = torch.autograd.grad(y, call.x, torch.ones_like(y))
    return y, dx, da


@pytest.mark.parametrize("algorithm", ["fused", "split"])
def test_masks_equal_the_cpus(algorithm, monkeypatch):
    monkeypatch.setattr(config, "algorithm", lambda problem: algorithm)
    torch.manual_seed(SEED)
    found = masks_of(transparent())
    torch.manual_seed(SEED)
    seed = philox.draw_seed(GPU)
    expected = philox.keep_mask(seed.cpu(), SIZE, SIZE, 0.3)
    assert torch.equal(philox.keep_mask(seed, SIZE, SIZE, 0.3).cpu(), expected)
    for values in found:
        assert torch.equal((values != 0).cpu(), expected)


@pytest.mark.parametrize("algorithm", ["fused", "split"])
def test_each_replay_of_a_graph_draws_a_mask_that_its_backward_sees(algorithm, monkeypatch):
    monkeypatch.setattr(config, "algorithm", lambda problem: algorithm)
    call = transparent()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, and libraries set up, before the capture
        for _ in range(3):
            masks_of(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = masks_of(call)
    seen = []
    for _ in range(3):
        graph.replay()
        y, dx, da = (values != 0 for values in static)
        assert torch.equal(y, dx) and torch.equal(y, da)
        assert 0.6 < y.float().mean().item() < 0.8
        seen.append(y)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_graph_replays_a_training_step_bit_for_bit():
    """Without dropout, whose masks are drawn anew, a replay gives what the eager step does."""
    call = on_gpu(make((ROWS, 768), (768,), (16,), dtype=torch.bfloat16))
    expected = results(triton, call)
    grads = [few_bits(expected["y[0]"])]

    def step() -> list[Tensor]:
        (y,) = triton(call)
        return [y, *torch.autograd.grad(y, [t for t in call.tensors.values() if t.requires_grad], grads)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    graph.replay()
    assert all(torch.equal(found, want) for found, want in zip(static, expected.values(), strict=True))


@every_dropout
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_is_eager(mode, dropout_p):
    call = on_gpu(make((ROWS, 768), (768,), (16,), dropout_p=dropout_p, dtype=torch.bfloat16))
    compiled = torch.compile(triton, fullgraph=True, mode=mode)
    expected = results(triton, call)
    for _ in range(3):  # reduce-overhead records a graph at the second run and replays it at the third
        found = {name: tensor.clone() for name, tensor in results(compiled, call).items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_under_autocast_with_dropout(use_reentrant):
    call = on_gpu(make((ROWS, 768), (768,), (16,), dropout_p=0.1, dtype=torch.float32))
    tensors = list(call.tensors.values())

    def step(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(SEED)
        for tensor in tensors:
            tensor.grad = None

        def function(*tensors: Tensor) -> Tensor:
            return triton(call.with_tensors(*tensors))[0].square()

        recompute = torch.utils.checkpoint.checkpoint
        with torch.autocast("cuda", torch.bfloat16):
            y = recompute(function, *tensors, use_reentrant=use_reentrant) if checkpointed else function(*tensors)
        torch.randn(5, device=GPU)  # the generator moves on between forward and backward
        y.backward(few_bits(y))
        return [y.detach(), *(tensor.grad for tensor in tensors if tensor.requires_grad)]

    for found, expected in zip(step(checkpointed=True), step(checkpointed=False), strict=True):
        assert torch.equal(found, expected)


def test_more_than_2_to_the_31_elements():
    """The last rows of x and y lie beyond what 32-bit offsets reach; dA and dB are sums over all of them."""
    rows, width, rank = 2**31 // 768 + 4096, 768, 16
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    member = on_gpu(make((1, width), (width,), (rank,), dtype=torch.bfloat16)).members[0]
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=GPU)
    grad = torch.randn(rows, width, dtype=torch.bfloat16, device=GPU)
    call = Call(x, (member,), (0.5,)).requiring("x", "lora_a", "lora_b")
    found = results(triton, call, [grad])
    sums = {name: 0.0 for name in ("d lora_a[0]", "d lora_b[0]")}
    chunk = 2**18
    for start in range(0, rows, chunk):
        part = replace(call, x=x.detach()[start : start + chunk].requires_grad_())
        exact = results(composed, part.to(torch.float64), [grad[start : start + chunk].double()])
        for name in sums:
            sums[name] = sums[name] + exact[name]
    # what is left of the last chunk: the rows past 2^31 elements
    last = rows - start
    assert (rows - last) * width <= 2**31 < rows * width
    eager = results(composed, part, [grad[start:]])
    ours = {"y[0]": found["y[0]"][start:], "d x": found["d x"][start:]}
    no_worse_than(ours, {name: eager[name] for name in ours}, {name: exact[name] for name in ours})
    for name, total in sums.items():
        error = (found[name].double() - total).norm() / total.norm()
        assert error < 1e-2, name


def test_a_side_stream_with_other_work_in_flight():
    call = on_gpu(make((ROWS, 768), (768,), (16,), dropout_p=0.1, dtype=torch.bfloat16))
    expected = results(triton, call)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = results(triton, call)
    stream.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
