"""What `compare` is given: run folders, bundles and published numbers, made sides of a comparison. Owns their reading.

runs/lora-h200                  a run folder
lora-h200-0123456789ab.tar.gz   a bundle
runs/monday,runs/tuesday        repeats of one experiment: one side with several runs
published:lora-rtx3090          the numbers of recipes/published/lora-rtx3090.toml
theirs.import.json              what `smbench import` made of other tools' result files
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from smbench import alignment, imports, published, report, resources, runfolder, verify
from smbench.cell import Cell
from smbench.compare import Entry, Side
from smbench.errors import UsageError
from smbench.machines import Machines
from smbench.published import Point, Published
from smbench.result import Environment, Result
from smbench.runfolder import Run
from smbench.verdicts import Timing

PUBLISHED = "published:"
NOT_AXES = ("op", "provider", "config")
"""Coordinates of a published number that are no axis of a cell."""


def load(arguments: Sequence[str], matches: Mapping[str, str]) -> list[Side]:
    """The sides that a command line names, in its order.

    `matches` says which series of published numbers (`provider/config`) is put against which of our providers.
    UsageError for what is not there, or for runs of one side that are no repeats; CorruptError as in `runfolder.load`.
    """
    imported = [name for name in arguments if not name.startswith(PUBLISHED) and imports.is_import(Path(name))]
    if imported:
        return _with_imports(arguments, imported, matches)
    measured = {name: _measured(name) for name in arguments if not name.startswith(PUBLISHED)}
    first = next(iter(measured.values()), None)
    return [measured[name] if name in measured else _published(name, first, matches) for name in arguments]


def read(path: Path) -> Run:
    """The run in a folder, or in a bundle, which is verified first: CorruptError where it is not what it says."""
    if path.is_dir():
        return runfolder.load(path)
    if imports.is_import(path):
        raise UsageError(f"{path} is an import: it is a side of `smbench compare`, and no run")
    if path.is_file():
        return verify.verify(path, keep_samples=True).run
    raise UsageError(f"{path} is neither a run folder nor a bundle; published numbers are named {PUBLISHED}<name>")


def _with_imports(arguments: Sequence[str], imported: Sequence[str], matches: Mapping[str, str]) -> list[Side]:
    """The sides where some are imports: those stand under the cells of the first side that are of their workload."""
    if any(name.startswith(PUBLISHED) for name in arguments):
        raise UsageError("an import and published numbers share no cell of ours; compare each of them with a run")
    if matches:
        raise UsageError("--match is for published numbers; an import says its engine, see `smbench import --engine`")
    runs = {name: _runs_of(name) for name in arguments if name not in imported}
    sides = [
        imports.side(Path(name)) if name in imported else side_of(runs[name], _name(name), _kind(name))
        for name in arguments
    ]
    loaded = [imports.loaded(Path(name)) if name in imported else [*_loaded(runs[name])] for name in arguments]
    first = alignment.alone(sides[0], loaded[0])
    others = [
        alignment.beside(first, loaded[0], side, found) if arguments[0] in imported or name in imported else side
        for name, side, found in zip(arguments[1:], sides[1:], loaded[1:], strict=True)
    ]
    return [first, *others]


def _loaded(runs: Sequence[Run]) -> Iterator[alignment.Loaded]:
    for run in runs:
        for row in report.analysis_of(run).rows:
            yield alignment.of_result(row.cell, row.status, row.reason, row.result)


def side_of(runs: Sequence[Run], name: str, kind: Literal["run", "bundle"] = "run") -> Side:
    """One experiment, run once or several times. A number that a guard refuted is no number here either."""
    first = runs[0]
    for run in runs[1:]:
        for field, own, other in (
            ("recipe", first.recipe.name, run.recipe.name),
            ("protocol_version", str(first.recipe.protocol_version), str(run.recipe.protocol_version)),
            ("profile", first.profile_name, run.profile_name),
        ):
            if own != other:
                raise UsageError(f"{name}: runs of one side are repeats of one experiment, but {field}: {own}, {other}")
    entries: dict[str, Entry] = {}
    for run in runs:
        for entry in _entries(run):
            cell_id = entry.cell.cell_id
            entries[cell_id] = _joined(entries[cell_id], entry) if cell_id in entries else entry
    environments = [environment for run in runs for environment in run.environments]
    return Side(
        name=name,
        kind=kind,
        recipe=first.recipe.name,
        profile=first.profile_name,
        protocol_version=first.recipe.protocol_version,
        runs=len(runs),
        devices=frozenset(Machines(environments).names()),
        entries=entries,
        environments=environments,
    )


def _measured(argument: str) -> Side:
    return side_of(_runs_of(argument), _name(argument), _kind(argument))


def _paths(argument: str) -> list[Path]:
    # a comma may be part of one path, too
    return [Path(argument)] if Path(argument).exists() else [Path(part) for part in argument.split(",") if part]


def _runs_of(argument: str) -> list[Run]:
    return [read(path) for path in _paths(argument)]


def _name(argument: str) -> str:
    return ", ".join(path.resolve().name for path in _paths(argument))


def _kind(argument: str) -> Literal["run", "bundle"]:
    return "bundle" if all(path.is_file() for path in _paths(argument)) else "run"


def _entries(run: Run) -> Iterator[Entry]:
    for row in report.analysis_of(run).rows:
        timed = row.result.measurements if row.result and row.summaries else ()
        timings = {m.name: Timing(_metric(row.cell, m.name), m.method, m.l2, (m.samples_s,)) for m in timed}
        yield Entry(row.cell, row.status, row.reason, timings, _prompts(row.result))


def _prompts(result: Result | None) -> str | None:
    """The data set and the start of the hash of its token ids."""
    drawn = result.serving.prompts if result and result.serving else None
    return f"{drawn.dataset} {drawn.sha256[:12]}" if drawn and drawn.sha256 else None


def _metric(cell: Cell, measurement: str) -> str:
    """What a measurement is of: those of an operation are ways of timing a call, those of an engine are metrics."""
    return measurement if cell.kind == "engine" else "duration"


def _joined(a: Entry, b: Entry) -> Entry:
    """A cell of several repeats; its status is that of the first with a number."""
    if not (a.timings and b.timings):
        return a if a.timings else b
    joined = {
        name: Timing(own.metric, own.method, own.l2, (*own.runs, *b.timings[name].runs))
        for name, own in a.timings.items()
        if name in b.timings
    }
    prompts = ", ".join(dict.fromkeys(entry.prompts for entry in (a, b) if entry.prompts)) or None
    return Entry(a.cell, a.status, a.reason, joined, prompts)


def _published(argument: str, against: Side | None, matches: Mapping[str, str]) -> Side:
    """Published numbers as the cells that would have measured them, with our provider's name where there is a match."""
    name = argument.removeprefix(PUBLISHED)
    numbers = published.load(published.find(name, resources.recipes_dir() / "published"))
    if against is not None:
        _check_matches(name, numbers, against, matches)
    metrics = _metrics(against) if against is not None else {point.metric for point in numbers.points()}
    entries: dict[str, Entry] = {}
    for point in numbers.points():
        provider = _series(point) if against is None else matches.get(_series(point))
        if provider is None or point.metric not in metrics:
            continue
        timing = Timing(
            point.metric,
            str(numbers.protocol.get("method", published.UNSTATED)),
            str(numbers.protocol.get("l2", published.UNSTATED)),
            ((point.value,),),
        )
        cell = _cell(point, numbers, provider, against)
        earlier = entries[cell.cell_id].timings if cell.cell_id in entries else {}
        key = point.metric if against is None else _measure(timing, against)
        entries[cell.cell_id] = Entry(cell, "ok", None, {**earlier, key: timing})
    facts = {"gpu": {"name": numbers.device}, "libraries": numbers.versions}
    return Side(
        name=argument,
        kind="published",
        recipe=f"document {numbers.document}",
        profile=None,
        protocol_version=None,
        runs=1,
        devices=frozenset({numbers.device}),
        entries=entries,
        environments=[Environment(environment_id=argument, environment=facts)],
    )


