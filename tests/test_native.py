"""The C++ dropout equals Philox4x32-10 written from its publication, bit for bit."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastadapt import native
from fastadapt.core import philox

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    assert native.load(), native.status().reason


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, from Salmon et al., SC 2011, section 3.3 and Random123's constants."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ low, right & 0xFFFFFFFF, left >> 32 ^ d ^ high, left & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def piece(row: int, column: int, member: int, seed: int) -> int:
    word = philox4x32((row, column // 8, member, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[column % 8 // 2]
    return word >> 16 if column % 2 else word & 0xFFFF


def expected_mask(seed: int, rows: int, cols: int, threshold: int, member: int) -> torch.Tensor:
    kept = [[piece(row, column, member, seed) >= threshold for column in range(cols)] for row in range(rows)]
    return torch.tensor(kept, dtype=torch.bool).reshape(rows, cols)


def as_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int64)


def masked(x: torch.Tensor, seed: int, threshold: int, member: int = 0) -> torch.Tensor:
    return torch.ops.fastadapt_native.masked(x, as_tensor(seed), threshold, member)


def keep_mask(seed: int, rows: int, cols: int, threshold: int, member: int = 0) -> torch.Tensor:
    return torch.ops.fastadapt_native.keep_mask(as_tensor(seed), rows, cols, threshold, member)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    bits = BITS[expected.dtype]
    assert got.dtype == expected.dtype and got.is_contiguous()
    assert torch.equal(got.view(bits), expected.contiguous().view(bits))


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
def test_the_tests_own_philox_gives_the_published_answers(counter, key, words):
    assert philox4x32(counter, key) == words


def test_the_published_answer_for_zeros_comes_out_of_the_library():
    for column, number in enumerate([0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]):
        assert keep_mask(0, 1, 8, threshold=number)[0, column]
        assert not keep_mask(0, 1, 8, threshold=number + 1)[0, column]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 127, 128, 129, 300])
def test_keep_mask(seed, cols):
    assert torch.equal(keep_mask(seed, 5, cols, 6554, member=2), expected_mask(seed, 5, cols, 6554, 2))


@pytest.mark.parametrize("member", [0, 1, 3, 2**32 - 1])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99999])
def test_keep_mask_equals_the_torch_definition(p, member):
    seed = philox.draw_seed(torch.device("cpu"))
    got = torch.ops.fastadapt_native.keep_mask(seed, 67, 203, philox.threshold(p), member)
    assert torch.equal(got, philox.keep_mask(seed, 67, 203, p, member))
    assert got.all() == (p == 0)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 128), (2, 261), (50, 17)], ids=str)
def test_masked(dtype, shape):
    x = torch.randn(shape).to(dtype)
    expected = torch.where(expected_mask(77, *shape, 20000, 1), x, torch.zeros((), dtype=dtype))
    assert_same_bits(masked(x, 77, 20000, member=1), expected)


LAYOUTS = {
    "transposed": lambda: torch.randn(30, 21).T,
    "sliced columns": lambda: torch.randn(21, 90)[:, 7:37],
    "every third column": lambda: torch.randn(21, 90)[:, ::3],
    "every second row": lambda: torch.randn(42, 30)[::2],
    "one row expanded": lambda: torch.randn(1, 30).expand(21, 30),
    "one column expanded": lambda: torch.randn(21, 1).expand(21, 30),
    "negated lazily": lambda: torch._neg_view(torch.randn(21, 30)),
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_reads_any_strides(layout, dtype):
    x = LAYOUTS[layout]().to(dtype)
    expected = torch.where(expected_mask(5, 21, 30, 30000, 0), x, torch.zeros((), dtype=dtype)).resolve_neg()
    assert_same_bits(masked(x, 5, 30000), expected)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_nothing_to_mask(shape):
    assert masked(torch.randn(shape), 0, 100).shape == shape
    assert keep_mask(0, *shape, 100).shape == shape


def test_dropped_elements_are_plus_zero_whatever_they_were():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, -1.0]).repeat(40, 30)
    y = masked(x, 3, 65536)
    assert_same_bits(y, torch.zeros_like(x))
    assert_same_bits(masked(x, 3, 0), x)


def test_threads_share_the_work_without_changing_it():
    x, threads = torch.randn(5000, 200), torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(masked(x, 9, 6554))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "x: expected 2 dimensions .* got 1"),
        ({"x": torch.zeros(2, 2, dtype=torch.int32)}, "x: expected float64, .* got Int"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected one int64 element, got 2 of Long"),
        ({"seed": torch.zeros(1)}, "seed: expected one int64 element, got 1 of Float"),
        ({"threshold": -1}, "threshold: expected 0 to 65536, got -1"),
        ({"threshold": 65537}, "threshold: expected 0 to 65536, got 65537"),
        ({"member": -1}, "member: expected 0 to 2.32 - 1, got -1"),
        ({"member": 2**32}, "member: expected 0 to 2.32 - 1, got 4294967296"),
    ],
)
def test_masked_names_the_bad_argument(change, message):
    good = {"x": torch.zeros(2, 2), "seed": as_tensor(0), "threshold": 100, "member": 0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastadapt_native.masked(*(good | change).values())


@pytest.mark.parametrize(("rows", "cols", "message"), [(-1, 2, "rows: .* got -1"), (2, -3, "cols: .* got -3")])
def test_keep_mask_names_the_bad_argument(rows, cols, message):
    with pytest.raises(RuntimeError, match=message):
        keep_mask(0, rows, cols, 100)


def test_opcheck():
    ops = torch.ops.fastadapt_native
    torch.library.opcheck(ops.masked.default, (torch.randn(9, 30).T, as_tensor(4), 6554, 0))
    torch.library.opcheck(ops.keep_mask.default, (as_tensor(4), 9, 30, 6554, 0))


class TestFindingTheLibrary:
    """`native` on folders of its own, so that nothing here touches the library in use."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NVCC", "")
        monkeypatch.setattr(native, "PACKAGE", tmp_path / "package")

    def test_not_built(self):
        found = native._find_and_load()
        assert not found.loaded and found.path is None and "python -m fastadapt.native" in found.reason

    def test_a_file_that_does_not_load_is_reported(self):
        library = native.cache_folder() / native.library_name()
        library.parent.mkdir()
        library.write_bytes(b"not a library")
        found = native._find_and_load()
        assert not found.loaded and found.path == library and "cannot load" in found.reason

    def test_other_sources_have_another_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        name = native.library_name()
        copy = tmp_path / "csrc"
        copy.mkdir()
        for source in native.SOURCES.iterdir():
            (copy / source.name).write_bytes(source.read_bytes())
        monkeypatch.setattr(native, "SOURCES", copy)
        assert native.library_name() == name
        (copy / "dropout.cpp").write_text("// changed\n")
        assert native.library_name() != name

    @pytest.mark.parametrize(("file", "kinds"), [("ptx.cuh", {"cuda"}), ("matrix.h", {"kernels", "autograd", "cuda"})])
    def test_a_changed_header_renames_what_includes_it(self, file: str, kinds: set, tmp_path: Path, monkeypatch):
        names = {kind: native.library_name(kind) for kind in native.FLAGS}
        copy = shutil.copytree(native.SOURCES, tmp_path / "csrc")
        (copy / file).write_text("// changed\n")
        monkeypatch.setattr(native, "SOURCES", copy)
        assert {kind for kind in native.FLAGS if native.library_name(kind) != names[kind]} == kinds

    def test_building_without_a_compiler_says_so(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", "no-such-compiler -O0")
        with pytest.raises(RuntimeError, match="'no-such-compiler' not found"):
            native.build()

    def test_a_failing_compiler_is_quoted_and_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", "g++ -include no-such-header.h")
        with pytest.raises(RuntimeError, match=r"(?s)failed:.*no-such-header\.h"):
            native.build()
        assert list(native.cache_folder().iterdir()) == []

    def test_an_nvcc_that_is_not_there_is_named_and_costs_no_other_library(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", sys.executable + " -c pass")
        monkeypatch.setenv("NVCC", "no-such-nvcc")
        monkeypatch.setattr(native.os, "replace", lambda unfinished, library: library.touch())
        with pytest.raises(RuntimeError, match="no CUDA compiler: 'no-such-nvcc' not found .set NVCC"):
            native.build()
        built = {path.name for path in native.cache_folder().glob("*.so")}
        assert built == {native.library_name("kernels"), native.library_name("autograd")}


class TestFindingNvcc:
    @pytest.fixture(autouse=True)
    def _nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NVCC", raising=False)
        monkeypatch.delenv("CUDA_HOME", raising=False)

    @staticmethod
    def having(*files: str):
        return lambda name, path=None: next((file for file in files if file == f"{path or 'PATH'}/{name}"), None)

    @pytest.mark.parametrize(
        ("files", "environment", "found"),
        [
            ([], {}, None),
            (["PATH/nvcc", "/home/bin/nvcc"], {"CUDA_HOME": "/home"}, "PATH/nvcc"),
            (["/home/bin/nvcc", "/usr/local/cuda/bin/nvcc"], {"CUDA_HOME": "/home"}, "/home/bin/nvcc"),
            (["/usr/local/cuda/bin/nvcc"], {}, "/usr/local/cuda/bin/nvcc"),
            (["PATH/nvcc"], {"NVCC": "mine -v"}, "mine -v"),
            (["PATH/nvcc"], {"NVCC": ""}, None),
        ],
    )
    def test_places_in_their_order(self, files: list, environment: dict, found: str | None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(native.shutil, "which", self.having(*files))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert native.find_nvcc() == found

    def test_pips_packages_come_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "nvidia" / "cu13" / "bin").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(native.shutil, "which", self.having(f"{tmp_path}/nvidia/cu13/bin/nvcc"))
        assert native.find_nvcc() == f"{tmp_path}/nvidia/cu13/bin/nvcc"


@pytest.mark.parametrize(
    ("loaded", "cuda", "torch_cuda", "nvcc", "reason"),
    [
        (False, False, "13.0", None, r"the C\+\+ library is not built: a reason"),
        (True, True, None, None, r"this torch \(.*\) has no CUDA"),
        (True, False, "13.0", None, "the CUDA kernels are not built, and there is no nvcc to build them"),
        (True, False, "13.0", "nvcc", "the CUDA kernels are not built: `python -m fastadapt.native` builds them"),
        (True, True, "13.0", None, None),
    ],
)
def test_why_there_are_no_cuda_kernels(loaded, cuda, torch_cuda, nvcc, reason, monkeypatch: pytest.MonkeyPatch):
    found = native.Status(loaded, None, "" if loaded else "not built: a reason", cuda=cuda)
    monkeypatch.setattr(native, "status", lambda: found)
    monkeypatch.setattr(native, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    told = native.cuda_reason()
    assert told is None if reason is None else re.fullmatch(reason, told)
