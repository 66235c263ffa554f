"""Where numbers come from, and the state of the machine around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import ceilings, nvml, provenance

CPU = torch.device("cpu")


def test_it_names_all_that_numbers_depend_on_and_is_json() -> None:
    found = provenance.collect(CPU, seed=7, config={"rounds": 5})
    expected = {"git", "kernel_sources", "config", "seed", "torch", "triton", "peft", "native", "device", "environment"}
    assert expected <= set(found)
    assert found["seed"] == 7
    assert found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_another_configuration_has_another_hash() -> None:
    hashes = {provenance.collect(CPU, 0, {"rounds": rounds})["config"] for rounds in (5, 6, 5)}
    assert len(hashes) == 2


def test_a_changed_kernel_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    kernels = tmp_path / "fastadapt" / "kernels"
    kernels.mkdir(parents=True)
    hashes = []
    for source in ("x = 1", "x = 2", "x = 1"):
        (kernels / "triton_kernel.py").write_text(source)
        hashes.append(provenance.collect(CPU, 0, {})["kernel_sources"])
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]


def test_outside_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.collect(CPU, 0, {})["git"] == "unknown"


def test_no_gpu_no_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvml.sensor()() == {}
    assert nvml.around({}, {}) == {}


@pytest.mark.parametrize("after, moved", [(1980, False), (1950, False), (1900, True), (2050, True)])
def test_a_moving_clock_is_flagged(after: int, moved: bool) -> None:
    assert nvml.around({"sm_clock_mhz": 1980}, {"sm_clock_mhz": after})["sm_clock_moved"] is moved


def test_ceilings_are_plausible() -> None:
    """Any machine copies more than 100 MB/s and less than 100 TB/s, and multiplies faster than it copies."""
    found = ceilings.measure(CPU)
    assert 1e8 < found["copy_bytes_per_s"] < 1e14
    assert found["float32_flops_per_s"] > found["copy_bytes_per_s"]


def test_the_roofline_is_the_larger_of_two_times() -> None:
    limits = {"copy_bytes_per_s": 10.0, "float32_flops_per_s": 100.0}
    assert ceilings.roofline(flops=200, bytes_min=5, dtype=torch.float32, ceilings=limits) == 2.0
    assert ceilings.roofline(flops=20, bytes_min=50, dtype=torch.float32, ceilings=limits) == 5.0
