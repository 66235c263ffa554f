"""The interpreter computes bfloat16 as a GPU does, and catches every access outside a kernel's arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastadapt.core.launch import interpreting
from fastadapt.prove import interpreter
from tests.prove import kernels

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    interpreter.install()
    interpreter.install()  # a second time changes nothing


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal as bits, except that any NaN equals any NaN."""
    assert got.dtype == expected.dtype == BF16
    both_nan = got.isnan() & expected.isnan()
    differing = (got.view(torch.int16) != expected.view(torch.int16)) & ~both_nan
    assert not differing.any(), f"{int(differing.sum())} differ: {got[differing]} is not {expected[differing]}"


def hard_float32() -> torch.Tensor:
    """Every upper half of a float32 beside lower halves around the rounding tie; infinities and NaNs are among them."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0x0000, 0x7FFF, 0x8000, 0x8001])
    bits = (upper[:, None] + lower).flatten()
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    kernels.cast[(-(-x.numel() // 65536),)](x, y, x.numel(), BLOCK=65536)
    return y


class TestBfloat16:
    def test_cast_from_float32_rounds_to_nearest_even(self) -> None:
        x = hard_float32()
        assert_same_bits(cast(x, BF16), x.to(BF16))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64])
    def test_cast_from(self, dtype: torch.dtype) -> None:
        x = (torch.randn(1000, dtype=torch.float64) * 1000).to(dtype)
        assert_same_bits(cast(x, BF16), x.to(BF16))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32])
    def test_cast_to(self, dtype: torch.dtype) -> None:
        x = (torch.randn(1000) * 1000).to(BF16)
        assert torch.equal(cast(x, dtype), x.to(dtype))

    def test_cast_to_itself(self) -> None:
        x = torch.randn(100).to(BF16)
        assert_same_bits(cast(x, BF16), x)

    @pytest.mark.parametrize(("mode", "expected"), [("rtne", 1.0078125), ("rtz", 1.0)])
    def test_cast_with_a_named_rounding(self, mode: str, expected: float) -> None:
        x = torch.full((16,), 1.007)
        y = torch.empty(16, dtype=BF16)
        kernels.cast_rounding[(1,)](x, y, MODE=mode, BLOCK=16)
        assert y.tolist() == [expected] * 16

    def test_arithmetic(self) -> None:
        a, b = torch.randn(2, 1024).to(BF16)
        out = torch.empty(9, 1024, dtype=BF16)
        kernels.arithmetic[(1,)](a, b, out, BLOCK=1024)
        less = a < b
        scaled = a * torch.tensor(1.7, dtype=BF16)  # a Python scalar takes the block's type before it multiplies
        chosen = [torch.maximum(a, b), less.to(BF16), torch.where(less, a, b)]
        assert_same_bits(out, torch.stack([a + b, a - b, a * b, scaled, -a, a.abs(), *chosen]))

    def test_fused_multiply_add_rounds_once(self) -> None:
        a, b, c = torch.randn(3, 1024).to(BF16)
        out = torch.empty_like(a)
        kernels.fused_multiply_add[(1,)](a, b, c, out, BLOCK=1024)
        assert_same_bits(out, (a.float() * b.float() + c.float()).to(BF16))

    def test_constant(self) -> None:
        out = torch.empty(16, dtype=BF16)
        kernels.constant[(1,)](out, BLOCK=16)
        assert_same_bits(out, torch.full((16,), 1.7, dtype=BF16))

    def test_dot_is_exact_products_summed_in_float32(self) -> None:
        x, w = torch.randn(70, 130).to(BF16), torch.randn(50, 130).to(BF16)
        y = torch.empty(70, 50)
        kernels.matmul[(3, 2)](x, w, y, 70, 50, 130, 130, 1, 130, 50, BM=32, BN=32, BK=32)
        torch.testing.assert_close(y, (x.double() @ w.double().T).float(), rtol=1e-5, atol=1e-5)

    def test_sum_rounds_each_partial_of_a_tree(self) -> None:
        x = torch.randn(16, 64).to(BF16)

        def tree(values: torch.Tensor) -> torch.Tensor:
            while values.shape[-1] > 1:
                left, right = values.chunk(2, dim=-1)
                values = left + right
            return values[..., 0]

        by_row, by_column, total = (torch.empty(n, dtype=BF16) for n in (16, 64, 1))
        kernels.sums[(1,)](x, by_row, by_column, total, ROWS=16, COLUMNS=64)
        assert_same_bits(by_row, tree(x))
        assert_same_bits(by_column, tree(x.T))
        assert_same_bits(total[0], tree(tree(x.T)))

    def test_float32_sum_is_left_alone(self) -> None:
        x = torch.randn(16, 64)
        by_row, by_column, total = (torch.empty(n) for n in (16, 64, 1))
        kernels.sums[(1,)](x, by_row, by_column, total, ROWS=16, COLUMNS=64)
        torch.testing.assert_close((by_row, by_column, total[0]), (x.sum(1), x.sum(0), x.sum()))

    def test_max(self) -> None:
        x = -torch.rand(16, 64).to(BF16)  # negative: as raw bits, the largest is the smallest
        out = torch.empty(16, dtype=BF16)
        kernels.row_max[(1,)](x, out, ROWS=16, COLUMNS=64)
        assert_same_bits(out, x.amax(1))


def copy(x: torch.Tensor, y: torch.Tensor, loads: int, stores: int, shift: int = 0) -> None:
    kernels.copy[(1,)](x, y, loads, stores, shift, BLOCK=32)


def copy_2d(x: torch.Tensor, kernel: object = kernels.copy_2d) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    kernel[(1,)](x, y, *x.shape, *x.stride(), BR=4, BC=8)
    return y


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of a (16, 16) tensor, each (3, 7)
    "sliced": lambda base: base[:3, :7],
    "stepped": lambda base: base[1:4, 1::2][:, :7],
    "transposed": lambda base: base[:7, :3].T,
    "expanded rows": lambda base: base[:1, :7].expand(3, 7),
    "expanded columns": lambda base: base[:3, :1].expand(3, 7),
    "windows": lambda base: base.flatten()[:9].unfold(0, 7, 1),
    "contiguous": lambda base: base.flatten()[:21].view(3, 7),
    "nested the other way": lambda base: base.as_strided((3, 7), (2, 20)),
    "interleaved": lambda base: base.as_strided((3, 7), (3, 4)),
}


class TestBounds:
    def test_load_one_past_the_end(self) -> None:
        with pytest.raises(IndexError, match=r"load .* 1 of 21 active .* 0 bytes past the end of `x` \(shape \(20,\)"):
            copy(torch.empty(20), torch.empty(32), loads=21, stores=20)

    def test_store_one_past_the_end(self) -> None:
        with pytest.raises(IndexError, match=r"store in program \(0, 0, 0\): 1 of 21 .* 0 bytes past the end of `y`"):
            copy(torch.empty(32), torch.empty(20), loads=20, stores=21)

    def test_load_before_the_start(self) -> None:
        with pytest.raises(IndexError, match="8 bytes before the start of `x`"):
            copy(torch.empty(32)[2:], torch.empty(32), loads=20, stores=20, shift=-2)

    def test_element_that_crosses_the_end(self) -> None:
        half = torch.empty(41, dtype=torch.int8)[:40].view(torch.int32)
        copy(half, torch.empty(32, dtype=torch.int32), loads=10, stores=10)
        with pytest.raises(IndexError, match="1 of 11"):
            copy(half, torch.empty(32, dtype=torch.int32), loads=11, stores=10)

    def test_masked_lanes_may_point_anywhere(self) -> None:
        x, y = torch.arange(20.0), torch.zeros(20)
        copy(x, y, loads=20, stores=20)
        assert torch.equal(x, y)

    def test_empty_tensor_has_no_element(self) -> None:
        copy(torch.empty(0), torch.empty(0), loads=0, stores=0)
        with pytest.raises(IndexError, match=r"shape \(0,\)"):
            copy(torch.empty(0), torch.empty(32), loads=1, stores=0)

    def test_broken_matmul_is_caught(self) -> None:
        x, w, y = torch.ones(16, 16), torch.ones(24, 16), torch.empty(16, 24)
        with pytest.raises(IndexError, match="store .* 1 of 400 active lanes .* past the end of `y`"):
            kernels.matmul_one_column_too_many[(1,)](x, w, y, 16, 24, 16, 16, 16, 24, BM=16, BN=32)

    def test_gap_between_rows_belongs_to_no_view(self) -> None:
        x, w, y = torch.ones(15, 16), torch.ones(24, 16), torch.empty(16, 32)[:15, :24]
        with pytest.raises(IndexError, match="store .* 15 of 375 .* at byte 96, which is no element, of `y`"):
            kernels.matmul_one_column_too_many[(1,)](x, w, y, 15, 24, 16, 16, 16, 32, BM=16, BN=32)

    def test_second_program_is_named(self) -> None:
        x = torch.zeros(100)
        with pytest.raises(IndexError, match=r"load in program \(1, 0, 0\): 28 of 64"):
            kernels.cast[(2,)](x, torch.empty(128), 128, BLOCK=64)

    def test_error_inside_a_device_function(self) -> None:
        with pytest.raises(IndexError, match="load .* 1 of 32"):
            kernels.copy_through_helper[(1,)](torch.empty(32), torch.empty(32), BLOCK=32)

    def test_atomic(self) -> None:
        total = torch.zeros(2, dtype=torch.int32)
        kernels.count[(3,)](total, SLOT=1)
        assert total.tolist() == [0, 3]
        with pytest.raises(IndexError, match="atomic .* past the end of `total`"):
            kernels.count[(3,)](total, SLOT=2)

    def test_tuple_and_none_arguments(self) -> None:
        x, bias, y = torch.randn(20), torch.randn(20), torch.empty(20)
        kernels.copy_chosen[(1,)]((torch.empty(3), x), bias, y, 20, WHICH=1, BLOCK=32)
        assert torch.equal(y, x + bias)
        kernels.copy_chosen[(1,)]((torch.empty(3), x), None, y, 20, WHICH=1, BLOCK=32)
        assert torch.equal(y, x)
        with pytest.raises(IndexError, match=r"`sources\[1\]`"):
            kernels.copy_chosen[(1,)]((torch.empty(3), x[:19]), None, y, 20, WHICH=1, BLOCK=32)

    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    def test_valid_views_pass(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x = view(torch.randn(16, 16))
        assert torch.equal(copy_2d(x), x)

    def test_offsets_past_two_to_the_31(self) -> None:
        x = torch.empty_strided((3, 2), ((1 << 30) + 7, 1), dtype=torch.int8)  # 2 GiB of addresses, six bytes touched
        x.copy_(torch.arange(6).view(3, 2))
        assert torch.equal(copy_2d(x), x)

    def test_int32_offset_that_wraps_is_caught(self) -> None:
        x = torch.empty_strided((3, 2), ((1 << 30) + 7, 1), dtype=torch.int8)
        with pytest.raises(IndexError, match="2 of 6 active lanes .* before the start of `x`"):
            copy_2d(x, kernels.copy_2d_int32)
