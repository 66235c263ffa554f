"""The report: one self-contained page, drawn from the rows of the last run in a folder and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import sections
from bench.case import FASTADAPT, FROZEN, PEFT
from bench.html import bullets, definitions, heading, note, page, paragraph, table, tile, tiles
from bench.rows import Row, last_run, read
from bench.summary import STEP, by_arm, main_group, of_kind

NOTES = (
    "Arms run interleaved: once each a round, in a new random order every round. Ratios are of medians; their 95 % "
    "interval resamples whole rounds, so that what slows a whole round cancels.",
    "fastadapt is sampled twice in every round, as two arms: the ratio of the two, with its interval, is the noise "
    "floor. ≈ stands before a ratio whose interval holds 1, or that is nearer to 1 than the noise floor.",
    "Clocks: 'gpu' is device time alone, by replay of a CUDA graph, with the second-level cache overwritten before "
    "each step (cold) or five sets of inputs in turn (warm); 'wall' is what a user waits for, host work included; "
    "'cpu' is a step on the CPU.",
    "A CPU's times say little about a GPU's, where other code runs: without a GPU fastadapt runs its plain PyTorch "
    "reference, with dropout's masks in C++ where that is built. Kept bytes, launches and machine code are a GPU's "
    "in any case, and `fastadapt verify` proves the kernels.",
    "Roofline: the least time for the arithmetic and for the traffic, each at the ceiling measured in this run; the "
    "larger of the two over the time taken.",
)


def write(folder: Path) -> list[Row]:
    """Draw folder/index.html from folder/rows.jsonl; return the rows it shows."""
    everything = read(folder / "rows.jsonl")
    rows = last_run(everything)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = [_title(rows), *(section(rows) for section in sections.ALL), heading("How to read this"), bullets(NOTES)]
    body.append(_conditions(rows, earlier=len(everything) - len(rows)))
    (folder / "index.html").write_text(page("fastadapt bench", style, "".join(body)), encoding="utf-8")
    return rows


def _title(rows: Sequence[Row]) -> str:
    where = rows[0].provenance.get("device", {}).get("name", "unknown device")
    lead = f"{where}; run of {rows[0].run}. Every figure is drawn from this run's rows alone, losses included."
    what = "LoRA costs" if main_group(rows) else "operations cost"
    return heading(f"What {what}, and what fusing saves", 1) + paragraph(lead, "lead") + tiles(_headlines(rows))


def _headlines(rows: Sequence[Row]) -> list[str]:
    found = []
    if proofs := [row for row in rows if row.kind == "verify" and row.arm == FASTADAPT]:
        good = sum(row.status == "ok" for row in proofs)
        tensors = max(row.values.get("tensors_count", 0) for row in proofs)
        found.append(
            tile(f"{good} of {len(proofs)}", f"proofs passed: {tensors} outputs and gradients against float64, each")
        )
    step = main_group(rows)
    if step and (against := step.ratio(FASTADAPT, PEFT)):
        sign = "≈ " if against.sign(step.noise) == "≈" else ""
        caption = f"PEFT's time for a training step, {step.clock} clock (95 %: {against.low:.2f} to {against.high:.2f})"
        found.append(tile(f"{sign}{against.value:.2f} ×", caption))
    saved, launches = by_arm(rows, "saved", "saved_bytes"), by_arm(rows, "launches", "total_count")
    if step and {FROZEN, PEFT, FASTADAPT} <= set(saved):
        before, after = (saved[arm] / saved[FROZEN] for arm in (PEFT, FASTADAPT))
        found.append(
            tile(
                f"{before:.2f} → {after:.2f}", "times the frozen model's bytes kept for the backward: PEFT → fastadapt"
            )
        )
    if step and {PEFT, FASTADAPT} <= set(launches):
        found.append(tile(f"{launches[PEFT]} → {launches[FASTADAPT]}", "kernel launches in a step: PEFT → fastadapt"))
    return found


def _conditions(rows: Sequence[Row], earlier: int) -> str:
    parts = [heading("Conditions"), definitions(_flat(rows[0].provenance))]
    if model := next((row for row in of_kind(rows, "time") if row.phase == STEP), None):
        parts += [heading(model.case, 3), definitions(model.params)]
    for row in of_kind(rows, "ceiling"):
        rates = {
            name.removesuffix("_per_s").replace("_", " "): f"{value / 1e9:,.0f} G/s"
            for name, value in row.values.items()
        }
        parts += [heading("Measured ceilings", 3), definitions(rates)]
    if states := list({str(row.device): row.device for row in of_kind(rows, "time") if row.device}.values()):
        lines = [[when, *state[when].values()] for state in states for when in ("before", "after")]
        parts += [heading("The GPU around each cell", 3), table(["", *states[0]["before"]], lines)]
    parts.append(
        note(f"{len(rows)} rows of this run and {earlier} of earlier runs are in rows.jsonl, beside this page.")
    )
    return "".join(parts)


def _flat(provenance: Mapping[str, object]) -> dict[str, object]:
    """Nested entries side by side: 'device name' for provenance["device"]["name"]."""
    flat: dict[str, object] = {}
    for name, value in provenance.items():
        flat |= (
            {f"{name} {key}": inner for key, inner in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat
