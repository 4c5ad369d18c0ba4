"""Packs a run folder into one file that proves itself. Owns what goes in, under which name, and the tag files.

The layout is BagIt 1.0 (RFC 8493), so that `sha256sum` and any BagIt tool check it without smbench. A pack changes
nothing in the run folder, takes only what is named here, and redacts it on the way (redaction.py). The same folder
gives the same bytes, whenever and by whomever it is packed; the digits in the name are the payload's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from smbench import __version__, memorysnapshot, recipe, report, reproduce, runfolder
from smbench import result as schema
from smbench.archive import CHUNK, Writer, unsafe
from smbench.bag import bundle_name, info_of, manifest_of, tag_files
from smbench.cell import Cell
from smbench.errors import CorruptError, UsageError
from smbench.identity import environment_id
from smbench.redaction import Personal, Redactor
from smbench.result import Record, Status
from smbench.runfolder import Run
from smbench.sources import KERNELS, kernel_files, kernels_sha256, renderer_id
from smbench.verify import verify

FOREIGN = ("logs", "native", "traces")
UNREADABLE = (".nsys-rep", ".sqlite")
"""Endings of files that cannot be redacted: Nsight Systems keeps the environment of what it watched."""
IMAGE_DIR = Path("/etc/smbench")
SBOM = "sbom.json"
VERSIONED = ("libraries", "runtime", "python", "gpu")
"""Groups of an environment in which dotted numbers are versions."""
FIXED = ("record", "cell", "cell_id", "environment_id", "status", "measurements")
"""Keys of a result whose content the plan and the recipe fix, or that are numbers."""
_SCHEMA_WORDS: tuple[str, ...] = (
    *get_args(Status),
    *("graph", "event", "wall", "allocator", "cold", "warm", "finished", "interrupted", "failed"),
    *("default", "tuned", "exact", "nearest", "given", "library", "smbench", "kernels", "cuda", "cpu"),
    *("result", "environment", "session", "float16", "bfloat16", "float32", "float64"),
)
_MODELS: tuple[type[BaseModel], ...] = (
    *(recipe.Recipe, recipe.Profile, recipe.Grid, recipe.MeasureRow, recipe.ProviderRow, recipe.Estimate),
    Cell,
    *(kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, Record)),
    *(runfolder.RunFile, runfolder.PlanFile),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One payload file, its place relative to `data/`."""

    name: str
    size_bytes: int
    sha256: str
    redacted: Mapping[str, int]
    """Replacements by placeholder."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a bundle is about to hold: all that `--review` shows."""

    name: str
    """Of the bundle, without its suffix."""
    entries: Sequence[Entry]
    notes: Sequence[str]
    """What the reader of a review must know: what stays out, what was redrawn."""
    planned: int
    reached: int

    def lines(self) -> list[str]:
        """What goes in, for a person who decides whether it may."""
        redacted = [(entry, ", ".join(f"{n} {mark}" for mark, n in entry.redacted.items())) for entry in self.entries]
        return [
            f"{self.name}: {len(self.entries)} files, {sum(entry.size_bytes for entry in self.entries)} bytes",
            *(f"{e.size_bytes:>10}  {e.name}" + (f"  (redacted: {what})" if what else "") for e, what in redacted),
            *(f"note: {note}" for note in self.notes),
        ]

    def summary(self) -> dict[str, Any]:
        """The same for a program."""
        files = [{"name": e.name, "bytes": e.size_bytes, "redacted": dict(e.redacted)} for e in self.entries]
        counts = {"planned": self.planned, "reached": self.reached}
        return {"name": self.name, "files": files, "notes": list(self.notes), **counts}


@dataclass(frozen=True, slots=True)
class Packed:
    """A bundle that was written."""

    path: Path
    contents: Contents

    @property
    def notes(self) -> Sequence[str]:
        """What the one who packs must know."""
        return self.contents.notes


