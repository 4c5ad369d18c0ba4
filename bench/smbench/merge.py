"""Joins run folders of one recipe and profile into a new one. Owns what may be joined; changes no record.

Several stacks or several machines measure parts of one plan; a part that a machine could not run (`unsupported`) or did
not reach gives way to what another measured. Everything else that two folders both have is a conflict, and no number is
chosen over another.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from smbench import runfolder
from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.result import Environment, Result, Session, Status
from smbench.runfolder import Run

YIELDING: tuple[Status, ...] = ("unsupported", "skipped")
"""Statuses that say nothing of the cell elsewhere: they give way to any other."""
SHOWN = 10
"""Conflicts that a message names."""
NAMED = ("native", "traces")
"""Folders of files that results name: what load clients wrote, what profilers saw."""
_TORN = re.compile(r"results\.torn-(\d+)\.txt")


def merge(out: Path, folders: Sequence[Path]) -> None:
    """Write a run folder with everything that the given ones hold; none of them is changed.

    UsageError when they are not of one experiment, name one cell twice, or when `out` is there already.
    """
    if len(folders) < 2:
        raise UsageError("merge needs a new folder and at least two run folders: smbench merge OUT A B …")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty; merge writes a new folder")
    runs = [runfolder.load(folder) for folder in folders]
    for run in runs[1:]:
        _check_alike(runs[0], run)
    environments = _environments(runs)
    results = _results(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the last step is a rename and a failure leaves nothing that looks like a run
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        stage = Path(temporary) / "run"
        runfolder.create(stage, runs[0].recipe_text, runs[0].recipe.name, runs[0].profile_name, _plan(runs))
        lines = "".join(record.model_dump_json() + "\n" for record in (*environments, *results, *_sessions(runs)))
        (stage / "results.jsonl").write_text(lines, encoding="utf-8")
        _copy_logs(folders, stage)
        _copy_files(folders, stage)
        stage.replace(out)


def _check_alike(first: Run, other: Run) -> None:
    """UsageError names the first field in which two runs are not of one experiment, and both values."""
    own, theirs = first.recipe.model_dump(), other.recipe.model_dump()
    fields: Iterable[tuple[str, object, object]] = (
        ("recipe", first.recipe.name, other.recipe.name),
        ("protocol_version", first.recipe.protocol_version, other.recipe.protocol_version),
        ("profile", first.profile_name, other.profile_name),
        *((f"recipe.toml: {key}", own[key], theirs[key]) for key in own),
    )
    for field, one, two in fields:
        if one != two:
            values = f"{one!r} and {two!r}" if isinstance(one, str | int) else "unlike values"
            raise UsageError(
                f"{first.folder.name} and {other.folder.name} are not of one experiment: {field}: {values}; "
                "`smbench compare` puts unlike runs side by side"
            )


def _plan(runs: Sequence[Run]) -> list[Cell]:
    """The cells that any of the runs planned, in the order of the recipe."""
    planned = {cell.cell_id: cell for run in runs for cell in run.cells}
    instead = runs[0].recipe.instead(runs[0].profile_name, runs[0].cells)
    order = [cell.cell_id for cell in runs[0].recipe.cells(runs[0].profile_name, instead)]
    rest = [cell_id for cell_id in planned if cell_id not in set(order)]
    return [planned[cell_id] for cell_id in (*order, *rest) if cell_id in planned]


def _environments(runs: Sequence[Run]) -> list[Environment]:
    found: dict[str, Environment] = {}
    for run in runs:
        for entry in run.environments:
            if found.setdefault(entry.environment_id, entry) != entry:
                raise UsageError(f"{run.folder.name}: environment {entry.environment_id} is another one elsewhere")
    return list(found.values())


def _results(runs: Sequence[Run]) -> list[Result]:
    """One result for each cell, in the order of the plan; UsageError names the cells that two runs tried."""
    chosen: dict[str, tuple[Run, Result]] = {}
    conflicts: list[str] = []
    for run in runs:
        for cell_id, result in run.results.items():
            holder, present = chosen.setdefault(cell_id, (run, result))
            if result == present or result.status in YIELDING:
                continue
            if present.status in YIELDING:
                chosen[cell_id] = run, result
                continue
            conflicts.append(
                f"{result.cell.label()}: {present.status} in {holder.folder.name}, {result.status} in {run.folder.name}"
            )
    if conflicts:
        more = f"\n  and {len(conflicts) - SHOWN} more" if len(conflicts) > SHOWN else ""
        count = "1 cell was" if len(conflicts) == 1 else f"{len(conflicts)} cells were"
        raise UsageError(
            f"{count} tried in two of the folders, and merge chooses no number over another; `smbench compare` shows "
            "how they differ:\n  " + "\n  ".join(conflicts[:SHOWN]) + more
        )
    return [chosen[cell.cell_id][1] for cell in _plan(runs) if cell.cell_id in chosen]


def _sessions(runs: Sequence[Run]) -> list[Session]:
    """Every session once, by the time it began."""
    found: list[Session] = []
    for session in (session for run in runs for session in run.sessions):
        if session not in found:
            found.append(session)
    return sorted(found, key=lambda session: session.started_at)


def _copy_logs(folders: Sequence[Path], out: Path) -> None:
    """The logs of all folders, numbered on in the order of the folders, and the torn lines that runs set aside."""
    number = 0
    for folder in folders:
        for name, copies in _numbered(folder).items():
            number += 1
            (out / "logs").mkdir(exist_ok=True)
            for path in copies:
                shutil.copyfile(path, out / "logs" / path.name.replace(name, f"worker-{number:03d}", 1))
        for path in sorted(folder.glob("results.torn-*.txt")):
            matched = _TORN.fullmatch(path.name)
            offset = int(matched[1]) if matched else 0
            # two runs can have been torn at the same byte
            while (out / f"results.torn-{offset}.txt").exists():
                offset += 1
            shutil.copyfile(path, out / f"results.torn-{offset}.txt")


def _copy_files(folders: Sequence[Path], out: Path) -> None:
    """The files that results name: each has its cell's name, and a cell that two folders tried is a conflict."""
    for folder in folders:
        for kind in NAMED:
            for path in sorted((folder / kind).glob("*.json")):
                (out / kind).mkdir(exist_ok=True)
                shutil.copyfile(path, out / kind / path.name)


def _numbered(folder: Path) -> Mapping[str, list[Path]]:
    """The files of each worker's log by their common stem, `worker-001`."""
    found: dict[str, list[Path]] = {}
    for path in sorted((folder / "logs").glob("worker-*")):
        found.setdefault(path.name.partition(".")[0], []).append(path)
    return found
