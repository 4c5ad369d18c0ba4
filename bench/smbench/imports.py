"""Import files: other tools' results as one file of ours, written, read again, and shown as a table.

Does not read the tools' files (`importing`), nor compare (`alignment`, `compare`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from pydantic import ValidationError

from smbench import __version__, alignment, importing, report
from smbench.cell import AxisValue
from smbench.compare import Side
from smbench.errors import CorruptError, UsageError
from smbench.imported import FORMAT, KIND, ImportedRun, ImportFile
from smbench.metricnames import TOOLS, names_in
from smbench.metrics import METRICS
from smbench.result import Environment
from smbench.workloads import WORKLOADS

SUFFIX = ".import.json"
TEMPLATE = "import.md.j2"
_HEAD = 256
"""Bytes at the beginning of an import file that hold its kind."""
SHOWN = ("median", "mean", "p99")
"""Statistics that the table shows."""


def make(
    files: Sequence[Path],
    label: str,
    device: str | None = None,
    engine: str | None = None,
    model: str | None = None,
    axes: Mapping[str, AxisValue] | None = None,
) -> ImportFile:
    """The results of files, with what their user knows besides.

    UsageError where that is no axis, or contradicts a file; UsageError and CorruptError as in `importing.read`.
    """
    runs = [run for file in files for run in importing.read(file)]
    told = [_told(run, engine, model, axes or {}) for run in runs]
    return ImportFile(
        kind=KIND, format=FORMAT, smbench_version=__version__, label=label, device=device, runs=tuple(told)
    )


def default_path(files: Sequence[Path]) -> Path:
    """Where an import goes that was given no place: here, named like its first file."""
    return Path.cwd() / f"{files[0].name.removesuffix('.json').removesuffix('.jsonl')}{SUFFIX}"


def write(imported: ImportFile, path: Path) -> None:
    """Write an import file in one step. UsageError where it cannot be written there."""
    try:
        report.replace_file(path, (imported.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name another place with --out") from error


def is_import(path: Path) -> bool:
    """Whether a file says of itself that `smbench import` wrote it."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        # whoever opens it for what it is will say why it cannot be read
        return False
    return head.lstrip().startswith(b"{") and f'"kind": "{KIND}"'.encode() in head.replace(b'":"', b'": "')


def load(path: Path) -> ImportFile:
    """An import file. CorruptError: of a newer format, damaged, or with an unknown key."""
    try:
        values = json.loads(path.read_bytes())
        version = values.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise CorruptError(f"{path.name}: format {version} is newer than this smbench reads ({FORMAT})")
        return ImportFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise CorruptError(
            f"{path.name}: {place}: {fault['msg'].removeprefix('Value error, ')}; import again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path.name}: is not JSON: {error}; import again") from error


def side(path: Path) -> Side:
    """An import file as a side of a comparison, without its results: `alignment` puts those beside the other side."""
    imported = load(path)
    return Side(
        name=imported.label,
        kind="import",
        recipe=", ".join(dict.fromkeys(TOOLS[run.tool].command for run in imported.runs)),
        profile=None,
        protocol_version=None,
        runs=1,
        # two that nobody named are two, not one
        devices=frozenset({imported.device or f"unstated ({imported.label})"}),
        entries={},
        environments=[_environment(imported)],
    )


def loaded(path: Path) -> list[alignment.Loaded]:
    """The results of an import file, to be matched."""
    imported = load(path)
    return [alignment.of_import(run, imported.label) for run in imported.runs]


def render(imported: ImportFile) -> str:
    """The import as Markdown: what each result is, and its numbers with their definitions."""
    environment = report.markdown_templates()
    environment.filters["figure"] = _figure
    text = environment.get_template(TEMPLATE).render(
        imported=imported, tools=TOOLS, rows=_rows, axes=_axes, statistics=SHOWN
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _told(run: ImportedRun, engine: str | None, model: str | None, axes: Mapping[str, AxisValue]) -> ImportedRun:
    """The run with what the user says, which overrules nothing of the file but the name that a model was served by."""
    known = [name for name in WORKLOADS[run.workload] if name != "model"]
    for name, value in axes.items():
        if name not in known:
            raise UsageError(f"--axis {name}: {run.workload} has no such axis; known: {', '.join(known)}")
        fault = WORKLOADS[run.workload][name].fault(name, value)
        if fault:
            raise UsageError(f"--axis: {fault}")
        if run.axes.get(name, value) != value:
            raise UsageError(f"--axis {name}={value}: {run.source} says {run.axes[name]}")
    if engine is not None and run.engine not in (None, engine):
        raise UsageError(f"--engine {engine}: {run.source} says {run.engine}")
    update: dict[str, object] = {"engine": run.engine or engine, "axes": {**run.axes, **axes}}
    if model is not None:
        update["model"] = model
        # a server goes by any name that it was given
        if run.model not in (None, model):
            update["notes"] = (*run.notes, f"the file calls the model {run.model}")
    return run.model_copy(update=update)


def _environment(imported: ImportFile) -> Environment:
    """What the files say of how they were measured, as facts that a comparison can show."""
    facts: dict[str, object] = {"tool": _tool(imported.runs[0])}
    for run in imported.runs:
        facts |= {f"setting.{name}": value for name, value in run.settings.items()}
    first = imported.runs[0]
    said = {*first.axes, *(("model",) if first.model else ())}
    unstated = [axis for axis in WORKLOADS[first.workload] if axis not in said]
    if unstated:
        facts["unstated"] = ", ".join(unstated)
    gpu = {"gpu": {"name": imported.device}} if imported.device else {}
    return Environment(environment_id=imported.label, environment={**gpu, "import": facts})


def _tool(run: ImportedRun) -> str:
    return f"{TOOLS[run.tool].command}{f' ({run.tool_version})' if run.tool_version else ''}"


def _rows(run: ImportedRun) -> list[tuple[str, str, str, str, int, list[float | None]]]:
    """Metric, definition, the tool's own name, unit, samples, and the statistics of the table; a total as the first."""
    own = {(name.metric, name.definition): name.own for name in names_in(run.tool)}
    rows = []
    for measure in run.measures:
        first = measure.statistic("median")
        values = [first if first is not None else measure.statistic("total"), *map(measure.statistic, SHOWN[1:])]
        metric = METRICS[measure.metric]
        name = own.get((measure.metric, measure.definition), "")
        rows.append((measure.metric, measure.definition, name, metric.unit, len(measure.samples), values))
    return rows


def _figure(value: float) -> Markup:
    return Markup(f"{value:.6g}")


def _axes(run: ImportedRun) -> str:
    return ", ".join(f"{name} {value}" for name, value in run.axes.items())