@dataclass(slots=True)
class _Stage:
    """A private folder with the redacted copy, and what became of each file."""

    source: Path
    folder: Path
    redactor: Redactor
    redacted: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def counted(self, name: str, change: Callable[[], bytes]) -> None:
        """Write what `change` gives and book its replacements on the file."""
        before = self.redactor.counts.copy()
        self.write(name, change())
        if found := self.redactor.counts - before:
            self.redacted[name] = found


def pack(
    folder: Path,
    out: Path | None = None,
    personal: Personal | None = None,
    approve: Callable[[Contents], bool] = lambda contents: True,
) -> Packed | None:
    """Write the bundle of a run folder and verify it; None where `approve` refuses what would go in.

    `out` is the file, or a folder for it; without it the bundle lies in the run folder. UsageError where the plan
    itself holds something private, since that cannot be redacted without changing what was measured; CorruptError
    where the folder's records do not hold together.
    """
    run = runfolder.load(folder)
    redactor = Redactor(personal or Personal.of_this_process(), _vocabulary(run))
    with tempfile.TemporaryDirectory(prefix="smbench-pack-") as private:
        stage = _Stage(folder, Path(private), redactor)
        stage.notes += [f"{name!r} is a word of this recipe and stays" for name in redactor.kept]
        staged = _fill(stage, run)
        entries = [_entry(stage, path) for path in sorted(_files(stage.folder), key=lambda p: _place(stage.folder, p))]
        manifest = manifest_of((entry.sha256, f"data/{entry.name}") for entry in entries)
        name = bundle_name(staged, manifest)
        contents = Contents(name, entries, stage.notes, len(staged.cells), len(staged.results))
        if not approve(contents):
            return None
        target = _target(folder, out, name)
        size_bytes = sum(entry.size_bytes for entry in entries)
        info = info_of(staged, size_bytes, len(entries), __version__, renderer_id())
        _write(target, name, stage.folder, entries, tag_files(info, manifest))
    return Packed(target, contents)


def _fill(stage: _Stage, run: Run) -> Run:
    """Write the payload; the run as it reads after redaction."""
    _records(stage, run)
    for kind in FOREIGN:
        for path in _files(stage.source / kind):
            _foreign(stage, path, f"{kind}/{_place(stage.source / kind, path)}")
        stage.notes += [f"{odd.name} in {kind}/ is no plain file and stays out" for odd in _odd(stage.source / kind)]
    staged = runfolder.load(stage.folder)
    _machinery(stage, staged)
    _report(stage, staged)
    stage.write("REPRODUCE.md", reproduce.render(staged))
    if len(staged.results) < len(staged.cells):
        left = len(staged.cells) - len(staged.results)
        stage.notes.append(f"{left} of {len(staged.cells)} planned cells have no result yet: the bundle says so")
    torn = [path.name for path in sorted(stage.source.glob("results.torn-*.txt"))]
    stage.notes += [f"{name} is half a record and stays out" for name in torn] + list(run.warnings)
    return staged


def _records(stage: _Stage, run: Run) -> None:
    """Recipe, plan and results: redacted where that changes no identity, refused where it would."""
    redact = stage.redactor
    for name in ("run.json", "plan.json"):
        text = (stage.source / name).read_bytes()
        clean = json.dumps(redact.tree(json.loads(text)))
        if clean != json.dumps(json.loads(text)):
            raise UsageError(
                f"{stage.source / name} holds something private that names what was measured, so it cannot be redacted "
                f"({_first_difference(json.dumps(json.loads(text)), clean)}); rename it in the recipe and measure again"
            )
        stage.write(name, text)
    recipe_text = (stage.source / "recipe.toml").read_bytes()
    stage.counted("recipe.toml", lambda: redact.text(recipe_text.decode()).encode())
    try:
        parsed = recipe.parse((stage.folder / "recipe.toml").read_bytes(), "recipe.toml")
        same = parsed.cells(run.profile_name) == run.recipe.cells(run.profile_name)
    except (UsageError, KeyError):
        same = False
    if not same:
        raise UsageError(
            f"{stage.source / 'recipe.toml'} holds something private in a name or an axis, so it cannot be redacted; "
            "rename it in the recipe and measure again"
        )
    stage.counted("results.jsonl", lambda: b"".join(_redacted_lines(stage.source / "results.jsonl", redact)))


