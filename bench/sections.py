"""The report's sections: each takes the run's rows and returns HTML, or nothing where there is nothing to say."""

from __future__ import annotations

from collections.abc import Sequence

from bench import plots
from bench.case import AGAIN, COMPILED, FASTADAPT, FROZEN, GRAPHED, PEFT
from bench.html import Cell, bullets, folded, heading, note, paragraph, table
from bench.machine_code import static
from bench.rows import Row
from bench.stats import Ratio, geometric_mean
from bench.summary import (
    MAIN_CLOCKS,
    ORDER,
    STEP,
    Group,
    by_arm,
    cases,
    comparisons,
    failures,
    groups,
    of_kind,
    operation,
)
from bench.terminal import seconds

MB = 1e6


def proof(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row.kind == "verify" and row.status != "skipped"]
    if not shown:
        return ""
    text = (
        "Before an arm is timed, its outputs and the gradient of every tensor that requires one are compared with float64, "
        "in the process that then times it, with uninitialised memory filled with NaN. Errors are norm ratios |got - "
        "exact| / |exact|: the root mean square over all tensors, and the worst tensor's. Beside each stands the "
        "error of eager PyTorch in the same dtype, and last the worst difference between the two. With dropout, "
        "PEFT gets the same masks (fastadapt.PhiloxDropout); arms that draw their masks elsewhere are compared "
        "without dropout. An arm that fails is not timed."
    )
    names = list(dict.fromkeys(row.case for row in shown))
    tables = [heading(name, 3) + _proof_table([row for row in shown if row.case == name]) for name in names]
    detail = "".join(tables) if len(names) <= 2 else folded(f"the proofs of all {len(names)} cases", "".join(tables))
    return heading("Is it right?") + paragraph(text) + detail


def _proof_table(shown: Sequence[Row]) -> str:
    lines = []
    for row in shown:
        kinds = [f"{kind}_{of}" for of in ("mean", "worst") for kind in ("error", "eager_error")] + ["apart_worst"]
        errors = [row.values.get(kind) for kind in kinds]
        numbers = [Cell("-" if error is None else f"{error:.1e}") for error in errors]
        lines.append(
            [row.arm, row.phase or "-", Cell(row.status, row.status), row.values.get("tensors_count", "-"), *numbers]
        )
    columns = ["arm", "setting", "verdict", "tensors", "error", "eager's", "worst", "eager's", "apart, worst"]
    return table(columns, lines, FASTADAPT)


def training_step(rows: Sequence[Row]) -> str:
    shown = [group for group in groups(rows) if group.main]
    if not shown:
        return ""
    text = (
        "Photographs in, a contrastive loss between two views of each scene, backward, AdamW on the LoRA factors. "
        "The frozen arm is the same model without LoRA, forward and backward to the first block's input, with "
        "nothing to update: no adapter can cost less. Each dot is one step; the dashed line is the frozen model."
    )
    parts = [heading("One training step"), paragraph(text)]
    for group in shown:
        parts += [heading(f"{group.case}: {group.clock} clock", 3), plots.steps(group), _timing_table(group)]
    parts += [note(_break_even(row, shown)) for row in of_kind(rows, "compile")]
    return "".join(parts)


def _timing_table(group: Group) -> str:
    against = [arm for arm in (group.baseline, FROZEN) if arm in group.rows]
    columns = ["arm", "median", "20 - 80 %", "n", *(f"/ {arm} (95 %)" for arm in against)]
    lines: list[list[object]] = []
    for arm, row in group.rows.items():
        values = row.values
        spread = Cell(f"{seconds(values['p20_s'])} - {seconds(values['p80_s'])}")
        beside = [Cell("-" if arm == to else _ratio(group.ratio(arm, to), group.noise)) for to in against]
        lines.append([arm, Cell(seconds(values["median_s"])), spread, values["n_count"], *beside])
    if any("roofline_ratio" in row.values for row in group.rows.values()):
        columns.append("of roofline")
        for line, row in zip(lines, group.rows.values()):
            line.append(Cell(f"{100 * row.values['roofline_ratio']:.0f} %" if "roofline_ratio" in row.values else "-"))
    remarks = [f"Noise floor: {100 * group.noise:.1f} %."] if AGAIN in group.rows else []
    if any(row.device.get("sm_clock_moved") for row in group.rows.values()):
        remarks.append("The GPU's clock moved by more than 2 % during these measurements.")
    return table(columns, lines, FASTADAPT) + (note(" ".join(remarks)) if remarks else "")


