"""Figures as inline SVG.  Each is drawn from summaries of rows and from nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.case import (
    ADDMM, AGAIN, CHANNELS_LAST, COMPILED, CUDNN_ARMS, EAGER, FASTADAPT, FROZEN, GRAPHED, ONE_BY_ONE, PEFT, RELEASED, SDPA,
    STACKED, STRONG, XFORMERS,
)  # fmt: skip
from bench.summary import Group, operation

INK, FAINT = "#1f2933", "#9aa5b1"
COLOURS = {  # told apart without colour vision, and in grey
    FROZEN: "#7b8794",
    PEFT: "#d55e00",
    RELEASED: "#d55e00",  # PEFT's place, in cases that have no PEFT
    STRONG: "#e69f00",  # ADDMM's place, in cases that are methods
    EAGER: "#d55e00",
    SDPA: "#009e73",
    XFORMERS: "#f0e442",
    CHANNELS_LAST: "#009e73",  # SDPA's place, in cases that are no attention
    **dict.fromkeys(CUDNN_ARMS, "#56b4e9"),  # one colour, as each has its name beside it
    STACKED: "#009e73",  # as CHANNELS_LAST
    COMPILED: "#cc79a7",
    ADDMM: "#e69f00",
    ONE_BY_ONE: "#f0e442",  # XFORMERS's place
    FASTADAPT: "#0072b2",
    GRAPHED: "#009e73",  # SDPA's place, in cases that are whole models
    AGAIN: "#56b4e9",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",  # the same rows draw the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
}
WIDTH = 8.6  # inches


def steps(group: Group) -> str:
    """Left: every sample, median and 20-80 % range.  Right: the ratio to PEFT, its interval, the noise floor."""
    arms = list(group.rows)
    figure, (left, right) = _figure(len(arms), columns=2, width_ratios=(3, 2))
    for y, arm in enumerate(arms):
        samples, values = group.rows[arm].samples, group.rows[arm].values
        spread = [y + 0.22 * ((i * 0.618) % 1 - 0.5) for i in range(len(samples))]
        left.scatter(samples, spread, s=11, color=COLOURS[arm], alpha=0.45, linewidths=0)
        left.plot([values["p20_s"], values["p80_s"]], [y, y], color=COLOURS[arm], linewidth=3, solid_capstyle="butt")
        left.plot([values["median_s"]] * 2, [y - 0.3, y + 0.3], color=COLOURS[arm], linewidth=2)
    if FROZEN in group.rows:
        left.axvline(group.rows[FROZEN].values["median_s"], color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
    left.set_xlim(left=0)
    left.set_xlabel(f"seconds per {group.phase}, {group.clock} clock")
    right.axvspan(1 - group.noise, 1 + group.noise, color="#e4e7eb", linewidth=0)
    right.axvline(1, color=COLOURS[PEFT], linewidth=1)
    for y, arm in enumerate(arms):
        against = group.ratio(arm, PEFT)
        if arm == PEFT or against is None:
            continue
        right.plot([against.low, against.high], [y, y], color=COLOURS[arm], linewidth=3, solid_capstyle="butt")
        right.plot([against.value], [y], "o", color=COLOURS[arm], markersize=6)
        right.annotate(
            f"{against.value:.2f}", (against.value, y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5
        )
    right.set_xlabel("time in units of PEFT's; grey: noise floor")
    _name(left, arms)
    right.set_yticks([])
    return _svg(figure)


def bars(values: Mapping[str, float], label: str, unit: float = 1.0, relative_to: str = FROZEN) -> str:
    """One bar for each arm, with its value and how many times that of `relative_to` it is."""
    arms = list(values)
    figure, (axes,) = _figure(len(arms))
    axes.barh(range(len(arms)), [values[arm] / unit for arm in arms], 0.62, color=[COLOURS[arm] for arm in arms])
    for y, arm in enumerate(arms):
        times = (
            f" ({values[arm] / values[relative_to]:.2f} × {relative_to})"
            if relative_to in values and arm != relative_to
            else ""
        )
        axes.annotate(
            f"{values[arm] / unit:,.0f}{times}",
            (values[arm] / unit, y),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlabel(label)
    axes.margins(x=0.22)
    _name(axes, arms)
    return _svg(figure)


def launches(parts: Mapping[str, Sequence[float]]) -> str:
    """Kernel launches, forward and backward stacked."""
    arms = list(parts)
    figure, (axes,) = _figure(len(arms))
    for y, arm in enumerate(arms):
        forward, backward = parts[arm]
        axes.barh(y, forward, 0.62, color=COLOURS[arm])
        axes.barh(y, backward, 0.62, left=forward, color=COLOURS[arm], alpha=0.55)
        axes.annotate(
            f"{forward:,.0f} + {backward:,.0f}",
            (forward + backward, y),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlabel("kernel launches: forward (full colour) + backward (pale)")
    axes.margins(x=0.14)
    _name(axes, arms)
    return _svg(figure)


def overheads(found: Sequence[Group]) -> str:
    """One line for each case: what every arm adds to the frozen linear, in per cent."""
    return _by_case(found, FROZEN, lambda ratio: 100 * (ratio - 1), "per cent over the frozen linear")


def ratios(found: Sequence[Group], baseline: str) -> str:
    """One line for each case: every arm's time in units of the baseline's."""
    return _by_case(found, baseline, lambda ratio: ratio, f"time in units of {baseline}'s")


def _by_case(found: Sequence[Group], to: str, scale: Callable[[float], float], label: str) -> str:
    """The ratio of every arm's time to that of `to` and its interval, one line for each case that has `to`."""
    shown = [group for group in found if to in group.rows]
    figure, (axes,) = _figure(len(shown))
    least, largest = 0.0, 1.0
    named: set[str] = set()
    axes.axvline(scale(1), color=COLOURS[to], linewidth=1)
    for y, group in enumerate(shown):
        axes.axhline(y, color="#e4e7eb", linewidth=1)
        for arm in [arm for arm in group.rows if arm not in (to, AGAIN)]:
            against = group.ratio(arm, to)
            low, high, value = map(scale, (against.low, against.high, against.value))
            axes.plot([low, high], [y, y], color=COLOURS[arm], linewidth=2, solid_capstyle="butt")
            axes.plot([value], [y], "o", color=COLOURS[arm], markersize=6, label=None if arm in named else arm)
            named.add(arm)
            least, largest = min(least, low), max(largest, value)
    axes.set_xlim(least, 1.1 * largest)  # an interval may reach further; the medians do not
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.set_yticks(range(len(shown)), [group.case.removeprefix(operation(group.case)).strip() for group in shown])
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "handletextpad": 0.2, "columnspacing": 1}
    axes.legend(frameon=False, ncols=6, **place)
    return _svg(figure)


def _figure(lines: int, columns: int = 1, **grid: object) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 0.7 + 0.4 * max(lines, 2)), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False, gridspec_kw=grid)[0]
    for one in axes:
        one.grid(axis="x")
    return figure, list(axes)


def _name(axes: Axes, arms: Sequence[str]) -> None:
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()


def _svg(figure: Figure) -> str:
    for axes in figure.axes:  # the two panels of a figure share their order
        if len(figure.axes) > 1 and axes is not figure.axes[0]:
            axes.set_ylim(figure.axes[0].get_ylim())
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]
