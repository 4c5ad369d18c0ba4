"""The run folder: its files, its lock, its append-only results. Owns durability; knows nothing of measuring.

run.json        what the folder is: format, recipe, profile, smbench version
recipe.toml     the recipe as it was, byte for byte: it loads again
plan.json       every cell, in order
results.jsonl   one record a line: environments, results, sessions; appended and fsynced, never rewritten
logs/           standard error of each worker, and what servers and load clients said
native/         what the load client of each online cell wrote, without the texts that were generated
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from smbench import __version__, recipe
from smbench.cell import Cell
from smbench.errors import CorruptError, UsageError
from smbench.recipe import Recipe
from smbench.result import FORMAT, AnyRecord, Environment, Record, Result, Session

_Model = TypeVar("_Model", bound=Record)
_RECORD: TypeAdapter[Result | Environment | Session] = TypeAdapter(AnyRecord)
TEMPORARY = ".tmp"
"""Suffix of a file while it is written."""


class _Version(BaseModel):
    """What a file says of itself before anything else in it is believed."""

    format: int


class RunFile(Record):
    """`run.json`."""

    format: int
    recipe: str
    profile: str
    smbench_version: str


class PlanFile(Record):
    """`plan.json`."""

    format: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run folder says."""

    folder: Path
    recipe: Recipe
    profile_name: str
    smbench_version: str
    cells: Sequence[Cell]
    results: Mapping[str, Result]
    """By cell_id; of several results of one cell the last one counts."""
    environments: Sequence[Environment]
    sessions: Sequence[Session]
    warnings: Sequence[str]
    recipe_text: bytes
    """The recipe's file, byte for byte."""


def create(folder: Path, recipe_text: bytes, recipe_name: str, profile: str, cells: Sequence[Cell]) -> None:
    """Make a folder for a run, or accept the one that is there for the very same run.

    UsageError when the folder holds another recipe, profile or plan: a run is never mixed with another.
    """
    if (folder / "run.json").exists():
        found = _read_json(folder / "run.json", RunFile)
        for key, wanted, present in (
            ("recipe", recipe_name, found.recipe),
            ("profile", profile, found.profile),
            ("recipe.toml", recipe_text, _read(folder / "recipe.toml")),
            ("plan.json", tuple(cells), _read_json(folder / "plan.json", PlanFile).cells),
        ):
            if wanted != present:
                what = f"{key} {present!r}, not {wanted!r}" if isinstance(wanted, str) else f"a different {key}"
                raise UsageError(
                    f"{folder} holds a run with {what}; choose another folder with OUT=, or remove that one"
                )
        return
    files = {
        "recipe.toml": recipe_text,
        "plan.json": _pretty(PlanFile(format=FORMAT, cells=tuple(cells))),
        # last, so that a folder with run.json is complete
        "run.json": _pretty(RunFile(format=FORMAT, recipe=recipe_name, profile=profile, smbench_version=__version__)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not all(_is_left_over(path, files) for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and not a run folder (no run.json); choose another with OUT=")
    for name, data in files.items():
        _write(folder / name, data)


def load(folder: Path) -> Run:
    """Read a run folder. CorruptError names the file and line; a torn last line is a warning, not an error."""
    if not (folder / "run.json").exists():
        raise UsageError(f"{folder} is not a run folder: it has no run.json")
    run = _read_json(folder / "run.json", RunFile)
    cells = _read_json(folder / "plan.json", PlanFile).cells
    recipe_text = _read(folder / "recipe.toml")
    loaded = recipe.parse(recipe_text, f"{folder.name}/recipe.toml")
    results: dict[str, Result] = {}
    environments: dict[str, Environment] = {}
    sessions: list[Session] = []
    warnings: list[str] = []
    for record in _records(folder / "results.jsonl", warnings):
        match record:
            case Result():
                results[record.cell_id] = record
            case Environment():
                environments[record.environment_id] = record
            case Session():
                sessions.append(record)
    return Run(
        folder,
        loaded,
        run.profile,
        run.smbench_version,
        cells,
        results,
        list(environments.values()),
        sessions,
        warnings,
        recipe_text,
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one run; the lock dies with its holder.

    UsageError when another process holds it, or when nothing can be written there.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"another run is using {folder}; wait for it, or choose another folder with OUT=") from error
    except OSError as error:
        raise UsageError(f"{folder} cannot hold a run: {error.strerror}; choose another folder with OUT=") from error
    try:
        yield
    finally:
        lock.release()


class Appender:
    """Appends records to `results.jsonl`; each is on the disk when `append` returns."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.jsonl"
        self._file: IO[bytes] | None = None
        self.set_aside: str | None = None
        """A warning about a torn last line that was moved away, if there was one."""

    def __enter__(self) -> Self:
        self.set_aside = _set_torn_line_aside(self._path)
        # unbuffered: a failed write must not be retried behind our back when the file is closed
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def append(self, record: Result | Environment | Session) -> None:
        """Write one line, whole or not at all: on a full disk the half line is taken back and OSError is raised."""
        if self._file is None:
            raise RuntimeError("append outside of the with block")
        line = (record.model_dump_json() + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
            os.fsync(self._file.fileno())
        # Ctrl-C between two halves of a line, too
        except BaseException:
            self._file.truncate(start)
            raise


def _set_torn_line_aside(path: Path) -> str | None:
    """Cut a last line without its newline off and keep it beside the file."""
    if not path.exists():
        return None
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return None
        torn = path.with_name(f"results.torn-{end}.txt")
        _write(torn, data[end:])
        file.truncate(end)
        os.fsync(file.fileno())
    return f"{path.name}: the last line was torn ({len(data) - end} bytes); it was set aside as {torn.name}"


def _records(path: Path, warnings: list[str]) -> Iterator[Result | Environment | Session]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                warnings.append(f"{path.name}: line {number} is torn and was not read; the next run sets it aside")
                return
            yield parse_record(line, f"{path}: line {number}")


def parse_record(line: bytes, name: str) -> Result | Environment | Session:
    """The record in a line of `results.jsonl`. CorruptError begins with `name`."""
    try:
        return _RECORD.validate_json(line, strict=True)
    except ValidationError as error:
        raise CorruptError(f"{name}: {_first_fault(error)}") from error


def parse_json(text: bytes, model: type[_Model], name: str) -> _Model:
    """The `run.json` or `plan.json` in some bytes. CorruptError begins with `name`; a newer format is one, too."""
    fault: ValidationError | None = None
    try:
        found = model.model_validate_json(text, strict=True)
        version = _Version.model_validate(found, from_attributes=True).format
    except ValidationError as error:
        fault, version = error, _version_of(text)
    if version > FORMAT:
        raise CorruptError(f"{name}: format {version} is newer than this smbench reads ({FORMAT}); update smbench")
    if fault:
        raise CorruptError(f"{name}: {_first_fault(fault)}") from fault
    return found


def _version_of(text: bytes) -> int:
    """The format that a file names which breaks the format that is known here; 0 where it names none."""
    try:
        return _Version.model_validate_json(text).format
    except ValidationError:
        return 0


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}"


def _read_json(path: Path, model: type[_Model]) -> _Model:
    return parse_json(_read(path), model, str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing") from error


def _is_left_over(path: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a file in a folder without run.json is from a run that was killed while it made the folder."""
    if path.name in files:
        return path.is_file() and path.read_bytes() == files[path.name]
    return path.name in (".lock", "logs", *(name + TEMPORARY for name in files))


def _pretty(model: Record) -> bytes:
    return (model.model_dump_json(indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