def _break_even(row: Row, shown: Sequence[Group]) -> str:
    cost = row.values["compile_s"]
    text = f"{row.case}: torch.compile took {cost:.0f} s in a fresh process, each block compiled once and used by all; "
    group = next((group for group in shown if group.case == row.case and group.clock in MAIN_CLOCKS), None)
    against = group.ratio(COMPILED, PEFT) if group else None
    if against is None:
        return text + "its steps were not timed."
    if against.sign(group.noise) != "<":
        return text + "its steps are not measurably shorter than PEFT's."
    gain = group.rows[PEFT].values["median_s"] - group.rows[COMPILED].values["median_s"]
    return text + f"shorter steps earn that back after {cost / gain:,.0f} of them."


def kept_bytes(rows: Sequence[Row]) -> str:
    kept = _of_models(rows, "saved", "saved_bytes")
    if not kept:
        return ""
    text = (
        "What autograd holds between forward and backward, each storage once, parameters left out. Counted exactly; "
        "without a GPU on the meta device, with the operations that a CUDA device runs: dropout's mask as bools, "
        "attention without its map. GELU in place of CLIP's own activation, as in ViT and DINOv2, keeps less itself "
        "and leaves LoRA a larger share."
    )
    parts = [heading("Bytes kept for the backward"), paragraph(text)]
    parts += [heading(case, 3) + plots.bars(values, "MB kept for the backward", MB) for case, values in kept.items()]
    for case, values in _of_models(rows, "saved", "peak_bytes").items():
        parts.append(heading(f"{case}: the allocator's peak in a step", 3) + plots.bars(values, "MB", MB))
    return "".join(parts)


def _of_models(rows: Sequence[Row], kind: str, value: str) -> dict[str, dict[str, float]]:
    """Values by case and arm, of the cases that are models and not single operations."""
    models = [row for row in rows if "linears" in row.params]
    return {
        case: by_arm([row for row in models if row.case == case], kind, value) for case in cases(models, kind, value)
    }


def launches(rows: Sequence[Row]) -> str:
    counted = _of_models(rows, "launches", "total_count")
    if not counted:
        return ""
    case = next(iter(counted))
    shown = {row.arm: row.values for row in of_kind(rows, "launches") if row.case == case}
    text = (
        f"{case}, forward and backward, without the optimizer. A PyTorch operation that is no view counts as the one "
        "kernel that it starts at least; fastadapt's Triton kernels are recorded where they would be started."
    )
    kernels = {arm: values["kernels"] for arm, values in shown.items()}
    names = sorted(
        set().union(*kernels.values()), key=lambda name: -max(counts.get(name, 0) for counts in kernels.values())
    )
    lines = [[name, *(Cell(counts.get(name, "")) for counts in kernels.values())] for name in names]
    plot = plots.launches({arm: (values["forward_count"], values["backward_count"]) for arm, values in shown.items()})
    detail = folded("which kernels, and how often", table(["kernel", *kernels], lines))
    return heading("Kernel launches") + paragraph(text) + plot + detail


def host_time(rows: Sequence[Row]) -> str:
    found = of_kind(rows, "host")
    if not found:
        return ""
    text = (
        "A linear so small that only the host's work counts, forward and backward, on one core; the fastest of many "
        "interleaved blocks. This is what a GPU waits for when its kernels are short. With dropout, a CPU also "
        "computes the masks here, which a GPU does inside its kernels."
    )
    lines = []
    for row in found:
        frozen, peft, ours = (row.values[f"{arm}_us"] for arm in ("frozen", "peft", "fastadapt"))
        times = [Cell(f"{frozen:.0f} us"), Cell(f"+{peft:.0f} us"), Cell(f"+{ours:.0f} us"), Cell(f"{ours / peft:.2f}")]
        lines.append([f"dropout {row.params['dropout']:g}", *times])
    columns = ["", "frozen linear", "PEFT adds", "fastadapt adds", "fastadapt's / PEFT's"]
    return heading("Host time of one linear") + paragraph(text) + table(columns, lines)


