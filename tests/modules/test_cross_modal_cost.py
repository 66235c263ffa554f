"""HiVG's cross-modal bridges at full size and in low precision: parameters, launches, kept tensors, errors, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bench.counters import counting
from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt import CrossModalBridge, CrossModalBridges
from tests.modules.bridges import SMALL, T, make, make_h1, make_states, plain, run, with_gradients
from tests.tolerance import no_worse_than


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 30_078_976), (2, 30_078_976 + 4 * (393_216 + 39_424)), (12, 30_078_976 + 4 * 11 * (393_216 + 39_424))],
)
def test_parameters_are_the_released_models(n, expected):
    bridges = CrossModalBridges(4, num_states=n, device="meta")
    assert sum(p.numel() for p in bridges.parameters()) == expected
    assert all(p.requires_grad and p.is_meta for p in bridges.parameters())
    parts = bridges.bridge_state_dict(3)
    sizes = {name: sum(p.numel() for key, p in parts.items() if key.startswith(name)) for name in ("w", "gate", "norm", "fc")}
    assert sizes == {"w": 39_424 * n, "gate": 393_216 * n + 768, "norm": 1_536, "fc": 4_722_432}


@pytest.mark.parametrize(("n", "stacked", "expected"), [(1, False, 4), (2, False, 5), (2, True, 4), (12, True, 4)])
def test_the_text_side_of_four_bridges_is_four_kernels(n, stacked, expected):
    bridges = CrossModalBridges(4, num_states=n, device="meta")
    state = torch.empty(60, 77, 512, device="meta")
    states = torch.stack([state] * n, 2) if stacked else [state] * n
    with counting() as launches:
        bridges.encode_text(states)
    assert launches.total == expected, launches
    assert launches.torch["baddbmm"] == 2


def test_the_visual_side_is_ten_kernels_and_nine_folded():
    like = {"device": "meta", "dtype": torch.bfloat16}
    bridges = CrossModalBridges(1, **like)
    text = bridges.encode_text([torch.empty(60, 77, 512, **like)])
    h1 = torch.empty(60, 197, 768, **like)
    elementwise = {"native_layer_norm": 1, "mul": 1, "sigmoid_": 1, "mul_": 1, "add": 1}
    for group, products in ((bridges, 4), (bridges.folded(), 3)):
        with as_on_cuda(), counting() as launches:
            assert group[0](h1, text[0]).shape == h1.shape
        assert launches.torch == {"addmm": products, **elementwise}
        assert launches.triton.total() == 1


def test_a_bridge_keeps_one_tensor_for_each_operation():
    bridges = CrossModalBridges(1, device="meta")
    text = bridges.encode_text([torch.empty(2, 77, 512, device="meta")])
    h1 = torch.empty(2, 197, 768, device="meta")
    kept = saved_bytes(lambda: bridges[0](h1, text[0]), exclude=[h1, text[0].key, text[0].value, *bridges.parameters()])
    narrow = 768 + 768 + 768 + 768  # what norm, q_proj, the attention and out_proj return
    wide = 3072 + 3072  # what fc1 and QuickGELU return
    statistics = 1 + 1  # norm's mean and deviation
    assert kept == 4 * 2 * 197 * (narrow + wide + statistics)


def draws(dtype: torch.dtype, autocast: bool = False, count: int = 8) -> list[dict[str, Tensor]]:
    """Ours, eager's and float64's outputs and gradients, each over several draws, among which luck evens out."""
    results = []
    for _ in range(count):
        bridges, h1, states = make(num_states=2, dtype=dtype), make_h1(16, dtype), make_states(2, 16, dtype=dtype)
        exact = with_gradients(plain, copy.deepcopy(bridges).double(), h1.double(), [f.double() for f in states])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = (with_gradients(f, bridges, h1, states) for f in (run, plain))
        results.append((ours, eager, exact))
    return [{name: torch.cat([one[name].flatten() for one in arm]) for name in arm[0]} for arm in zip(*results)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_eager(dtype):
    no_worse_than(*draws(dtype))


def test_autocast_is_no_worse_than_eager_and_keeps_the_residual_stream():
    no_worse_than(*draws(torch.float32, autocast=True))
    bridges, h1, states = make(dtype=torch.float32), make_h1(dtype=torch.float32), make_states(dtype=torch.float32)
    expected = run(bridges, h1, states)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(bridges, h1, [f.bfloat16() for f in states])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # and the same dtypes


def test_float16_takes_text_states_of_any_size():
    bridges, h1 = make(dtype=torch.float32).half(), make_h1(dtype=torch.float16)
    states = [(f * 1e4).half() for f in make_states(dtype=torch.float32)]
    assert states[0].abs().max() > 1e4
    found = with_gradients(run, bridges, h1, states)
    assert all(tensor.isfinite().all() for tensor in found.values())
    small = torch.stack(run(bridges, h1, [(f / 1e4).half() for f in states]))
    torch.testing.assert_close(found["h2"], small, rtol=0.01, atol=0.01)


def test_a_compiled_graph_gives_the_same():
    bridge = CrossModalBridge(**SMALL, dtype=torch.float64)
    h1, states = make_h1(), make_states()
    mask = torch.arange(T) >= torch.tensor([[2], [T], [4]])
    compiled = torch.compile(bridge, fullgraph=True, backend="aot_eager")
    results = [[y := f(h1, states, mask), *torch.autograd.grad(y.sum(), bridge.parameters())] for f in (bridge, compiled)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)
