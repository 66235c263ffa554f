"""Starting kernels, seeing what would be started, and which architecture configurations see."""

from __future__ import annotations

import weakref
from dataclasses import FrozenInstanceError

import pytest
import torch

from fastadapt.core.launch import Launch, arch_of, gpu_name, interpreting, launch, processors, recording, target

CPU, META = torch.device("cpu"), torch.device("meta")


class Kernel:
    """What a @triton.jit function is to its caller; remembers how it was started."""

    def __init__(self) -> None:
        self.started: list[tuple] = []

    def fn(self) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **meta: self.started.append((grid, args, meta))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_a_kernel_is_started_with_its_arguments(kernel: Kernel):
    launch(kernel, [3, 2], 1, (2, None), device=CPU, BLOCK=8, num_warps=4)
    assert kernel.started == [((3, 2), (1, (2, None)), {"BLOCK": 8, "num_warps": 4})]


@pytest.mark.parametrize("grid", [(0,), (4, 0), (0, 0)])
def test_an_empty_grid_starts_and_records_nothing(kernel: Kernel, grid: tuple[int, ...]):
    with recording() as log:
        launch(kernel, grid, device=CPU)
    assert kernel.started == log == []


def test_on_meta_launches_are_recorded_and_nothing_starts(kernel: Kernel):
    launch(kernel, (1,), device=META)
    with recording() as log:
        launch(kernel, (2,), 5, device=META, BLOCK=8)
    assert log == [Launch(kernel, (2,), (5,), {"BLOCK": 8})]
    assert log[0].name == "fn" and kernel.started == []
    with pytest.raises(FrozenInstanceError):
        log[0].grid = (3,)


def test_recording_elsewhere_starts_too(kernel: Kernel):
    with recording() as log:
        launch(kernel, (2,), device=CPU)
    assert len(log) == len(kernel.started) == 1


def test_nested_recordings_each_see_their_own(kernel: Kernel):
    with recording() as outer:
        launch(kernel, (1,), device=META)
        with recording() as inner:
            launch(kernel, (2,), device=META)
        launch(kernel, (3,), device=META)
    launch(kernel, (4,), device=META)
    assert [start.grid for start in outer] == [(1,), (2,), (3,)]
    assert [start.grid for start in inner] == [(2,)]


def test_recording_without_arguments_keeps_no_tensor_alive(kernel: Kernel):
    """Held by a recording, a gradient would be copied where autograd takes it over."""
    tensor = torch.empty(4)
    kept = weakref.ref(tensor)
    with recording(arguments=False) as log:
        launch(kernel, (2,), tensor, device=META, BLOCK=8)
    del tensor
    assert log == [Launch(kernel, (2,), (), {"BLOCK": 8})] and kept() is None
    with recording() as log:
        launch(kernel, (2,), 5, device=META)
    assert log[0].args == (5,)


def test_recording_ends_with_an_error_too(kernel: Kernel):
    with pytest.raises(KeyError), recording() as log:
        raise KeyError
    launch(kernel, (1,), device=META)
    assert log == []


def test_target_is_what_configurations_see_off_a_gpu():
    assert arch_of(CPU) == arch_of(META) == 90
    with target(80):
        assert arch_of(META) == 80
        with target(120):
            assert arch_of(META) == 120
        assert arch_of(CPU) == 80
    with pytest.raises(KeyError), target(80):
        raise KeyError
    assert arch_of(META) == 90


def test_what_is_no_gpu_has_no_name_and_an_h200s_processors():
    assert (gpu_name(META), processors(META)) == ("", 132)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), (None, False)])
def test_interpreting(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() is expected