def operations(rows: Sequence[Row]) -> str:
    found = [group for group in groups(rows) if not group.main]
    if not found:
        return ""
    parts = [heading("Training steps of the methods" if found[0].phase == STEP else "Single operations")]
    for name in dict.fromkeys(operation(group.case) for group in found):
        own = [group for group in found if operation(group.case) == name]
        parts.append(heading(name, 3))
        for phase, clock in dict.fromkeys((group.phase, group.clock) for group in own):
            chosen = [group for group in own if (group.phase, group.clock) == (phase, clock)]
            parts += [heading(f"{name}: {phase}, {clock} clock", 4), _plot(chosen), note(_means(chosen))]
            parts.append(folded("every case", "".join(heading(group.case, 4) + _timing_table(group) for group in chosen)))
        parts.append(_counts([row for row in rows if operation(row.case) == name]))
    return "".join(parts)


def _plot(found: Sequence[Group]) -> str:
    """Against the frozen part alone where there is one, else against the baseline; nothing where neither was timed."""
    if any(FROZEN in group.rows for group in found):
        return plots.overheads(found)
    baseline = next((group.baseline for group in found if group.baseline), None)
    return plots.ratios(found, baseline) if baseline else ""


def _means(found: Sequence[Group]) -> str:
    rivals = [arm for arm in ORDER if arm not in (FASTADAPT, GRAPHED, AGAIN)]
    ratios = {arm: [against.value for group in found if (against := group.ratio(FASTADAPT, arm))] for arm in rivals}
    means = [
        f"{geometric_mean(values):.2f} of {arm}'s ({len(values)} cases)" for arm, values in ratios.items() if values
    ]
    return f"fastadapt's time, geometric mean over every case of a list fixed beforehand: {', '.join(means)}."


def _counts(rows: Sequence[Row]) -> str:
    saved = {
        (row.case, row.arm): row.values["saved_bytes"] for row in of_kind(rows, "saved") if "saved_bytes" in row.values
    }
    counts = {(row.case, row.arm): row.values for row in of_kind(rows, "launches")}
    arms = [arm for arm in ORDER if any(arm == other for _, other in counts)]

    def cell(case: str, arm: str) -> Cell:
        if (case, arm) not in counts:
            return Cell("-")
        launched = counts[case, arm]
        return Cell(f"{saved[case, arm] / MB:.1f} MB, {launched['forward_count']} + {launched['backward_count']}")

    lines = [
        [case.removeprefix(operation(case)).strip(), *(cell(case, arm) for arm in arms)]
        for case in cases(rows, "launches", "total_count")
    ]
    title = "bytes kept for the backward, and kernel launches forward + backward"
    return heading(title, 4) + table(["", *arms], lines) if lines else ""


def not_won(rows: Sequence[Row]) -> str:
    compared = comparisons(rows)
    lost = [comparison for comparison in compared if comparison.verdict == ">"]
    tied = [comparison for comparison in compared if comparison.verdict == "≈"]
    text = f"Of {len(compared)} comparisons in this run fastadapt wins {len(compared) - len(lost) - len(tied)}, "
    text += f"{len(tied)} are too close to call or equal (≈), and it loses {len(lost)}."
    parts = [heading("Where fastadapt does not win"), paragraph(text)]
    if lost or tied:
        lines = [[one.rival, one.what, one.case, Cell(_ratio(one.ratio, verdict=one.verdict))] for one in lost + tied]
        parts.append(table(["against", "what", "case", "fastadapt's / its"], lines))
    over = {
        f"{group.case}, {group.phase}, {group.clock} clock": group.ratio(FASTADAPT, FROZEN) for group in groups(rows)
    }
    costs = [
        f"{name}: {_percent(found.value)} % ({_percent(found.low)} to {_percent(found.high)})"
        for name, found in over.items()
        if found
    ]
    if costs:
        parts += [paragraph("Over the frozen model, which nothing beats, it costs:"), bullets(costs)]
    return "".join(parts)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f}"


def missing(rows: Sequence[Row]) -> str:
    lines = [[row.arm or row.kind, row.case, Cell(row.status, row.status), row.reason] for row in failures(rows)]
    return heading("What failed or was skipped") + table(["what", "case", "", "why"], lines) if lines else ""


ALL = (proof, training_step, kept_bytes, launches, host_time, operations, not_won, missing, static)


def _ratio(found: Ratio | None, noise: float = 0.0, verdict: str = "") -> str:
    if found is None:
        return "-"
    sign = "≈ " if (verdict or found.sign(noise)) == "≈" else ""
    interval = f" ({found.low:.2f} - {found.high:.2f})" if found.low != found.high else ""
    return f"{sign}{found.value:.2f}{interval}"
