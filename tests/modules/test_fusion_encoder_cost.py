"""The fusion encoders of MaPPER, M2IST and HiVG at full size: parameters, FLOPs, what a sample keeps, which kernels attend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt import FusionEncoder
from fastadapt.core import philox
from fastadapt.modules import attention_state

FFN, LAYERS, HEADS, MIB = 2048, 6, 8, 2**20
METHODS = {
    "M2IST": {"tokens": 421, "d_model": 256, "pre_norm": False},
    "MaPPER": {"tokens": 1391, "d_model": 256, "pre_norm": False},
    "HiVG": {"tokens": 275, "d_model": 512, "pre_norm": True},
}


@pytest.fixture(autouse=True)
def _masks_without_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask on meta has no values; working them out takes most of the time."""
    empty = lambda seed, rows, cols, p, member=0: torch.empty(rows, cols, dtype=torch.bool, device="meta")  # noqa: E731
    monkeypatch.setattr(philox, "keep_mask", empty)


def build(method: str, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS, **options) -> FusionEncoder:
    d_model, pre_norm = METHODS[method]["d_model"], METHODS[method]["pre_norm"]
    options |= {"pre_norm": pre_norm, "device": "meta", "dtype": dtype}
    return FusionEncoder(d_model, HEADS, layers, FFN, **options)