def _redacted_lines(path: Path, redact: Redactor) -> Iterator[bytes]:
    """Each whole line of results.jsonl, byte for byte where there was nothing to redact."""
    renamed: dict[str, str] = {}
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            before = json.loads(line)
            after = _redacted_record(before, redact, renamed)
            yield (
                line
                if after == before
                else (json.dumps(after, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode()
            )


def _redacted_record(record: dict[str, Any], redact: Redactor, renamed: dict[str, str]) -> dict[str, Any]:
    """One record; an environment that changes gets the identity of what it is now, and its results follow."""
    if record["record"] == "environment":
        facts: dict[str, Any] = {
            redact.text(key): redact.tree(value, versions=key in VERSIONED)
            for key, value in record["environment"].items()
        }
        if facts == record["environment"]:
            return record
        renamed[record["environment_id"]] = environment_id(facts)
        return {**record, "environment": facts, "environment_id": renamed[record["environment_id"]]}
    after = {key: value if key in FIXED else redact.tree(value) for key, value in record.items()}
    if after.get("environment_id") in renamed:
        after["environment_id"] = renamed[after["environment_id"]]
    return after


def _foreign(stage: _Stage, path: Path, name: str) -> None:
    """A log, or a file that an engine wrote: text is redacted; what is no text goes as it is, or not at all."""
    data = path.read_bytes()
    if path.suffix in UNREADABLE:
        stage.notes.append(f"{path.name} holds variables of the process in a form of its own and stays out")
        return
    if not data:
        return
    clean = "/".join(_clean_component(stage.redactor.text(part)) for part in name.split("/"))
    while clean in stage.redacted or (stage.folder / clean).exists():
        stem, dot, suffix = clean.rpartition(".")
        clean = f"{stem}_{dot}{suffix}" if dot else f"{clean}_"
    if unsafe(clean):
        stage.notes.append(f"a file in {name.partition('/')[0]}/ has a name that not every system takes; it stays out")
        return
    if name != clean:
        stage.notes.append(f"a file is called {clean} here")
    if clean.endswith(memorysnapshot.SUFFIX):
        # as text its addresses would read like anything
        try:
            stage.counted(clean, lambda: memorysnapshot.rewritten(data, clean, stage.redactor.tree))
        except CorruptError as error:
            stage.notes.append(f"{error}; it stays out")
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        if stage.redactor.text(text) != text:
            stage.notes.append(f"{clean} is no text and holds something private; it stays out")
            return
        stage.write(clean, data)
        return
    stage.counted(clean, lambda: stage.redactor.text(text).encode())


def _machinery(stage: _Stage, run: Run) -> None:
    """Sources of our kernels and the image's identity, only where the records say that these are what ran."""
    recorded = {(entry.environment.get("smbench") or {}).get("kernels_sha256") for entry in run.environments}
    if kernels_sha256() in recorded:
        for name, data in kernel_files().items():
            if stage.redactor.holds_secret(data.decode("utf-8")):
                raise UsageError(f"{KERNELS}/{name} holds what looks like a secret; take it out and measure again")
            stage.write(f"sources/{KERNELS}/{name}", data)
    elif run.environments:
        stage.notes.append(f"the sources of {KERNELS} here are not those that ran; they stay out")
    images = [entry.environment.get("image") or {} for entry in run.environments]
    if images and images[0]:
        stage.write("image/image.json", (json.dumps(images[0], indent=1, sort_keys=True) + "\n").encode())
    here, sbom = IMAGE_DIR / "image.json", IMAGE_DIR / SBOM
    # a result knows more of its image than the file in it: the digest that it was started by
    told = json.loads(here.read_bytes()) if here.is_file() and sbom.is_file() else None
    if told is not None and images and told.items() <= images[0].items():
        stage.counted(f"image/{SBOM}", lambda: stage.redactor.secrets(sbom.read_text(encoding="utf-8")).encode())


def _report(stage: _Stage, run: Run) -> None:
    """The report of the redacted records; figures are drawn again only where the text is not the run's own."""
    document = report.document_of(report.analysis_of(run))
    places = [f"figures/{plot.file}" for plot in document.plots()]
    old = stage.source / "report.md"
    drawn = {place: (stage.source / place).read_bytes() for place in places if (stage.source / place).is_file()}
    files = report.written(document, run, drawn)
    if drawn.keys() != set(places) or not old.is_file() or old.read_bytes() != files["report.md"]:
        drawn = report.draw(document)
        files = report.written(document, run, drawn)
        stage.notes.append("the report was rendered again for the bundle")
    for place, data in {**drawn, **files}.items():
        stage.write(place, data)


def _write(target: Path, name: str, stage: Path, entries: Sequence[Entry], tags: Mapping[str, bytes]) -> None:
    """Write the archive in one step. UsageError where the place cannot be written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file, Writer(file) as writer:
            for tag, data in tags.items():
                writer.add(f"{name}/{tag}", len(data), [data])
            for entry in entries:
                writer.add(f"{name}/data/{entry.name}", entry.size_bytes, _chunks(stage / entry.name))
        # whoever gets it will do the same, and it is too late then
        verify(temporary, called=target.name)
        temporary.replace(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}; choose another place with -o") from error
    finally:
        temporary.unlink(missing_ok=True)


def _target(folder: Path, out: Path | None, name: str) -> Path:
    if out is None or out.is_dir():
        return (out or folder) / f"{name}.tar.gz"
    if not out.name.endswith(".tar.gz"):
        raise UsageError(f"{out}: a bundle is a .tar.gz; name it so, or name a folder that exists")
    return out


def _entry(stage: _Stage, path: Path) -> Entry:
    name, digest = _place(stage.folder, path), hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    if why := unsafe(f"data/{name}"):
        raise CorruptError(f"{name}: a bundle cannot hold a file with a name {why}")
    return Entry(name, path.stat().st_size, digest.hexdigest(), dict(stage.redacted.get(name, {})))


def _vocabulary(run: Run) -> set[str]:
    """The experiment's own words: cutting one of them would change what the records say was measured."""
    known = run.recipe
    names = {known.name, known.stack, known.template, *known.providers, *known.profile, *known.values}
    names |= {measure.name for profile in known.profile.values() for measure in profile.measure}
    names |= {profile.template for profile in known.profile.values() if profile.template}
    names |= {name for model in _MODELS for name in model.model_fields}
    for cell in run.cells:
        names |= {cell.subject, *cell.axes, *(value for value in cell.axes.values() if isinstance(value, str))}
    parts = {part for name in names for part in name.replace(".", "-").replace("_", "-").split("-")}
    return {*names, *parts, *_SCHEMA_WORDS}


def _clean_component(name: str) -> str:
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "_.+=,-") else "_" for char in name)
    return kept.strip(".-+=,")[:80] or "_"


def _files(folder: Path) -> list[Path]:
    """The plain files below a folder, links not followed, ours that are only half written left out."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name.endswith(".tmp") or path.name.startswith("."):
            continue
        found += _files(path) if path.is_dir() else [path] if path.is_file() else []
    return found


def _odd(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not (path.is_file() or path.is_dir())]


def _place(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _first_difference(before: str, after: str) -> str:
    at = next(i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
    return f"near {after[max(0, at - 40) : at + 20]!r}"
