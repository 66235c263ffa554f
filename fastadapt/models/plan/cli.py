"""The command `fastadapt plan`."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_GIB = 2**30


def plan(
    method: Annotated[str, typer.Argument(help="The method, such as m2ist.")],
    batch: Annotated[int | None, typer.Option(help="Samples on one GPU; the paper's number by default.")] = None,
    arm: Annotated[str, typer.Option(help="release, strong or fastadapt.")] = "fastadapt",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 by autocast.")] = "bfloat16",
    preset: Annotated[str | None, typer.Option(help="The published variant.")] = None,
    parity: Annotated[list[str], typer.Option(help="released, or a departure of the released code to reproduce.")] = [],
    gpu: Annotated[str, typer.Option(help="The GPU whose limits give the time.")] = "H200",
) -> None:
    """Say what a training step needs: parameters, operations, memory and time; counted, with no GPU and no weights."""
    console = Console(highlight=False)
    if importlib.util.find_spec("transformers") is None:
        console.print("the methods are transformers models, which is not installed: pip install 'fastadapt[models]' has it")
        raise typer.Exit(1)
    from fastadapt.models.common.method import method as find
    from fastadapt.models.plan import gpus, measure

    try:
        found, card = find(method), gpus.gpu(gpu)
        batch = found.batch if batch is None else batch
        parities = "released" if parity == ["released"] else parity
        model = measure.make(found, arm, preset, parity=parities)
        counted = measure.measure(found, model, batch, dtype, card)
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    name = f"{method} {preset or found.preset}, {arm} arm, batch {batch}, {dtype}"
    console.print(f"[bold]{name}[/bold]" + (f", parity: {', '.join(model.config.parity)}" if model.config.parity else ""))
    for shown in (_parameters(counted), _shares(counted), _saved(counted, batch), _step(counted, batch, gpu, card)):
        console.print()
        console.print(shown)


def _parameters(counted: Any) -> Table:
    table = _table("parameters", "all", "trained")
    for part, total, trained in counted.parts:
        table.add_row(part, f"{total:,}", f"{trained:,}")
    table.add_section()
    table.add_row("sum", *(f"{sum(row[i] for row in counted.parts):,}" for i in (1, 2)))
    return table


def _shares(counted: Any) -> Table:
    table = _table("per cent of parameters", "%", "count", "of")
    for share in counted.shares:
        table.add_row(f"{share.what} / {share.of}", f"{share.percent:.2f}", f"{share.count:,}", f"{share.whole:,}")
    return table


def _saved(counted: Any, batch: int) -> Table:
    table = _table("saved for the backward", "GiB", "MiB a sample")
    for region, size in counted.saved.items():
        table.add_row(region, f"{size / _GIB:.3f}", f"{size / 2**20 / batch:.2f}")
    table.add_section()
    total = counted.saved.total()
    table.add_row("sum", f"{total / _GIB:.3f}", f"{total / 2**20 / batch:.2f}")
    return table


def _step(counted: Any, batch: int, name: str, card: Any) -> Table:
    table = _table("a training step", "")
    for label, flops in (("forward", counted.forward_flops), ("backward", counted.backward_flops)):
        each = flops / batch / 1e9
        table.add_row(f"{label}, a sample", f"{each:.1f} GFLOP = {each / 2:.1f} GMAC")
    table.add_row("parameters, buffers, inputs, Adam's moments", f"{counted.resident / _GIB:.2f} GiB")
    fits = "fits" if counted.peak < card.memory else "does not fit"
    table.add_row("peak, predicted", f"{counted.peak / _GIB:.2f} GiB, {fits} in {card.memory / _GIB:.0f} GiB")
    table.add_row("memory traffic, predicted", f"{counted.bytes / 1e9:.1f} GB")
    rate = batch / counted.seconds
    table.add_row(f"at the limits of the {name}, predicted", f"{1e3 * counted.seconds:.2f} ms, {rate:.0f} samples/s")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table
