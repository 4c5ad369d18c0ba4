"""Commands about evidence that exists: pack, verify, compare, merge, audit. Thin; measures nothing."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from smbench import terminal
from smbench.terminal import AsJson

commands = typer.Typer()


@commands.command()
def audit(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME…|RUN…]", help="Names of published numbers, run folders or bundles."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Names are of published numbers; without a name: all of them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check published or measured numbers for what cannot be true; each finding shows its arithmetic."""
    from smbench import audit_report

    audited = audit_report.examine(names or (), published)
    if as_json:
        terminal.say_json(audit_report.as_json(audited))
    else:
        terminal.say(audit_report.render(audited).rstrip("\n"))
    if audit_report.refuted(audited):
        raise typer.Exit(1)


@commands.command()
def compare(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C…]",
            help="Run folders, bundles, imports, published:NAME; repeats of one side are joined by commas, no space.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write compare.md, compare.json and compare.png there.")
    ] = None,
    margin: Annotated[str, typer.Option("--margin", help="Differences up to this are of no interest.")] = "2%",
    fail_slower: Annotated[
        str | None,
        typer.Option("--fail-slower", help="Exit code 1 where a number is slower by more than this, e.g. 5%."),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option("--match", help="SERIES=PROVIDER: which published series is put against which provider."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs beside the first one: each number faster, slower, same or unclear, and what is not comparable."""
    from smbench import sides as reading

    within, limit = terminal.fraction("--margin", margin), terminal.fraction("--fail-slower", fail_slower or "0%")
    loaded = reading.load(sides, _matches(match or []))
    if len(loaded) < 2:
        raise typer.BadParameter("name at least two sides", param_hint="A B")
    comparisons = terminal.say_comparison(loaded, within, out, as_json)
    beyond = [row for comparison in comparisons for row in comparison.slower_than(limit)] if fail_slower else []
    for row in beyond[:20]:
        terminal.warn(f"slower by more than {fail_slower}: {row.cell.label()}, {row.measurement}: {row.ratio:.3f}")
    if not any(comparison.rows for comparison in comparisons):
        fields = {f"{e.field}: {e.a}, {e.b}" for comparison in comparisons for e in comparison.incomparable}
        terminal.fail(f"nothing is comparable; {'; '.join(sorted(fields)) or 'no cell has a number on both sides'}", 3)
    if beyond:
        terminal.fail(
            f"slower by more than {fail_slower}: {len(beyond)} of {sum(len(c.rows) for c in comparisons)} numbers", 1
        )


@commands.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The new run folder.")],
    folders: Annotated[list[Path], typer.Argument(help="Run folders of one recipe and profile.")],
    as_json: AsJson = False,
) -> None:
    """Join run folders of one recipe (several stacks or machines) into a new one. Conflicts are refused and named."""
    from smbench import report
    from smbench.merge import merge as join

    join(out, folders)
    terminal.say_how_it_ended(out, report.render(out), as_json)


@commands.command()
def pack(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file, or a folder for it (default: the run folder).")
    ] = None,
    review: Annotated[bool, typer.Option("--review", help="List what goes in and what was redacted, and ask.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --review: list, and do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a run into one file that proves itself; names, paths and secrets are redacted on the way."""
    from smbench import bundle
    from smbench.errors import UsageError

    if review and not yes and not sys.stdin.isatty():
        raise UsageError("--review asks before it packs, and there is no terminal to ask on; add --yes")

    def approve(contents: bundle.Contents) -> bool:
        for line in contents.lines() if review else ():
            typer.echo(line, err=as_json)
        return yes or not review or typer.confirm("pack this?", err=as_json)

    try:
        packed = bundle.pack(folder, out, approve=approve)
    except OSError as error:
        terminal.fail(f"{error.strerror}: {error.filename or folder}; nothing was packed", 1)
    if packed is None:
        terminal.fail("nothing was packed", 1)
    for note in () if review else packed.notes:
        terminal.warn(note)
    if as_json:
        terminal.say_json({"bundle": str(packed.path), **packed.contents.summary()})
    else:
        terminal.say(f"bundle: {terminal.shown(packed.path)}")


@commands.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A bundle.")],
    as_json: AsJson = False,
) -> None:
    """Check a bundle: every hash, record and identity, and that its report follows from its records."""
    from smbench import verify as checks
    from smbench.errors import CorruptError

    # records are many objects without a cycle, and the process ends before their memory is missed
    gc.disable()
    try:
        found = checks.verify(file)
    except CorruptError as error:
        if as_json:
            terminal.say_json({"verified": False, "error": str(error)})
        raise
    if as_json:
        terminal.say_json(found.summary())
    else:
        for line in found.lines():
            terminal.say(line)
    if found.unconfirmed:
        raise typer.Exit(1)


def _matches(options: list[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for series, _, provider in pairs:
        if not (series and provider):
            raise typer.BadParameter("give SERIES=PROVIDER", param_hint="--match")
    return {series: provider for series, _, provider in pairs}
