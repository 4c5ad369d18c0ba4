"""The `smbench` command: its measuring commands and its entry. Thin: parses, calls host modules, says what came out.

Host modules are imported inside the commands, so that `smbench --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from smbench import evidence, importcommand, launching, plancommands, terminal
from smbench.terminal import AsJson

if TYPE_CHECKING:
    from smbench.analysis import Analysis
    from smbench.plan import Here, Plan

app = typer.Typer(
    help="Repeat published LLM-inference measurements, trust the numbers, send them home.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(evidence.commands)
app.add_typer(importcommand.commands)
app.add_typer(launching.commands)
app.add_typer(plancommands.commands)

RecipeName = Annotated[str, typer.Argument(help="Recipe name, see `smbench list`.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="full, quick or cpu; the machine decides without it.")
]
Folder = Annotated[Path | None, typer.Option("--out", help="Run folder (default runs/<recipe>-<device>).")]
Providers = Annotated[
    list[str] | None, typer.Option("--provider", help="Only this implementation; may be given several times.")
]

ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Other weights for engines: NAME@REVISION, a folder, or synthetic:SHAPE."),
]
Price = Annotated[float | None, typer.Option("--price", help="What an hour of this machine costs.", min=0)]
ShareGpt = Annotated[
    Path | None,
    typer.Option("--sharegpt", metavar="FILE", help="Conversations for dataset sharegpt; nothing is fetched."),
]
TraceTool = Annotated[
    str | None, typer.Option("--trace", help="torch or nsys: one more, uncounted batch of each cell under a profiler.")
]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@app.command()
def plan(
    recipe: RecipeName,
    profile: ProfileName = None,
    provider: Providers = None,
    model: ModelName = None,
    sharegpt: ShareGpt = None,
    cells: Annotated[bool, typer.Option("--cells", help="List every cell.")] = False,
    as_json: AsJson = False,
) -> None:
    """What `run` would do here: cells, their stack, minutes, and what is unsupported and why."""
    resolved = _resolve(recipe, profile, provider, model, sharegpt)
    plancommands.say(resolved, cells, as_json)


@app.command()
def run(
    recipe: RecipeName,
    profile: ProfileName = None,
    out: Folder = None,
    provider: Providers = None,
    model: ModelName = None,
    price: Price = None,
    sharegpt: ShareGpt = None,
    trace: TraceTool = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure even if this image is of another arch than the card; marked.")
    ] = False,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Put everything into one file at the end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure a recipe and write its report. The same command again goes on where it stopped."""
    from smbench import place, profiling
    from smbench.plan import default_folder

    # as the first process of a container nobody else ends us, and importing takes a while
    signal.signal(signal.SIGTERM, _leave)
    resolved = _resolve(recipe, profile, provider, model, sharegpt)
    profiling.require(trace, resolved)
    if out is None:
        root, warning = place.runs_root(place.image_here())
        out = default_folder(resolved, _device_name(), root)
        if warning:
            terminal.warn(warning)
    options = [option for name in provider or () for option in ("--provider", name)]
    options += ["--model", model] if model else []
    options += ["--price", f"{price:g}"] if price is not None else []
    options += ["--sharegpt", terminal.shown(sharegpt)] if sharegpt else []
    options += ["--trace", trace] if trace else []
    options += ["--force"] if force else []
    command = ["smbench", "run", recipe, "--profile", resolved.profile_name, *options, "--out", terminal.shown(out)]
    analysis = _measure(resolved, out, os.environ.get(place.AGAIN) or shlex.join(command), price, force, trace)
    signal.signal(signal.SIGTERM, _leave)
    terminal.say_how_it_ended(out, analysis, as_json, _packed(out) if pack else None)


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
            again = ["smbench", "tune", recipe, "--profile", resolved.profile_name, "--out", terminal.shown(folder)]
            _stopped(stop, f"the same command goes on: {shlex.join(again)}")
        except runner.WorkerCannotStart as error:
            terminal.fail(
                f"{error}\nfix: see {terminal.shown(folder)}/logs and `smbench doctor`; tuned points are kept", 1
            )
    if as_json:
        terminal.say_json(done.summary())
    else:
        for line in done.lines():
            terminal.say(line)


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
            terminal.say_json(published_report.as_json(published, numbers))
        else:
            terminal.say(published_report.render(numbers).rstrip("\n"))
    elif folder is not None:
        from smbench import report as reports

        analysis = reports.render(folder)
        if as_json:
            terminal.say_json({"folder": str(folder), "counts": analysis.counts(), "report": str(folder / "report.md")})
        else:
            terminal.say(f"report: {terminal.shown(folder / 'report.md')}")


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
    resolved = repeating.plan_of(theirs, profile, _here())
    folder = out or repeating.default_folder(source, Path.cwd())
    options = ["--profile", profile] if profile else []
    analysis = _measure(resolved, folder, shlex.join(["smbench", "rerun", str(source), *options, "--out", str(folder)]))
    ours = reading.side_of([runfolder.load(folder)], folder.resolve().name)
    # to standard output goes one document, and with --json that is the run's
    terminal.say_comparison(
        [reading.side_of([theirs], source.resolve().name), ours],
        terminal.fraction("--margin", "2%"),
        folder / "compare",
    )
    terminal.say_how_it_ended(folder, analysis, as_json, _packed(folder) if pack else None)


