"""Dropout's masks: the published generator, the layout that every backend shares, and where seeds come from."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastadapt import native
from fastadapt.core import backend, masked_kernel, philox
from fastadapt.core.launch import recording

CPU = torch.device("cpu")
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C++ library, or as on a machine that has none."""
    if request.param:
        assert native.load(), native.status().reason
    else:
        monkeypatch.setattr(native, "load", lambda: False)


either_way = pytest.mark.parametrize("library", [True, False], ids=["native", "torch"], indirect=True)


def as_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors, "philox4x32 10"
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_answers(counter, key, words):
    assert tuple(word.item() for word in philox.philox4x32(tuple(map(torch.tensor, counter)), key)) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_laid_out_as_documented(seed):
    p, member = 0.37, 2
    mask = philox.keep_mask(as_tensor(seed), 3, 21, p, member)
    for row in range(3):
        for column in range(21):
            counter = tuple(map(torch.tensor, (row, column // 8, member, 0)))
            words = philox.philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
            piece = words[column % 8 // 2].item() >> 16 * (column % 2) & 0xFFFF
            assert mask[row, column].item() == (piece >= round(p * 65536)), (row, column)


def test_a_smaller_mask_is_a_corner_of_a_larger_one():
    seed = as_tensor(5)
    assert torch.equal(philox.keep_mask(seed, 9, 13, 0.5), philox.keep_mask(seed, 20, 40, 0.5)[:9, :13])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_empty_masks(shape):
    assert philox.keep_mask(as_tensor(0), *shape, 0.5).shape == shape


@pytest.mark.parametrize(("p", "number"), [(0.0, 0), (0.1, 6554), (0.5, 32768), (1e-6, 0), (1 - 1e-6, 65535)])
def test_probabilities_come_in_steps_of_a_65536th(p, number):
    assert philox.threshold(p) == number
    assert philox.inv_keep(p) == 65536 / (65536 - number)


def test_no_dropout_keeps_everything():
    assert philox.keep_mask(as_tensor(3), 50, 50, 0.0).all()


class TestDrawing:
    def test_is_an_int64_on_the_device(self):
        for device in (CPU, torch.device("meta")):
            seed = philox.draw_seed(device)
            assert (seed.shape, seed.dtype, seed.device) == ((1,), torch.int64, device)

    def test_follows_and_advances_torchs_generator(self):
        torch.manual_seed(7)
        first = [philox.draw_seed(CPU).item() for _ in range(3)]
        torch.manual_seed(7)
        assert [philox.draw_seed(CPU).item() for _ in range(3)] == first
        assert len(set(first)) == 3

    def test_all_64_bits_vary(self):
        ones, zeros = 0, 0
        for _ in range(200):
            seed = philox.draw_seed(CPU).item()
            ones, zeros = ones | seed, zeros | ~seed
        assert ones == zeros == -1

    def test_compiled_draws_are_the_eager_ones(self):
        def draw() -> torch.Tensor:
            return torch.cat([philox.draw_seed(CPU), philox.draw_seed(CPU)])

        torch.manual_seed(7)
        expected = draw()
        compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
        torch.manual_seed(7)
        assert torch.equal(compiled(), expected)
        assert not torch.equal(compiled(), expected)

    def test_compilers_are_told_that_it_is_random(self):
        assert torch.Tag.nondeterministic_seeded in torch.ops.fastadapt.draw_seed.default.tags

    def test_opcheck(self):
        # what runs the operation twice and compares would compare two draws
        utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(torch.ops.fastadapt.draw_seed, (torch.empty(1, dtype=torch.int64),), test_utils=utils)


@either_way
class TestMasked:
    def test_is_x_where_kept_and_zero_elsewhere(self, library):
        x, seed = torch.randn(30, 21), as_tensor(9)
        keep = philox.keep_mask(seed, 30, 21, 0.3, member=1)
        assert torch.equal(philox.masked(x, seed, 0.3, member=1), x * keep)

    def test_what_is_dropped_is_zero_even_if_it_was_not_finite(self, library):
        x, seed = torch.full((30, 21), torch.nan), as_tensor(9)
        assert torch.equal(philox.masked(x, seed, 0.3) == 0, ~philox.keep_mask(seed, 30, 21, 0.3))

    def test_gradient_is_the_mask(self, library):
        x, seed = torch.randn(30, 21, dtype=torch.float64, requires_grad=True), as_tensor(9)
        (gradient,) = torch.autograd.grad(philox.masked(x, seed, 0.3).sum(), x)
        assert torch.equal(gradient, philox.keep_mask(seed, 30, 21, 0.3).double())


class TestMaskedKernel:
    """masked's one Triton kernel, interpreted."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(1, 1), (9, 7), (16, 300), (3, 256), (0, 5)])
    def test_is_the_mask_bit_for_bit(self, shape, dtype):
        x, seed = torch.randn(shape).to(dtype), as_tensor(123456789012345)
        x.view(-1)[:1] = torch.inf
        got = masked_kernel.masked(x, seed, philox.threshold(0.3), 2)
        assert torch.equal(got, torch.where(philox.keep_mask(seed, *shape, 0.3, 2), x, 0))

    def test_takes_a_strided_matrix(self):
        x, seed = torch.randn(21, 30).t(), as_tensor(9)
        got = masked_kernel.masked(x, seed, philox.threshold(0.3), 0)
        assert got.is_contiguous() and torch.equal(got, philox.masked(x, seed, 0.3))

    def test_is_what_a_gpu_runs(self):
        x, seed = torch.empty(4, 8, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
        with mock.patch.object(backend, "ACCELERATORS", ("meta",)), recording() as started:
            philox.masked(x, seed, 0.1)
        assert [launch.name for launch in started] == ["masked_kernel"]
