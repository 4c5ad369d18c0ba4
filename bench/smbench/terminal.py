"""How the command line talks: plain lines, tables, JSON, warnings and ends. Owns the wording, not what is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from smbench.analysis import Analysis
    from smbench.compare import Comparison, Side
    from smbench.result import Status

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

FAILED: tuple[Status, ...] = ("incorrect", "invalid", "crashed", "timeout", "oom")
"""Statuses that make the exit code 1: measured, and failed."""


def say_how_it_ended(folder: Path, analysis: Analysis, as_json: bool, bundle: Path | None = None) -> None:
    """Say how a run ended; exit code 1 where a cell was measured and failed."""
    counts = analysis.counts()
    if as_json:
        places = {"report": str(folder / "report.md"), "bundle": str(bundle) if bundle else None}
        say_json({"folder": str(folder), "counts": counts, **places})
    else:
        say(", ".join(f"{count} {status}" for status, count in counts.items()))
        say(f"report: {shown(folder / 'report.md')}")
        if bundle:
            say(f"bundle: {shown(bundle)}")
    if any(counts.get(status) for status in FAILED):
        raise typer.Exit(1)


def say_comparison(sides: list[Side], margin: float, out: Path | None, as_json: bool = False) -> list[Comparison]:
    """Put all sides against the first one, and say or write what came out."""
    from smbench import comparison as looks
    from smbench.compare import compare as put_against

    comparisons = [put_against(sides[0], side, margin) for side in sides[1:]]
    if out is not None:
        looks.write(comparisons, out)
    if as_json:
        say_json(looks.as_json(comparisons))
    elif out is None:
        say(looks.render(comparisons).rstrip("\n"))
    else:
        for side, compared in zip(sides[1:], comparisons, strict=True):
            counts = ", ".join(f"{count} {verdict}" for verdict, count in compared.counts().items())
            typer.echo(f"{side.name} against {sides[0].name}: {counts}", err=True)
        typer.echo(f"comparison: {shown(out / 'compare.md')}", err=True)
    return comparisons


def fraction(option: str, text: str) -> float:
    """A share that was given as per cent, `5%`, or as a fraction, `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r} is neither a percentage such as 5% nor a fraction", param_hint=option)
    return value


def shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def say(text: str) -> None:
    typer.echo(text)


def say_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def say_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # a pipe has no width, and cutting a reason short there would lose it
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
