"""What the terminal shows: a progress bar throughout, and a short table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.case import AGAIN, FROZEN, PEFT
from bench.rows import Row
from bench.stats import Ratio, geometric_mean
from bench.summary import BASELINES, MAIN_CLOCKS, ORDER, STEP, by_arm, comparisons, failures, main_group, of_kind, operation


class Bar:
    """One bar for a whole job: stages have a share of it, and each is reported with its seconds when it ends."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=1.0)
        self._from, self._share = 0.0, 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, label: str, share: float) -> Iterator[None]:
        """Everything inside is `label`, and takes `share` (0 to 1) of the job."""
        self._share, start = share, time.perf_counter()
        self(label, 0.0)
        yield
        self._from += share
        self._share = 0.0
        self._progress.console.print(f"[dim]{time.perf_counter() - start:6.1f} s[/dim]  {label}")

    def __call__(self, what: str, done: float) -> None:
        """Say what happens now; `done` is the part of the current stage that is over."""
        self._progress.update(self._task, description=what, completed=self._from + done * self._share)


def seconds(value: float) -> str:
    """Three digits in the unit that suits: '1.23 s', '4.56 ms', '78.9 us'."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def table(rows: Sequence[Row]) -> Table:
    """One line for each arm of the main job: the step's time, the bytes it keeps, its kernel launches."""
    title = "LoRA on every linear of CLIP ViT-B/16: one training step"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left")
    shown.add_column("arm", no_wrap=True)
    for heading in ("right", "step", "/ PEFT (95 %)", "kept, / frozen", "launches"):
        shown.add_column(heading, justify="right", no_wrap=True)
    timed = main_group(rows)
    saved, launches = by_arm(rows, "saved", "saved_bytes"), by_arm(rows, "launches", "total_count")
    for arm in [arm for arm in ORDER if arm != AGAIN]:
        right = _right([row.status for row in rows if row.kind == "verify" and row.arm == arm])
        step = seconds(timed.rows[arm].values["median_s"]) if timed and arm in timed.rows else "-"
        against = timed.ratio(arm, PEFT) if timed and arm != PEFT else None
        beside = _ratio(against, against.sign(timed.noise)) if against else "-"
        kept = f"{saved[arm] / 1e6:.0f} MB" if arm in saved else "-"
        if {arm, FROZEN} <= set(saved):
            kept += f" {saved[arm] / saved[FROZEN]:.2f}"
        cells = [right, step, beside, kept, str(launches.get(arm, "-"))]
        if set(cells) != {"-"}:
            shown.add_row(arm, *cells)
    return shown


def _ratio(found: Ratio, verdict: str) -> str:
    """A ratio, '≈' before it where it is no difference, and its interval where it has one."""
    interval = f" ({found.low:.2f}-{found.high:.2f})" if found.low != found.high else ""
    return f"{'≈' if verdict == '≈' else ''}{found.value:.2f}{interval}"


def _right(statuses: Sequence[str]) -> str:
    """What became of an arm's proofs: 'yes' if all passed, else the first other status; '-' if there is none."""
    return next((status for status in statuses if status != "ok"), "yes") if statuses else "-"


def operations(rows: Sequence[Row]) -> Table:
    """fastadapt in units of each operation's baseline: geometric means over all cases, then the cases that were timed."""
    title = "fastadapt in units of another arm (95 %), geometric means in bold"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left")
    timed = {f"{phase}, {clock} clock": phase for phase in ("forward", "forward+backward", STEP) for clock in MAIN_CLOCKS}
    counted = {"bytes kept for backward": "kept", "peak of allocated bytes": "peak", "kernel launches": "launches"}
    found = [one for one in comparisons(rows) if one.rival in BASELINES]
    columns = {what: heading for what, heading in (timed | counted).items() if any(one.what == what for one in found)}
    shown.add_column("case")
    for heading in columns.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, rival in dict.fromkeys((operation(one.case), one.rival) for one in found):
        own = [one for one in found if operation(one.case) == name]
        means = [[one.ratio.value for one in own if one.what == what] for what in columns]
        bold = [f"[bold]{geometric_mean(values):.2f}[/bold]" if values else "-" for values in means]
        shown.add_section()
        shown.add_row(f"[bold]{name} / {rival}[/bold]", *bold)
        for case in dict.fromkeys(one.case for one in own if one.what in timed):
            cells = {one.what: _ratio(one.ratio, one.verdict) for one in own if one.case == case}
            shown.add_row(case.removeprefix(name).strip(), *(cells.get(what, "-") for what in columns))
    return shown


def notes(rows: Sequence[Row]) -> list[str]:
    """The lines under the table: the noise floor, host time, and what failed or was skipped and why."""
    timed = main_group(rows)
    lines = [f"noise floor, fastadapt against itself: {100 * timed.noise:.1f} %"] if timed else []
    lines += [
        f"host time over a frozen linear, dropout {row.params['dropout']:g}: "
        f"PEFT +{row.values['peft_us']:.0f} us, fastadapt +{row.values['fastadapt_us']:.0f} us"
        for row in of_kind(rows, "host")
    ]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in failures(rows):
        alike.setdefault((row.status, row.arm or row.kind, row.reason), []).append(row.case)
    for (status, what, reason), found in alike.items():
        where = found[0] if len(set(found)) == 1 else f"{len(set(found))} cases"
        lines.append(f"{status}: {where}, {what}: {reason}")
    return lines