@app.command()
def doctor(out: Folder = None, as_json: AsJson = False) -> None:
    """Is this machine fit for measuring: GPU, driver, clocks, other processes, disk, memory; each with a fix."""
    from smbench import doctor as checks
    from smbench import doctor_image, place

    image = place.image_here()
    root = out or place.runs_root(image)[0]
    found = checks.run_checks(root)
    if image is not None:
        found = [check for check in found if check.name not in doctor_image.NOT_OF_AN_IMAGE]
        found += doctor_image.run_checks(image, _here(), root)
    if as_json:
        terminal.say_json([{"name": c.name, "verdict": c.verdict, "found": c.found, "fix": c.fix} for c in found])
    else:
        terminal.say_table(
            ("check", "verdict", "found", "fix"), [(c.name, c.verdict, c.found, c.fix or "") for c in found]
        )
    if any(check.verdict == "fail" for check in found):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors that a user can act on become one message and their exit code."""
    from smbench.errors import CorruptError, UsageError

    try:
        app()
    except (UsageError, CorruptError) as error:
        terminal.fail(str(error), error.exit_code)


def _resolve(
    recipe_name: str,
    profile: str | None,
    providers: list[str] | None,
    model: str | None = None,
    sharegpt: Path | None = None,
) -> Plan:
    from smbench import plan as plans
    from smbench import recipe, resources

    path = recipe.find(recipe_name, resources.recipes_dir())
    loaded = recipe.load(path)
    return plans.make(loaded, path.read_bytes(), profile, _here(), providers or (), model, sharegpt)


def _measure(
    resolved: Plan,
    folder: Path,
    command: str,
    price: float | None = None,
    force: bool = False,
    trace: str | None = None,
) -> Analysis:
    """Run a plan in a folder and render its report; `command` is what goes on where this one was stopped."""
    from smbench import place, runfolder, runner
    from smbench import report as reports
    from smbench.progress import Progress

    image = place.image_here()
    # workers record it: every result says so
    os.environ[place.FORCED] = str(int(place.forced_arch(image, _here(), resolved.profile.device, force)))
    # `launch` has said it where it started this container
    if image is not None and place.digest() is None and place.AGAIN not in os.environ:
        terminal.warn(f"this image's digest is unknown, and results say so; start it with -e {place.DIGEST}=sha256:…")
    place.require_writable(folder)
    again = f"the same command goes on: {command}"
    signal.signal(signal.SIGTERM, _interrupt)
    with runfolder.locked(folder):
        done = runfolder.load(folder).results if (folder / "run.json").exists() else {}
        try:
            with Progress(resolved, done) as progress:
                runner.run(resolved, folder, progress.advance, terminal.warn, price_per_hour=price, trace=trace)
            analysis = reports.render(folder)
        except KeyboardInterrupt as stop:
            _stopped(stop, again)
        except OSError as error:
            advice = "free space, then " if error.errno in DISK_FULL else ""
            terminal.fail(
                f"{error.strerror}: {terminal.shown(folder)}; every result so far is intact; {advice}{again}", 1
            )
        except runner.WorkerCannotStart as error:
            terminal.fail(f"{error}\nfix: see {terminal.shown(folder)}/logs and `smbench doctor`; {again}", 1)
    return analysis


def _packed(folder: Path) -> Path | None:
    """The bundle of a run that has just ended; None, with a warning, where it cannot be packed: the run is no worse."""
    from smbench import bundle
    from smbench.errors import CorruptError, UsageError

    try:
        packed = bundle.pack(folder)
    except (UsageError, CorruptError, OSError) as error:
        terminal.warn(f"no bundle was packed: {error}")
        return None
    for note in packed.notes if packed else ():
        terminal.warn(f"bundle: {note}")
    return packed.path if packed else None


def _here() -> Here:
    """The machine that a plan is for."""
    from smbench import place

    return place.here()


def _device_name() -> str | None:
    """The product name of the GPU that a worker would use, None without one."""
    return _here().device_name


def _interrupt(signal_number: int, frame: object) -> NoReturn:
    """A spot instance is told to leave by SIGTERM: stop like Ctrl-C, but that is no failure."""
    raise KeyboardInterrupt("SIGTERM")


def _leave(signal_number: int, frame: object) -> NoReturn:
    """SIGTERM before the first cell, or after the last."""
    typer.echo("stopped; every finished cell is kept; the same command goes on", err=True)
    raise SystemExit(0)


def _stopped(stop: KeyboardInterrupt, again: str) -> NoReturn:
    typer.echo(f"stopped; every finished cell is kept; {again}", err=True)
    raise typer.Exit(0 if stop.args == ("SIGTERM",) else 130)
