"""The page is drawn from rows alone, shows what is lost, and needs nothing beside it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import report, terminal
from bench.case import AGAIN, COMPILED, EAGER, FASTADAPT, FROZEN, PEFT, SDPA
from bench.rows import Recorder, Row
from bench.stats import summary
from bench.summary import STEP, comparisons, groups

STEPS = {FROZEN: 1.0, PEFT: 2.0, COMPILED: 1.4, FASTADAPT: 1.5, AGAIN: 1.51}
SAVED = {FROZEN: 100e6, PEFT: 200e6, FASTADAPT: 130e6}
LAUNCHES = {FROZEN: (1, 1), PEFT: (6, 8), FASTADAPT: (2, 12)}
JITTER = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01)


def time_fields(median: float) -> dict[str, Any]:
    samples = [median * jitter for jitter in JITTER]
    found = summary(samples)
    values = {"n_count": found.n, "median_s": found.median, "p20_s": found.p20, "p80_s": found.p80}
    return {"samples": samples, "values": values, "clock": "cpu"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    earlier = Recorder(tmp_path / "rows.jsonl", "earlier run", {})
    earlier("time", "an older case", PEFT, phase=STEP, **time_fields(77.0))
    record = Recorder(tmp_path / "rows.jsonl", "this run", {"device": {"name": "Some CPU"}, "torch": "9.9"})
    model = {"params": {"linears": ["q_proj"]}}
    for arm, median in STEPS.items():
        record("time", "a model", arm, phase=STEP, **time_fields(median))
    for arm, median in STEPS.items():
        record("time", "lora_linear <one>", arm, phase="forward", **time_fields(median / 1e3))
    for arm, size in SAVED.items():
        record("saved", "a model", arm, values={"saved_bytes": size}, **model)
        forward, backward = LAUNCHES[arm]
        counts = {"forward_count": forward, "backward_count": backward, "total_count": forward + backward}
        record("launches", "a model", arm, values=counts | {"kernels": {"mm": forward}}, **model)
    errors = {f"{kind}_{of}": 1e-6 for kind in ("error", "eager_error", "apart") for of in ("mean", "worst")}
    record("verify", "a model", FASTADAPT, phase="dropout 0.1", values=errors | {"tensors_count": 146})
    record("verify", "a model", "addmm-style", status="failed", reason="y: error 0.5")
    record("host", "host", "", params={"dropout": 0.0}, values={"frozen_us": 40, "peft_us": 120, "fastadapt_us": 50})
    record("compile", "a model", COMPILED, values={"compile_s": 60.0})
    record("ceiling", "machine", "", values={"copy_bytes_per_s": 2e10})
    for arch, regs, broken in ((80, 128, ""), (90, 255, "forward_kernel on sm_90: 8 spill instructions")):
        code = {"kernel": "forward_kernel", "sm": arch, "regs": regs, "shared": 98304, "spills": 8 * bool(broken)}
        code |= {"blocks/SM": 2, "tensor core": "mma", "violations": broken}
        record("static", "kernels", "", values=code)
    return tmp_path


@pytest.fixture
def page(folder: Path) -> str:
    report.write(folder)
    return (folder / "index.html").read_text()


def section(page: str, heading: str) -> str:
    return page.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]


def test_losses_are_shown(page: str) -> None:
    """fastadapt is slower than the compiled arm here, and starts as many kernels as PEFT."""
    lost = section(page, "Where fastadapt does not win")
    assert "wins 4, 1 are too close to call or equal (≈), and it loses 2" in lost
    assert re.search(r"torch\.compile</td><td[^>]*>training step, cpu clock</td>", lost)
    assert re.search(r"torch\.compile</td><td[^>]*>forward, cpu clock</td>", lost)
    assert "1.07" in lost
    assert re.search(r"PEFT</td><td[^>]*>kernel launches</td><td[^>]*>a model</td><td>≈ 1\.00", lost)
    assert "training step, cpu clock: +50 %" in lost  # over the frozen model


def test_failures_and_skips_are_shown(page: str) -> None:
    assert "y: error 0.5" in section(page, "What failed or was skipped")


def test_only_the_last_run_is_drawn(page: str) -> None:
    assert "an older case" not in page
    assert "77" not in section(page, "One training step").split("</svg>")[-1]
    assert "1 of earlier runs" in page


def test_the_page_is_self_contained_and_escaped(page: str) -> None:
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith("#") for link in links)  # glyphs and clips inside the figures themselves
    assert "lora_linear <one>" not in page
    assert "lora_linear &lt;one&gt;" in page
    assert page.count("<svg") >= 4


def test_every_section_is_there(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Is it right?",
        "One training step",
        "Bytes kept for the backward",
        "Kernel launches",
        "Host time of one linear",
        "Single operations",
        "Where fastadapt does not win",
        "What failed or was skipped",
        "The kernels&#x27; machine code",
        "How to read this",
        "Conditions",
    ]


def test_machine_code_is_laid_out_by_architecture(page: str) -> None:
    code = section(page, "The kernels&#x27; machine code")
    assert '<td class="text">128 regs, 96 KiB, 2/SM, mma</td>' in code
    assert '<td class="text failed">255 regs, 96 KiB, 2/SM, mma, 8 spills</td>' in code
    assert "Broken budgets: forward_kernel on sm_90" in code


def test_compiling_is_weighed_against_what_it_gains(page: str) -> None:
    assert "took 60 s" in page
    assert "earn that back after 100 of them" in page  # 60 s at 0.6 s a step


def test_the_same_rows_draw_the_same_page(folder: Path, page: str) -> None:
    report.write(folder)
    assert (folder / "index.html").read_text() == page


def test_a_page_of_nothing_but_a_failure(tmp_path: Path) -> None:
    Recorder(tmp_path / "rows.jsonl", "run", {})("verify", "case", PEFT, status="oom", reason="no memory")
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "no memory" in page
    assert "Of 0 comparisons" in page


def test_comparisons_never_mix_cases_or_clocks() -> None:
    def row(case: str, arm: str, clock: str, median: float) -> Row:
        return Row("run", "time", case, arm, phase=STEP, **time_fields(median) | {"clock": clock})

    rows = [row("a", PEFT, "cpu", 2.0), row("b", FASTADAPT, "cpu", 1.0), row("a", FASTADAPT, "wall", 1.0)]
    assert comparisons(rows) == []
    assert len(groups(rows)) == 3


@pytest.fixture
def attention(tmp_path: Path) -> list[Row]:
    """The page's rows of an operation that has no frozen part: fastadapt in half of eager's time, SDPA in a quarter."""
    record = Recorder(tmp_path / "rows.jsonl", "this run", {"device": {"name": "Some CPU"}})
    for arm, median in {EAGER: 4e-3, SDPA: 1e-3, FASTADAPT: 2e-3, AGAIN: 2e-3}.items():
        record("time", "prior_attention <one>", arm, phase="forward", **time_fields(median))
    for arm, size in {EAGER: 9e6, FASTADAPT: 3e6}.items():
        record("saved", "prior_attention two", arm, values={"saved_bytes": size})
        values = {"forward_count": 2, "backward_count": 1, "total_count": 3, "kernels": {}}
        record("launches", "prior_attention two", arm, values=values)
    record("verify", "prior_attention <one>", "xformers", status="skipped", reason="no GPU")
    record("verify", "prior_attention two", "xformers", status="skipped", reason="no GPU")
    return report.write(tmp_path)


def test_without_a_frozen_part_ratios_are_given_against_eager(attention: list[Row], tmp_path: Path) -> None:
    shown = section((tmp_path / "index.html").read_text(), "Single operations")
    assert "time in units of eager" in shown
    assert "0.50 of eager&#x27;s (1 cases), 2.00 of SDPA&#x27;s (1 cases)" in shown
    assert "/ eager (95 %)" in shown and "/ frozen" not in shown
    assert re.search(r"<td[^>]*>two</td><td>9\.0 MB, 2 \+ 1</td><td>3\.0 MB, 2 \+ 1</td>", shown)


def test_what_another_arm_does_faster_is_listed_as_lost(attention: list[Row], tmp_path: Path) -> None:
    lost = section((tmp_path / "index.html").read_text(), "Where fastadapt does not win")
    assert re.search(r"SDPA</td><td[^>]*>forward, cpu clock</td><td[^>]*>prior_attention &lt;one&gt;</td><td>2\.00", lost)


def test_the_terminal_shows_operations_beside_their_baseline(attention: list[Row]) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal.operations(attention))
    text = console.export_text()
    assert re.search(r"prior_attention / eager +0\.50 +0\.33 +1\.00", text)
    assert re.search(r"<one> +0\.50 +- +-", text)
    assert terminal.notes(attention) == ["skipped: 2 cases, xformers: no GPU"]


def test_the_terminal_table_is_the_same_story(folder: Path) -> None:
    rows = report.write(folder)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal.table(rows))
    text = console.export_text()
    assert re.search(r"fastadapt +yes +1\.5 s +0\.75 \(0\.\d\d-0\.\d\d\) +130 MB 1\.30 +14 ", text)
    assert "failed: a model, addmm-style: y: error 0.5" in terminal.notes(rows)