def inputs(method: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions, both of which train, and the mask."""
    tokens, width = METHODS[method]["tokens"], METHODS[method]["d_model"]
    trained = [torch.empty(*shape, dtype=dtype, device="meta") for shape in ((batch, tokens, width), (tokens, width))]
    mask = torch.empty(batch, tokens, dtype=torch.bool, device="meta")
    return trained[0].requires_grad_(), trained[1].requires_grad_(), mask


class Strong(nn.Module):
    """The encoder of torch's modules on scaled_dot_product_attention, without a mask, which flash attention does not take."""

    def __init__(self, encoder: FusionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        pre = self.encoder.pre_norm
        for layer in self.encoder.layers:
            a = layer.norm1(x) if pre else x
            placed, own = a + positions, layer.self_attn
            heads = [z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in own._project(placed, placed, a)]
            o = F.scaled_dot_product_attention(*heads, dropout_p=0.1)
            s = x + F.dropout(own.out_proj(o.transpose(1, 2).flatten(2)), 0.1)
            n = layer.norm2(s) if pre else layer.norm1(s)
            t = (s if pre else n) + F.dropout(layer.linear2(F.dropout(F.relu(layer.linear1(n)), 0.1)), 0.1)
            x = t if pre else layer.norm2(t)
        return self.encoder.norm(x) if pre else x


def kept_a_sample(method: str, encoder: nn.Module, rows: int | None = None) -> float:
    """MiB that the backward finds, as a slope over the batch."""
    found = []
    for batch in (1, 2):
        arguments = inputs(method, batch)
        with as_on_cuda():
            run = (lambda: encoder(*arguments, rows)) if rows else (lambda: encoder(*arguments))
            found.append(saved_bytes(run, encoder.parameters()))
    return (found[1] - found[0]) / MIB


@pytest.mark.parametrize(("method", "count"), [("M2IST", 7_890_432), ("MaPPER", 7_890_432), ("HiVG", 18_915_328)])
def test_parameters_are_the_released_models(method, count):
    assert sum(parameter.numel() for parameter in build(method).parameters()) == count


# MiB a sample in bfloat16: (plain, recompute=True, plain with rows=1, at least in torch's modules on flash attention)
KEPT = {"M2IST": (18.7, 2.6, 16.2, 36.5), "MaPPER": (61.5, 8.5, 53.3, 120.0), "HiVG": (16.5, 3.6, 14.3, 29.5)}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_sample_keeps(method):
    plain, recompute = build(method), build(method, recompute=True)
    found = (
        kept_a_sample(method, plain),
        kept_a_sample(method, recompute),
        kept_a_sample(method, plain, rows=1),
        kept_a_sample(method, Strong(plain)),
    )
    print(method, "keeps {:.2f} MiB a sample, recomputing {:.2f}, with one row {:.2f}; strong eager {:.2f}".format(*found))
    assert all(mib <= most for mib, most in zip(found[:3], KEPT[method])) and found[3] >= KEPT[method][3]


def test_what_is_kept_is_what_the_docstring_says():
    """By token: x, q, k, v, o, s and t, u, float32 statistics of the last norm and the attention's log-sum-exp."""
    tokens, width = METHODS["M2IST"]["tokens"], METHODS["M2IST"]["d_model"]
    lse = 4 * HEADS * (-(-tokens // 32) * 32)  # rows are padded to the kernel's blocks
    layer = tokens * (2 * (7 * width + FFN) + 2 * 4) + lse
    # the bias of the keys is kept once, and the first layer's x is the tokens
    bias = 2 * (-(-tokens // 16) * 16)
    assert kept_a_sample("M2IST", build("M2IST")) * MIB == LAYERS * layer + bias


def test_with_one_row_the_last_layer_is_keys_and_values():
    flops = {}
    for method in METHODS:
        encoder = build(method, dropout=0.0).eval()
        for rows in (None, 1):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                assert encoder(*inputs(method, 1), rows).shape[1] == (rows or METHODS[method]["tokens"])
            flops[method, rows] = counter.get_total_flops() / 1e9
        print(f"{method}: {flops[method, None]:.2f} GFLOP forward, with one row {flops[method, 1]:.2f}")
    for method, whole in (("M2IST", 7.7), ("MaPPER", 33.8), ("HiVG", 11.3)):
        assert flops[method, None] == pytest.approx(whole, rel=0.02)
        saved = flops[method, None] - flops[method, 1]
        tokens, width = METHODS[method]["tokens"], METHODS[method]["d_model"]
        one_layer = tokens * (2 * 2 * width**2 + 4 * width * FFN + 4 * tokens * width) * (tokens - 1) / tokens
        assert saved == pytest.approx(one_layer / 1e9, rel=0.01)


@pytest.mark.parametrize("method", ["M2IST", "HiVG"])
@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpus_kernels_take_what_they_are_given(method, dtype, masked, recompute):
    """On meta, where the kernels' signatures and shapes are checked and nothing runs."""
    encoder = build(method, dtype, layers=1, recompute=recompute)
    tokens, positions, mask = inputs(method, 2, dtype)
    y = encoder(tokens, positions, mask if masked else None)
    grads = torch.autograd.grad(y.sum(), [tokens, positions, *encoder.parameters()])
    assert [g.shape for g in grads] == [t.shape for t in (tokens, positions, *encoder.parameters())]
    assert y.dtype is dtype and all(g.dtype is dtype for g in grads)


KINDS = [
    ("cpu", torch.float32, True, 0.0, 32, "cpu"),
    ("cpu", torch.float64, False, 0.0, 32, "cpu"),
    ("cpu", torch.float32, True, 0.1, 32, "math"),
    ("meta", torch.bfloat16, False, 0.1, 32, "flash"),
    ("meta", torch.bfloat16, True, 0.1, 32, "efficient"),
    ("meta", torch.float32, False, 0.0, 32, "efficient"),
    ("meta", torch.float64, False, 0.0, 32, "math"),
    ("meta", torch.bfloat16, False, 0.0, 12, "math"),
]


@pytest.mark.parametrize(("device", "dtype", "masked", "dropout", "head", "kind"), KINDS)
def test_which_kernel_attends(device, dtype, masked, dropout, head, kind):
    q = torch.empty(1, 2, 3, head, dtype=dtype, device=device)
    bias = torch.empty(1, 1, 1, 3, dtype=dtype, device=device) if masked else None
    assert attention_state.kind(q, bias, dropout) == kind
    assert attention_state.kind(q[:0], bias, dropout) == "math"


def test_the_bias_is_aligned_and_is_minus_infinity_at_padding():
    mask = torch.rand(3, 21) < 0.5
    bias = attention_state.key_bias(mask, torch.float32)
    assert bias.shape == (3, 1, 1, 21) and bias.stride(0) == 32
    assert torch.equal(bias[:, 0, 0] == -torch.inf, mask) and not bias[~mask[:, None, None]].any()
