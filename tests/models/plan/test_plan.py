"""What a plan counts, against what can be counted by hand and against the published tables of the methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fastadapt.cli import app
from fastadapt.models.common.method import method
from fastadapt.models.plan import measure
from fastadapt.models.plan.gpus import GPUS, gpu
from fastadapt.models.plan.trace import Trace, traffic
from fastadapt.prove.meta import as_on_cuda, autocast
from fastadapt.prove.saved import saved_bytes

H200 = gpu("h200")
GIB = 2**30


def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*size, device="meta", dtype=dtype)


def test_a_trace_counts_products_traffic_and_time():
    a, b = meta(64, 32), meta(32, 16)
    with Trace(H200, [a, b]) as trace:
        c = a @ b
        c.relu_()
    assert trace.flops == 2 * 64 * 32 * 16
    product, relu = 4 * (64 * 32 + 32 * 16 + 64 * 16), 4 * 64 * 16  # in place: one tensor, counted once
    assert trace.bytes == product + relu
    assert trace.seconds == pytest.approx((product + relu) / 4.8e12)  # small: bandwidth bound
    assert trace.live == trace.peak == 4 * 64 * 16


def test_a_trace_follows_what_lives():
    x = meta(1000).requires_grad_()
    with Trace(H200, [x]) as trace:
        y = x.exp()
        z = y * 2
        assert trace.live == 8000
        del z
        assert (trace.live, trace.peak) == (4000, 8000)
        y.view(10, 100).sum().backward()
        del y
    assert trace.live == 4000 and x.grad is not None


def test_views_and_expanded_tensors_are_not_traffic():
    x = meta(8, 1)
    with Trace(H200, [x]) as trace:
        wide = x.expand(8, 1000).transpose(0, 1)
    assert (trace.bytes, trace.live) == (0, 0) and traffic(wide) == 32


def test_a_convolutions_bias_is_a_pass_of_its_own():
    image, weight, bias = meta(2, 8, 16, 16), meta(8, 8, 1, 1), meta(8)
    with Trace(H200, [image, weight, bias]) as plain:
        out = F.conv2d(image, weight)
    with Trace(H200, [image, weight, bias]) as biased:
        F.conv2d(image, weight, bias)
    assert biased.bytes - plain.bytes == 2 * out.nbytes + bias.nbytes


def test_a_large_product_is_bound_by_arithmetic():
    for dtype, rate in ((torch.bfloat16, H200.half), (torch.float32, H200.float32)):
        a = meta(4096, 4096, dtype=dtype)
        with Trace(H200, [a]) as trace:
            a @ a
        assert trace.seconds == pytest.approx(2 * 4096**3 / rate)
    image, weight = meta(8, 256, 64, 64), meta(256, 256, 3, 3)
    with Trace(H200, [image, weight]) as trace:
        F.conv2d(image, weight, padding=1)
    assert trace.seconds == pytest.approx(trace.flops / H200.tf32)  # PyTorch's default for convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_meta_keeps_what_cudas_keeps(dtype):
    """Of a norm and a linear: x, its statistics, the norm's result in the lower dtype and the weight's copy."""
    linear, norm = nn.Linear(32, 48, device="meta"), nn.LayerNorm(32, device="meta")
    x = meta(10, 32).requires_grad_()
    with as_on_cuda(), autocast(dtype):
        y = linear(norm(x))
        kept = saved_bytes(lambda: linear(norm(x)), [*linear.parameters(), *norm.parameters()])
    assert y.dtype == dtype
    size = dtype.itemsize
    assert kept == 10 * 32 * 4 + 2 * 10 * 4 + 10 * 32 * size + (48 * 32 * size if size == 2 else 0)


def test_attention_with_a_mask_keeps_no_map():
    q = meta(2, 4, 128, 16).requires_grad_()
    mask = torch.ones(2, 1, 1, 128, dtype=torch.bool, device="meta")
    with as_on_cuda():
        kept = saved_bytes(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), [q])
    result, log_sum, bias = 2 * 4 * 128 * 16 * 4, 2 * 4 * 128 * 4, 2 * 128 * 4
    assert result + log_sum + bias <= kept <= result + log_sum + bias + 64


def a_step(name: str, arm: str, dtype: str, parity: tuple | str = (), batch: int | None = None) -> measure.Step:
    found = method(name)
    return measure.Step(found, measure.make(found, arm, parity=parity), batch or found.batch, dtype)


def test_m2ist_as_released_needs_what_was_counted_of_its_code():
    step = a_step("m2ist", "release", "float32", "released")
    saved = step.saved()
    expected = {
        "fusion self-attention": 5.49,
        "fusion encoder, the rest": 3.32,
        "vision side adapters": 0.587,
        "text side adapters": 0.118,
    }
    assert {name: saved[name] / GIB for name in expected} == pytest.approx(expected, rel=0.01)
    assert saved.total() / GIB == pytest.approx(9.56, rel=0.01)
    assert "frozen towers" not in saved
    forward, backward = step.flops(H200)
    assert forward / 64e9 == pytest.approx(86.3, rel=0.001) and backward / 64e9 == pytest.approx(16.8, rel=0.001)


@pytest.mark.parametrize("dtype, saved", [("float32", 5.01), ("bfloat16", 3.04)])
def test_m2ist_without_maps_needs_what_was_counted(dtype, saved):
    assert a_step("m2ist", "strong", dtype).saved().total() / GIB == pytest.approx(saved, rel=0.05)


def test_m2ist_here_keeps_at_most_24_mib_a_sample():
    saved = a_step("m2ist", "fastadapt", "bfloat16").saved()
    assert saved.total() / 2**20 / 64 < 24
    taps = 12 * 400 * 256 * 2 + 12 * 20 * 768 * 2
    assert saved["vision side adapters"] + saved["text side adapters"] == 64 * taps


@pytest.mark.parametrize("arm", ["strong", "fastadapt"])
def test_a_plan_is_the_sum_of_its_passes(arm):
    found, batch = method("m2ist"), 3
    model = measure.make(found, arm, "tiny")
    plan = measure.measure(found, model, batch, "bfloat16", H200)
    step = measure.Step(found, model, batch, "bfloat16")
    assert plan.saved == step.saved() and (plan.forward_flops, plan.backward_flops) == step.flops(H200)
    parameters = {p for p in model.parameters()}
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    images = batch * 96 * 96 * (3 * 4 + 8)
    assert plan.resident >= 4 * (sum(p.numel() for p in parameters) + 2 * trained) + images
    assert plan.peak >= plan.resident + 4 * trained  # at its end there is a gradient of each
    assert plan.seconds > plan.bytes / H200.bandwidth * 0.999
    assert all(p.grad is None for p in parameters)
    assert sum(row.trained for row in plan.parts) == trained


def test_the_command_says_it_all():
    result = CliRunner().invoke(app, ["plan", "m2ist", "--preset", "tiny", "--batch", "2", "--arm", "strong", "--gpu", "A100"])
    assert result.exit_code == 0, result.output
    said = ("strong arm, batch 2, bfloat16", "fusion encoder", "GMAC", "MiB a sample", "peak, predicted", "limits of the A100")
    assert [words for words in said if words not in result.output] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mist"], "method: expected one of "),
        (["m2ist", "--arm", "weak"], "arm: expected one of release, strong, fastadapt, got 'weak'"),
        (["m2ist", "--dtype", "int8"], "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (["m2ist", "--gpu", "K80"], f"gpu: expected one of {', '.join(GPUS)}, got 'K80'"),
        (["m2ist", "--batch", "0"], "batch: expected at least 1, got 0"),
        (["m2ist", "--parity", "none"], "parity: expected 'released' or some of"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
