"""`python -m bench`: the main job, single operations, the methods, tuning, and drawing a report again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder for rows.jsonl and index.html.")]
console = Console()


@app.callback(invoke_without_command=True)
def main(context: typer.Context, out: Out = Path("out/bench")) -> None:
    """Prove, count and measure LoRA on CLIP ViT-B/16: PEFT, torch.compile, fastadapt, and the frozen model alone."""
    if context.invoked_subcommand is None:
        from bench import job, terminal

        _quiet()
        rows = job.main(out, console)
        _finish(terminal.table(rows), rows, out)


@app.command()
def ops(
    op: Annotated[list[str], typer.Option(help="An operation by name; all of them if none is given.")] = [],
    case: Annotated[list[str], typer.Option(help="A case of it by name; all of them if none is given.")] = [],
    out: Out = Path("out/ops"),
) -> None:
    """Measure single operations, each beside what torch and other libraries offer in its place."""
    from bench import job, terminal

    _quiet()
    try:
        rows = job.operations(out, op, case, console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _finish(terminal.operations(rows), rows, out)


@app.command()
def methods(
    method: Annotated[list[str], typer.Option(help="A method by name; all of them if none is given.")] = [],
    out: Out = Path("out/methods"),
) -> None:
    """Measure the methods' training steps: as released, strong, torch.compile, fastadapt, and that as one CUDA graph."""
    from bench import job, terminal

    _quiet()
    try:
        rows = job.methods(out, method, console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _finish(terminal.operations(rows), rows, out)


@app.command()
def tune(out: Annotated[Path, typer.Option(help="Where to write the table.")] = Path("out/tune")) -> None:
    """Time candidate kernel configurations on this GPU and write the table that the kernels read."""
    from bench import tune as tuning

    try:
        console.print(f"table: {tuning.write(out, console)}")
    except RuntimeError as error:
        console.print(str(error))
        raise typer.Exit(1) from error


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder with rows.jsonl.")]) -> None:
    """Draw index.html again from a folder's rows."""
    from bench import report as drawing

    drawing.write(folder)
    console.print(f"report: {folder / 'index.html'}")


def _finish(table: Table, rows: list, out: Path) -> None:
    from bench import terminal

    console.print(table)
    for note in terminal.notes(rows):
        console.print(note, highlight=False)
    console.print(f"report: {out / 'index.html'}")


def _quiet() -> None:
    """Libraries' deprecation notes are not this job's output; whatever fails here is a row in the report."""
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    app()