def _series(point: Point) -> str:
    """Whose number it is: `provider/config`, or what of it there is."""
    return "/".join(str(point.at[name]) for name in ("provider", "config") if name in point.at) or "published"


def _cell(point: Point, numbers: Published, provider: str, against: Side | None) -> Cell:
    seed = next((entry.cell.seed for entry in against.entries.values()), 0) if against else 0
    axes = {name: value for name, value in point.at.items() if name not in NOT_AXES}
    subject = str(point.at.get("op", f"document {numbers.document}"))
    kind = next((entry.cell.kind for entry in against.entries.values()), "op") if against else "op"
    return Cell(kind=kind, subject=subject, provider=provider, axes=axes, seed=seed)


def _metrics(side: Side) -> set[str]:
    """The metrics that a side has numbers of."""
    return {timing.metric for entry in side.entries.values() for timing in entry.timings.values()}


def _measure(timing: Timing, against: Side) -> str:
    """The other side's measurement by the same method and cache state; else one of its names, to be told apart by."""
    timings = [pair for entry in against.entries.values() for pair in entry.timings.items()]
    ways = {name: other for name, other in timings if other.metric == timing.metric}
    alike = [name for name, other in ways.items() if (other.method, other.l2) == (timing.method, timing.l2)]
    return next(iter([*alike, *ways]), timing.metric)


def _check_matches(name: str, numbers: Published, against: Side, matches: Mapping[str, str]) -> None:
    metrics = _metrics(against)
    series = list(dict.fromkeys(_series(point) for point in numbers.points() if point.metric in metrics))
    ours = list(dict.fromkeys(entry.cell.provider for entry in against.entries.values()))
    found = ", ".join(series) or f"none of {', '.join(sorted(metrics)) or 'any metric'}"
    known = f"series of {name}: {found}; providers of {against.name}: {', '.join(ours)}"
    if not matches:
        raise UsageError(
            "published numbers are not of our providers: say what is put against what, --match SERIES=PROVIDER; "
            f"{known}"
        )
    for theirs, provider in matches.items():
        if theirs not in series or provider not in ours:
            raise UsageError(f"--match {theirs}={provider}: no such pair; {known}")
    if len(set(matches.values())) < len(matches):
        raise UsageError(f"--match: two series for one provider; compare them one after the other; {known}")
