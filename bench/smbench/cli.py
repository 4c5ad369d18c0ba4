"""The `smbench` command. Thin: parses, calls the host modules, prints. Owns wording and exit codes.

Host modules are imported inside the commands, so that `smbench --help` answers at once.
"""

from __future__ import annotations

import errno
import gc
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from smbench.analysis import Analysis
    from smbench.compare import Comparison, Side
    from smbench.plan import Plan
    from smbench.result import Status

app = typer.Typer(
    help="Repeat published LLM-inference measurements, trust the numbers, send them home.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(help="Recipe name, see `smbench list`.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="full, quick or cpu; the machine decides without it.")
]
Folder = Annotated[Path | None, typer.Option("--out", help="Run folder (default runs/<recipe>-<device>).")]
Providers = Annotated[
    list[str] | None, typer.Option("--provider", help="Only this implementation; may be given several times.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

FAILED: tuple[Status, ...] = ("incorrect", "invalid", "crashed", "timeout", "oom")
"""Statuses that make the exit code 1: measured, and failed."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """The recipes, their profiles and sizes."""
    from smbench import recipe, resources

    found = [recipe.load(recipe.find(name, resources.recipes_dir())) for name in recipe.names(resources.recipes_dir())]
    sizes = {entry.name: {profile: len(entry.cells(profile)) for profile in entry.profile} for entry in found}
    if as_json:
        _print_json([{"name": r.name, "title": r.title, "document": r.document, "cells": sizes[r.name]} for r in found])
        return
    _table(
        ("recipe", "document", "profiles (cells)", "title"),
        [
            (entry.name, entry.document, ", ".join(f"{p} ({n})" for p, n in sizes[entry.name].items()), entry.title)
            for entry in found
        ],
    )


@app.command()
def plan(
    recipe: RecipeName,
    profile: ProfileName = None,
    provider: Providers = None,
    cells: Annotated[bool, typer.Option("--cells", help="List every cell.")] = False,
    as_json: AsJson = False,
) -> None:
    """What `run` would do here: cells, their stack, minutes, and what is unsupported and why."""
    resolved = _resolve(recipe, profile, provider)
    if as_json:
        _print_json(_plan_json(resolved))
        return
    _print(f"recipe {resolved.recipe.name}, profile {resolved.profile_name}: {len(resolved.entries)} cells")
    if cells:
        _table(
            ("cell", "what", "stack", "outcome"),
            [
                (entry.cell.cell_id, entry.cell.label(), entry.stack, _outcome(entry.unsupported, entry.untimed))
                for entry in resolved.entries
            ],
        )
    else:
        groups: dict[tuple[str, str, str, str], int] = {}
        for entry in resolved.entries:
            outcome = _outcome(entry.unsupported, entry.untimed)
            key = (entry.cell.subject, entry.cell.provider, entry.stack, outcome)
            groups[key] = groups.get(key, 0) + 1
        _table(
            ("op", "provider", "stack", "cells", "outcome"),
            [(op, name, stack, str(count), outcome) for (op, name, stack, outcome), count in groups.items()],
        )
    estimate = resolved.profile.estimate
    _print(f"estimate: {resolved.estimate_s() / 60:.1f} minutes (basis: {estimate.source})")


@app.command()
def run(
    recipe: RecipeName,
    profile: ProfileName = None,
    out: Folder = None,
    provider: Providers = None,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Put everything into one file at the end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure a recipe and write its report. The same command again goes on where it stopped."""
    from smbench.plan import default_folder

    resolved = _resolve(recipe, profile, provider)
    folder = out or default_folder(resolved, _device_name(), Path.cwd())
    options = [option for name in provider or () for option in ("--provider", name)]
    command = ["smbench", "run", recipe, "--profile", resolved.profile_name, *options, "--out", _shown(folder)]
    analysis = _measure(resolved, folder, shlex.join(command))
    _shown_report(folder, analysis, as_json, _packed(folder) if pack else None)


@app.command()
def tune(
    recipe: RecipeName,
    profile: ProfileName = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the journal.")] = None,
    configs_dir: Annotated[
        Path | None, typer.Option("--configs", help="Where configuration files go (default: the kernels' own folder).")
    ] = None,
    quality: Annotated[
        int, typer.Option("--quality", help="Compare so many random points with an exhaustive search.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Search launch parameters for the very points that the recipe measures. The same command again goes on."""
    from smbench import arch, plan, resources, runfolder, runner
    from smbench import tune as tuning
    from smbench.errors import UsageError
    from smbench.progress import TuneProgress

    device_name = _device_name()
    if device_name is None:
        raise UsageError("tuning needs an NVIDIA GPU and none is visible; see `smbench doctor`")
    resolved = _resolve(recipe, profile, None)
    device = arch.load(resources.archs_file()).device_named(device_name)
    folder = out or Path.cwd() / "runs" / f"tune-{recipe}-{plan.slug(device_name)}"
    signal.signal(signal.SIGTERM, _interrupt)
    with runfolder.locked(folder), TuneProgress(len(tuning.points_of(resolved))) as progress:
        try:
            done = tuning.tune(
                resolved,
                folder,
                device_name,
                device.memory_bandwidth_bytes_per_s if device else None,
                quality,
                progress.advance,
                configs_dir,
            )
        except KeyboardInterrupt as stop:
            _stopped(stop, f"the same command goes on: smbench tune {recipe}")
        except runner.WorkerCannotStart as error:
            _fail(f"{error}\nfix: see {_shown(folder)}/logs and `smbench doctor`; tuned points are kept", 1)
    if as_json:
        _print_json(done.summary())
    else:
        for line in done.lines():
            _print(line)


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A run folder.")] = None,
    published: Annotated[
        str | None, typer.Option("--published", metavar="NAME", help="Print a document's own tables instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Render the report of a run folder again, or print published numbers in the tables of their document."""
    from smbench.errors import UsageError

    if (folder is None) == (published is None):
        raise UsageError("give a run folder, or --published NAME")
    if published is not None:
        from smbench import published_report

        numbers = published_report.load(published)
        if as_json:
            _print_json(published_report.as_json(published, numbers))
        else:
            _print(published_report.render(numbers).rstrip("\n"))
    elif folder is not None:
        analysis = _report(folder)
        if as_json:
            _print_json({"folder": str(folder), "counts": analysis.counts(), "report": str(folder / "report.md")})
        else:
            _print(f"report: {_shown(folder / 'report.md')}")


@app.command()
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
        _print_json(audit_report.as_json(audited))
    else:
        _print(audit_report.render(audited).rstrip("\n"))
    if audit_report.refuted(audited):
        raise typer.Exit(1)


@app.command()
def compare(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C…]",
            help="Run folders, bundles or published:NAME; repeats of one side are joined by commas, without a space.",
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

    within, limit = _fraction("--margin", margin), _fraction("--fail-slower", fail_slower or "0%")
    loaded = reading.load(sides, _matches(match or []))
    if len(loaded) < 2:
        raise typer.BadParameter("name at least two sides", param_hint="A B")
    comparisons = _compare(loaded, within, out, as_json)
    beyond = [row for comparison in comparisons for row in comparison.slower_than(limit)] if fail_slower else []
    for row in beyond[:20]:
        _warn(f"slower by more than {fail_slower}: {row.cell.label()}, {row.measurement}: {row.ratio:.3f}")
    if not any(comparison.rows for comparison in comparisons):
        fields = {f"{e.field}: {e.a}, {e.b}" for comparison in comparisons for e in comparison.incomparable}
        _fail(f"nothing is comparable; {'; '.join(sorted(fields)) or 'no cell has a number on both sides'}", 3)
    if beyond:
        _fail(f"slower by more than {fail_slower}: {len(beyond)} of {sum(len(c.rows) for c in comparisons)} numbers", 1)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The new run folder.")],
    folders: Annotated[list[Path], typer.Argument(help="Run folders of one recipe and profile.")],
    as_json: AsJson = False,
) -> None:
    """Join run folders of one recipe (several stacks or machines) into a new one. Conflicts are refused and named."""
    from smbench.merge import merge as join

    join(out, folders)
    _shown_report(out, _report(out), as_json)


@app.command()
def rerun(
    source: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle or a run folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default runs/<bundle>-rerun).")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Another profile of the same recipe, where its device is not here.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Put everything into one file at the end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Repeat somebody's run here, recipe, profile and cells as they were, and compare. The same command goes on."""
    from smbench import rerun as repeating
    from smbench import runfolder
    from smbench import sides as reading

    theirs = reading.read(source)
    resolved = repeating.plan_of(theirs, profile, _device_name() is not None)
    folder = out or repeating.default_folder(source, Path.cwd())
    options = ["--profile", profile] if profile else []
    analysis = _measure(resolved, folder, shlex.join(["smbench", "rerun", str(source), *options, "--out", str(folder)]))
    ours = reading.side_of([runfolder.load(folder)], folder.resolve().name)
    # to standard output goes one document, and with --json that is the run's
    _compare([reading.side_of([theirs], source.resolve().name), ours], _fraction("--margin", "2%"), folder / "compare")
    _shown_report(folder, analysis, as_json, _packed(folder) if pack else None)


@app.command()
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
        _fail(f"{error.strerror}: {error.filename or folder}; nothing was packed", 1)
    if packed is None:
        _fail("nothing was packed", 1)
    for note in () if review else packed.notes:
        _warn(note)
    if as_json:
        _print_json({"bundle": str(packed.path), **packed.contents.summary()})
    else:
        _print(f"bundle: {_shown(packed.path)}")


@app.command()
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
            _print_json({"verified": False, "error": str(error)})
        raise
    if as_json:
        _print_json(found.summary())
    else:
        for line in found.lines():
            _print(line)
    if found.unconfirmed:
        raise typer.Exit(1)


@app.command()
def doctor(out: Folder = None, as_json: AsJson = False) -> None:
    """Is this machine fit for measuring: GPU, driver, clocks, other processes, disk, memory; each with a fix."""
    from smbench import doctor as checks

    found = checks.run_checks(out or Path.cwd())
    if as_json:
        _print_json([{"name": c.name, "verdict": c.verdict, "found": c.found, "fix": c.fix} for c in found])
    else:
        _table(("check", "verdict", "found", "fix"), [(c.name, c.verdict, c.found, c.fix or "") for c in found])
    if any(check.verdict == "fail" for check in found):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors that a user can act on become one message and their exit code."""
    from smbench.errors import CorruptError, UsageError

    try:
        app()
    except (UsageError, CorruptError) as error:
        _fail(str(error), error.exit_code)


def _resolve(recipe_name: str, profile: str | None, providers: list[str] | None) -> Plan:
    from smbench import plan as plans
    from smbench import recipe, resources

    path = recipe.find(recipe_name, resources.recipes_dir())
    loaded = recipe.load(path)
    return plans.make(loaded, path.read_bytes(), profile, _device_name() is not None, providers or ())


def _measure(resolved: Plan, folder: Path, command: str) -> Analysis:
    """Run a plan in a folder and render its report; `command` is what goes on where this one was stopped."""
    from smbench import runfolder, runner
    from smbench.progress import Progress

    again = f"the same command goes on: {command}"
    signal.signal(signal.SIGTERM, _interrupt)
    with runfolder.locked(folder):
        done = runfolder.load(folder).results if (folder / "run.json").exists() else {}
        try:
            with Progress(resolved, done) as progress:
                runner.run(resolved, folder, progress.advance, _warn)
            analysis = _report(folder)
        except KeyboardInterrupt as stop:
            _stopped(stop, again)
        except OSError as error:
            advice = "free space, then " if error.errno in DISK_FULL else ""
            _fail(f"{error.strerror}: {_shown(folder)}; every result so far is intact; {advice}{again}", 1)
        except runner.WorkerCannotStart as error:
            _fail(f"{error}\nfix: see {_shown(folder)}/logs and `smbench doctor`; {again}", 1)
    return analysis


def _packed(folder: Path) -> Path | None:
    """The bundle of a run that has just ended; None, with a warning, where it cannot be packed: the run is no worse."""
    from smbench import bundle
    from smbench.errors import CorruptError, UsageError

    try:
        packed = bundle.pack(folder)
    except (UsageError, CorruptError, OSError) as error:
        _warn(f"no bundle was packed: {error}")
        return None
    for note in packed.notes if packed else ():
        _warn(f"bundle: {note}")
    return packed.path if packed else None


def _shown_report(folder: Path, analysis: Analysis, as_json: bool, bundle: Path | None = None) -> None:
    """Say how a run ended; exit code 1 where a cell was measured and failed."""
    counts = analysis.counts()
    if as_json:
        places = {"report": str(folder / "report.md"), "bundle": str(bundle) if bundle else None}
        _print_json({"folder": str(folder), "counts": counts, **places})
    else:
        _print(", ".join(f"{count} {status}" for status, count in counts.items()))
        _print(f"report: {_shown(folder / 'report.md')}")
        if bundle:
            _print(f"bundle: {_shown(bundle)}")
    if any(counts.get(status) for status in FAILED):
        raise typer.Exit(1)


def _compare(sides: list[Side], margin: float, out: Path | None, as_json: bool = False) -> list[Comparison]:
    """Put all sides against the first one, and say or write what came out."""
    from smbench import comparison as looks
    from smbench.compare import compare as put_against

    comparisons = [put_against(sides[0], side, margin) for side in sides[1:]]
    if out is not None:
        looks.write(comparisons, out)
    if as_json:
        _print_json(looks.as_json(comparisons))
    elif out is None:
        _print(looks.render(comparisons).rstrip("\n"))
    else:
        for side, compared in zip(sides[1:], comparisons, strict=True):
            counts = ", ".join(f"{count} {verdict}" for verdict, count in compared.counts().items())
            typer.echo(f"{side.name} against {sides[0].name}: {counts}", err=True)
        typer.echo(f"comparison: {_shown(out / 'compare.md')}", err=True)
    return comparisons


def _matches(options: list[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for series, _, provider in pairs:
        if not (series and provider):
            raise typer.BadParameter("give SERIES=PROVIDER", param_hint="--match")
    return {series: provider for series, _, provider in pairs}


def _fraction(option: str, text: str) -> float:
    """A share that was given as per cent, `5%`, or as a fraction, `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r} is neither a percentage such as 5% nor a fraction", param_hint=option)
    return value


def _report(folder: Path) -> Analysis:
    from smbench import report as reports

    return reports.render(folder)


def _device_name() -> str | None:
    """The product name of the GPU that a worker would use, None without one."""
    from smbench.nvml import NvmlUnavailable, fixed_facts, open_gpu

    try:
        return str(fixed_facts(open_gpu()).get("name", "NVIDIA GPU"))
    except NvmlUnavailable:
        return None


def _outcome(unsupported: str | None, untimed: str | None) -> str:
    if unsupported:
        return f"unsupported: {unsupported}"
    return f"verified: {untimed}" if untimed else "timed"


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.name,
        "profile": plan.profile_name,
        "estimate_s": plan.estimate_s(),
        "cells": [
            {
                "cell_id": entry.cell.cell_id,
                **entry.cell.model_dump(),
                "stack": entry.stack,
                "unsupported": entry.unsupported,
                "untimed": entry.untimed,
            }
            for entry in plan.entries
        ],
    }


def _interrupt(signal_number: int, frame: object) -> NoReturn:
    """A spot instance is told to leave by SIGTERM: stop like Ctrl-C, but that is no failure."""
    raise KeyboardInterrupt("SIGTERM")


def _stopped(stop: KeyboardInterrupt, again: str) -> NoReturn:
    typer.echo(f"stopped; every finished cell is kept; {again}", err=True)
    raise typer.Exit(0 if stop.args == ("SIGTERM",) else 130)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def _print(text: str) -> None:
    typer.echo(text)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # a pipe has no width, and cutting a reason short there would lose it
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
