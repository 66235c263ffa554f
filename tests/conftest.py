"""What every test shares: how Triton kernels run in this process, seeds, threads, a summary that hides nothing."""

from __future__ import annotations

import os

import torch

# before anything imports triton, which decides at import how its kernels run
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from collections import Counter  # noqa: E402

import pytest  # noqa: E402

INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"
LEFT_OUT = pytest.StashKey[int]()

# compiling kernels needs a process in which they are not interpreted
collect_ignore = ["codegen"] if INTERPRETING else []


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = 0
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if INTERPRETING:
        from fastadapt.prove import interpreter

        interpreter.install()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


# Under xdist each worker collects, and the controller writes the summary.
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    stash = node.config.stash
    stash[LEFT_OUT] = max(stash[LEFT_OUT], getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
    if config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} left out: they need a CUDA device")
