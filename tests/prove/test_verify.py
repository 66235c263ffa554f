"""`fastadapt verify` lets right kernels through, and finds wrong ones out, whatever way they are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastadapt.kernels.lora_linear import cases as lora_linear
from fastadapt.prove import verify
from fastadapt.prove.cases import Cases
from fastadapt.prove.verify import Check

CPU = torch.device("cpu")
GOOD = torch.linspace(-1, 1, 64)


def operation(result: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor] = torch.clone) -> Cases:
    """An operation y = 2 x with one case; its kernel gives `result` of the right y, and `mask` of the right mask."""

    def run(case: SimpleNamespace, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        y = tensors["x"] * 2
        return {"y": result(y) if backend == "triton" else y}

    keep = torch.arange(64) % 3 > 0
    return SimpleNamespace(
        BACKENDS=["triton"],
        EDGES=[SimpleNamespace(name="a case")],
        SHIPPED=[],
        inputs=lambda case, device: {"x": GOOD.clone()},
        run=run,
        masks=lambda device, backend: {"mask of y": (mask(keep), keep)},
    )


def check(cases: Cases) -> list[Check]:
    return verify.run({"double": cases}, CPU)


def test_right() -> None:
    masks, values = check(operation(torch.clone))
    assert masks == Check("double", "triton", "dropout masks")
    assert values == Check("double", "triton", "a case", error=0.0, eager_error=0.0)


def test_every_case_and_operation_is_checked() -> None:
    two = operation(torch.clone)
    two.EDGES = [SimpleNamespace(name="first"), SimpleNamespace(name="second")]
    checks = verify.run({"one": operation(torch.clone), "two": two}, CPU)
    assert [(check.operation, check.what) for check in checks] == [
        ("one", "dropout masks"), ("one", "a case"), ("two", "dropout masks"), ("two", "first"), ("two", "second"),
    ]  # fmt: skip


def one_wrong_element(y: Tensor) -> Tensor:
    y[5] += 0.1
    return y


def never_the_same(y: Tensor) -> Tensor:
    return y + torch.randn(()) * 1e-8


def left_unwritten(y: Tensor) -> Tensor:
    result = torch.empty_like(y)
    result[:-1] = y[:-1]
    return result


def out_of_bounds(y: Tensor) -> Tensor:
    raise IndexError("load in program (0, 0, 0)")


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (one_wrong_element, "y: error"),
        (never_the_same, "y: two calls differ"),
        (left_unwritten, "y: error inf"),
        (out_of_bounds, "IndexError: load in program (0, 0, 0)"),
    ],
)
def test_wrong_values(result: Callable[[Tensor], Tensor], reason: str) -> None:
    masks, values = check(operation(result))
    assert masks.reason == ""
    assert values.reason.startswith(reason)


def test_an_operation_without_dropout_has_no_masks_to_check() -> None:
    cases = operation(torch.clone)
    del cases.masks
    assert [check.what for check in check(cases)] == ["a case"]


def test_backends_that_the_operation_lacks_are_not_checked() -> None:
    cases = operation(torch.clone)
    cases.BACKENDS = []
    assert check(cases) == []


def test_wrong_masks() -> None:
    masks, values = check(operation(torch.clone, mask=lambda keep: keep.roll(1)))
    assert masks.reason == "mask of y: 42 elements differ"
    assert values.reason == ""


def test_a_kernel_of_ours() -> None:
    chosen = {"BACKENDS": ["triton"], "EDGES": lora_linear.EDGES[1:2], "SHIPPED": []}
    some = SimpleNamespace(**vars(lora_linear) | chosen)
    checks = verify.run({"lora_linear": some}, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert [check.reason for check in checks] == ["", ""]


@pytest.mark.parametrize(("result", "status"), [(torch.clone, 0), (one_wrong_element, 1)])
def test_the_command_tells_in_every_way(monkeypatch, tmp_path, capsys, result, status) -> None:
    monkeypatch.setattr(verify, "operations", lambda: {"double": operation(result)})
    with pytest.raises(SystemExit) as exit_:
        verify.main(["--json", str(tmp_path / "checks.json")])
    assert exit_.value.code == status
    written = json.loads((tmp_path / "checks.json").read_text())
    assert [row["what"] for row in written] == ["dropout masks", "a case"]
    assert (written[1]["reason"] != "") == bool(status)
    printed = capsys.readouterr().out
    assert printed.split().count("right") == 2 - status
    assert ("double, triton, a case: y: error" in printed) == bool(status)
