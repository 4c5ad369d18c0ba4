"""Checks a bundle against itself: hashes, completeness, schemas, identities, and that the report follows from all that.

Reads the file once, front to back, and writes nothing: what is kept of a cell is its summary, never its samples, so
memory grows with the number of cells and not with the size of the file. Needs no GPU, torch, engine or matplotlib.
That a bundle is whole and consistent is all it can show: whoever can run smbench can also make up a bundle.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError

from smbench import bag, recipe, report, reproduce
from smbench.analysis import summaries_of
from smbench.archive import Member, Reader, unsafe
from smbench.cell import Cell
from smbench.errors import CorruptError, UsageError
from smbench.identity import environment_id, files_sha256
from smbench.recipe import Recipe
from smbench.result import FORMAT as RUN_FORMAT
from smbench.result import Environment, Result, Session
from smbench.runfolder import PlanFile, Run, RunFile, parse_json, parse_record
from smbench.sources import KERNELS, renderer_id
from smbench.stats import Summary

MOST_BYTES: Mapping[str, int] = {
    "run.json": 1 << 16,
    "recipe.toml": 1 << 20,
    "plan.json": 64 << 20,
    "report.md": 16 << 20,
}
"""Files that are read whole may be this long."""
MOST_TAG_BYTES = 8 << 20
MOST_HELD_BYTES = 32 << 20
"""Of all figures and sources together: the page holds the former, a hash is made of the latter."""
MOST_LINE_BYTES = 16 << 20
MOST_CELLS = 1_000_000
AT_ONCE_BYTES = 4 << 20
"""Records that are in memory with their samples, as they are in the file."""
PNG = b"\x89PNG\r\n\x1a\n"
_MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  data/([^\n]+)\n")


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that holds what it says."""

    name: str
    packed_bytes: int
    unpacked_bytes: int
    payload_files: int
    run: Run
    """Without samples, unless they were asked for."""
    statuses: Mapping[str, int]
    """Stored statuses, before any guard."""
    packed_by: str
    """Version of smbench that packed it."""
    unconfirmed: tuple[str, ...]
    """Files that another version of smbench rendered and this one renders otherwise: neither right nor wrong."""
    kernels: str
    """What is known of the kernels' sources."""

    def lines(self) -> list[str]:
        """What was checked, for a terminal."""
        run, size = self.run, f"{self.unpacked_bytes / 1e6:.1f} MB, {self.packed_bytes / 1e6:.1f} MB packed"
        statuses = ", ".join(f"{count} {status}" for status, count in self.statuses.items()) or "none"
        rendered = "rendered again from the records, to the same bytes"
        if self.unconfirmed:
            rendered = (
                f"NOT CONFIRMED: {', '.join(self.unconfirmed)}: rendered by another build (smbench {self.packed_by}), "
                "and otherwise by this one; verify with that build, or render the data again (`smbench report`)"
            )
        missing = len(run.cells) - len(run.results)
        unfinished = f" ({missing} have none: the run is unfinished)" if missing else ""
        return [
            f"{self.name}: {'records verified, report not confirmed' if self.unconfirmed else 'verified'}",
            f"  archive  {size}; plain files only, each once",
            f"  hashes   {self.payload_files} payload files, {len(bag.TAG_FILES)} tag files, none missing, none added",
            f"  records  {len(run.results)} of {len(run.cells)} planned cells{unfinished}: {statuses}; "
            f"{len(run.environments)} environment{'s' if len(run.environments) != 1 else ''}",
            "  identity plan against recipe, every cell id, every environment id",
            f"  report   {rendered}",
            f"  kernels  sources {self.kernels}",
        ]

    def summary(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "verified": not self.unconfirmed,
            "name": self.name,
            "recipe": self.run.recipe.name,
            "profile": self.run.profile_name,
            "packed_by": self.packed_by,
            "packed_bytes": self.packed_bytes,
            "unpacked_bytes": self.unpacked_bytes,
            "payload_files": self.payload_files,
            "planned": len(self.run.cells),
            "statuses": dict(self.statuses),
            "unconfirmed": list(self.unconfirmed),
            "kernels": self.kernels,
        }


def verify(path: Path, keep_samples: bool = False, called: str = "") -> Verified:
    """Check a bundle. CorruptError names the file in it and what differs; UsageError where there is no such file.

    `called` is what errors call the bundle, where that is not its file's name.
    """
    try:
        with path.open("rb") as file, _uncollected():
            name = called or path.name
            return _Verification(path, name, Reader(name, file), keep_samples).run()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for cycles: records are many objects and have none, and it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(slots=True)
class _Manifest:
    """The payload that was promised, in its order."""

    data: bytes
    digests: Mapping[str, str]
    sizes: dict[str, int] = field(default_factory=dict)


class _Verification:
    """One pass over one file."""

    def __init__(self, path: Path, name: str, reader: Reader, keep_samples: bool) -> None:
        self._path = path
        self._name = name
        self._reader = reader
        self._keep_samples = keep_samples
        self._kept: dict[str, bytes] = {}
        self._figures: dict[str, bytes] = {}
        self._kernel_files: dict[str, bytes] = {}
        self._planned: dict[str, Cell] = {}
        self._environments: set[str] = set()
        self._records = _Records()

    def run(self) -> Verified:
        members = iter(self._reader)
        root, tags = self._tags(members)
        manifest = self._manifest(tags[2])
        if tags[3] != bag.tag_files(tags[1], tags[2])[bag.TAG_FILES[3]]:
            self._corrupt(bag.TAG_FILES[3], "the hashes of the tag files are not theirs")
        info = self._info(tags[1])
        self._payload(members, root, manifest)
        run = self._run()
        self._consistent(run)
        version = info["Bag-Software-Agent"].removeprefix(bag.AGENT)
        size_bytes, renderer = sum(manifest.sizes.values()), info["Smbench-Renderer"]
        if tags[1] != bag.info_of(run, size_bytes, len(manifest.sizes), version, renderer):
            self._corrupt("bag-info.txt", "it is not what the payload makes it")
        if root != bag.bundle_name(run, manifest.data):
            self._corrupt(root, f"the folder is not called {bag.bundle_name(run, manifest.data)}, as its manifest says")
        return Verified(
            name=root,
            packed_bytes=self._reader.packed_bytes,
            unpacked_bytes=self._reader.unpacked_bytes,
            payload_files=len(manifest.sizes),
            run=run,
            statuses=Counter(result.status for result in run.results.values()),
            packed_by=version,
            unconfirmed=self._rendered(run, manifest, renderer),
            kernels=self._kernels(run),
        )

    def _tags(self, members: Iterator[Member]) -> tuple[str, list[bytes]]:
        """The name of the top folder and the content of the tag files."""
        root, contents = "", []
        for name in bag.TAG_FILES:
            member = next(members, None)
            root = root or (member.name.partition("/")[0] if member else "")
            if member is None or member.name != f"{root}/{name}":
                self._corrupt(name, f"missing: {member.name if member else 'the end'} comes where it is due")
            contents.append(self._reader.read(MOST_TAG_BYTES))
            if name == "bagit.txt" and contents[0] != bag.BAGIT:
                self._corrupt(name, "it does not say BagIt 1.0 in UTF-8")
        return root, contents

    def _manifest(self, data: bytes) -> _Manifest:
        text = self._text(data, "manifest-sha256.txt")
        digests: dict[str, str] = {}
        last, end = "", 0
        for line in _MANIFEST_LINE.finditer(text):
            digest, place = line.groups()
            if line.start() != end:
                break
            end = line.end()
            if unsafe(place) or bag.foreign_place(place):
                self._corrupt("manifest-sha256.txt", f"bundles of format {bag.FORMAT} have no file {place!a}")
            if place <= last:
                self._corrupt("manifest-sha256.txt", f"{place} comes after {last}: the order is not a manifest's")
            digests[place], last = digest, place
        if end != len(text):
            self._corrupt("manifest-sha256.txt", f"line {len(digests) + 1} is no line of a manifest")
        for place in bag.REQUIRED:
            if place not in digests:
                self._corrupt("manifest-sha256.txt", f"it leaves {place} out")
        return _Manifest(data, digests)

    def _info(self, data: bytes) -> Mapping[str, str]:
        lines = [line.partition(": ") for line in self._text(data, "bag-info.txt").splitlines()]
        info = {key: value for key, _, value in lines}
        for key, known in (("Smbench-Bundle-Format", bag.FORMAT), ("Smbench-Run-Format", RUN_FORMAT)):
            version = info.get(key, "")
            if re.fullmatch(r"[1-9]\d{0,8}", version) and int(version) > known:
                self._corrupt(
                    "bag-info.txt", f"{key} {version} is newer than smbench reads here ({known}); update smbench"
                )
        if tuple(key for key, _, _ in lines) != bag.INFO:
            self._corrupt("bag-info.txt", f"its keys are not {', '.join(bag.INFO)}")
        if not re.fullmatch(r"[0-9a-f]{16}", info["Smbench-Renderer"]):
            self._corrupt("bag-info.txt", "Smbench-Renderer is not 16 hex digits")
        return info

    def _payload(self, members: Iterator[Member], root: str, manifest: _Manifest) -> None:
        """Every file of the manifest, and no other, with its hash."""
        due = iter(manifest.digests)
        for member in members:
            place = next(due, None)
            if place is None or member.name != f"{root}/data/{place}":
                known = member.name.removeprefix(f"{root}/data/") in manifest.digests
                what = f"{place} is missing before it" if known and place else "the manifest does not list it"
                raise self._reader.corrupt(what)
            manifest.sizes[place] = member.size_bytes
            digest = hashlib.sha256()
            failure: CorruptError | None = None
            try:
                self._content(place, digest.update)
            except CorruptError as error:
                # a changed byte shows as a changed file, not as whatever it happens to break
                failure = error
                for chunk in self._reader.chunks():
                    digest.update(chunk)
            if digest.hexdigest() != manifest.digests[place]:
                raise self._reader.corrupt(
                    f"it was changed: its SHA-256 is {digest.hexdigest()}, the manifest says {manifest.digests[place]}"
                )
            if failure:
                raise failure
        if (place := next(due, None)) is not None:
            self._corrupt(f"data/{place}", "missing: the manifest lists it")

    def _content(self, place: str, update: Callable[[bytes], None]) -> None:
        """Read one file of the payload; keep what later checks need."""
        if place == "results.jsonl":
            self._results(update)
            return
        folder = place.partition("/")[0]
        if place in MOST_BYTES or folder in ("figures", "sources"):
            held = sum(map(len, chain(self._figures.values(), self._kernel_files.values())))
            data = self._reader.read(MOST_BYTES.get(place, MOST_HELD_BYTES - held))
            update(data)
            self._keep(place, folder, data)
        for chunk in self._reader.chunks():
            update(chunk)

    def _keep(self, place: str, folder: str, data: bytes) -> None:
        if folder == "figures":
            if not data.startswith(PNG):
                raise self._reader.corrupt("it is no PNG")
            self._figures[place] = data
        elif folder == "sources":
            self._kernel_files[place.removeprefix(f"sources/{KERNELS}/")] = data
        else:
            self._kept[place] = data
            if place == "plan.json":
                cells = parse_json(data, PlanFile, f"{self._name}: data/plan.json").cells
                self._planned = {cell.cell_id: cell for cell in cells}

    def _results(self, update: Callable[[bytes], None]) -> None:
        """Every record, some of them at a time."""
        batch: list[Result | Environment | Session] = []
        size_bytes = 0
        for number, line in enumerate(self._lines(update), start=1):
            record = parse_record(line, self._at(f"line {number}"))
            if fault := self._fault(record):
                raise CorruptError(f"{self._at(f'line {number}')}: {fault}")
            batch.append(record)
            size_bytes += len(line)
            if size_bytes > AT_ONCE_BYTES:
                self._records.add(batch, self._keep_samples)
                batch, size_bytes = [], 0
        self._records.add(batch, self._keep_samples)

    def _lines(self, update: Callable[[bytes], None]) -> Iterator[bytes]:
        rest = b""
        for chunk in self._reader.chunks():
            update(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > MOST_LINE_BYTES:
                raise self._reader.corrupt(f"a line is longer than {MOST_LINE_BYTES >> 20} MiB")
        if rest:
            raise self._reader.corrupt("its last line has no end")

    def _fault(self, record: Result | Environment | Session) -> str | None:
        """What is wrong with a record beside its schema."""
        if isinstance(record, Environment):
            due = environment_id(record.environment)
            self._environments.add(due)
            return None if record.environment_id == due else f"environment_id is not that of the environment ({due})"
        if isinstance(record, Result):
            if record.status == "invalid":
                return "status 'invalid' is computed from records and never stored"
            if record.cell_id not in self._planned:
                return f"the plan has no cell {record.cell_id}"
            if record.environment_id is not None and record.environment_id not in self._environments:
                return f"no environment {record.environment_id} comes before it"
        return None

    def _run(self) -> Run:
        """The whole run, as a run folder would give it."""
        about = parse_json(self._kept["run.json"], RunFile, f"{self._name}: data/run.json")
        loaded = self._recipe()
        if (loaded.name, about.profile in loaded.profile) != (about.recipe, True):
            self._corrupt("data/run.json", "recipe.toml is another recipe, or has no such profile")
        found = self._records
        return Run(
            folder=self._path,
            recipe=loaded,
            recipe_text=self._kept["recipe.toml"],
            profile_name=about.profile,
            smbench_version=about.smbench_version,
            cells=list(self._planned.values()),
            results=found.results,
            environments=list(found.environments.values()),
            sessions=found.sessions,
            warnings=(),
        )

    def _recipe(self) -> Recipe:
        try:
            return recipe.parse(self._kept["recipe.toml"], "data/recipe.toml")
        except (UsageError, CorruptError) as error:
            raise CorruptError(f"{self._name}: {error}") from error
        # TOML has no limits of its own: numbers of any length, tables of any depth
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{self._name}: data/recipe.toml: {error}") from error

    def _consistent(self, run: Run) -> None:
        """Recipe, plan and results are of one experiment."""
        if run.recipe.size(run.profile_name) > MOST_CELLS:
            self._corrupt("data/recipe.toml", f"its profile has more than {MOST_CELLS} cells")
        chosen = {cell.provider for cell in run.cells}
        due = [cell for cell in run.recipe.cells(run.profile_name) if cell.provider in chosen]
        if run.cells != due:
            wrong = next(i for i, pair in enumerate(zip_longest(run.cells, due)) if pair[0] != pair[1])
            self._corrupt("data/plan.json", f"cells.{wrong}: the recipe's profile has another cell there, or none")
        ways = {row.name: (row.method, row.l2) for row in run.recipe.profile[run.profile_name].measure}
        for result in run.results.values():
            for entry in result.measurements:
                if ways.get(entry.name) != (entry.method, entry.l2):
                    what = f"cell {result.cell_id}: the profile has no measure {entry.name!r} like its"
                    self._corrupt("data/results.jsonl", what)

    def _rendered(self, run: Run, manifest: _Manifest, renderer: str) -> tuple[str, ...]:
        """The places of what does not render to the same bytes, where another smbench rendered it.

        CorruptError where this very smbench did, and so the records must give these bytes.
        """
        rendered = self._render(run)
        folders = ("figures/", "records/")
        there = [place for place in manifest.digests if place in rendered or place.startswith(folders)]
        wrong = [
            place
            for place in dict.fromkeys(chain(rendered, there))
            if hashlib.sha256(rendered.get(place, b"")).hexdigest() != manifest.digests.get(place)
        ]
        if wrong and renderer == renderer_id():
            # the text is read by people, and says best what is wrong
            place = "report.md" if "report.md" in wrong else wrong[0]
            line = _first_difference(self._kept.get(place, b""), rendered.get(place, b""))
            self._corrupt(f"data/{place}", f"the records do not render to it{line}")
        return tuple(wrong)

    def _render(self, run: Run) -> dict[str, bytes]:
        """Every file that is rendered from the records, and the figures, which are taken as they are."""
        try:
            document = report.document_of(report.analysis_of(run, self._records.summaries))
            places = {f"figures/{plot.file}" for plot in document.plots()}
            if missing := sorted(places ^ self._figures.keys()):
                self._corrupt(f"data/{missing[0]}", "the report and the figures that are there do not agree")
            return {
                **self._figures,
                **report.written(document, run, self._figures),
                "REPRODUCE.md": reproduce.render(run),
            }
        # schemas cannot exclude every record that no report can be made of, such as a clock that is a word
        except (
            ArithmeticError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
            UsageError,
            TemplateError,
        ) as error:
            what = f"no report can be rendered from these records ({type(error).__name__}: {error})"
            raise CorruptError(f"{self._name}: data/report.md: {what[:400]}") from error

    def _kernels(self, run: Run) -> str:
        """Whether the sources are those that the records name. CorruptError where they are others."""
        recorded = {(entry.environment.get("smbench") or {}).get("kernels_sha256") for entry in run.environments}
        if not self._kernel_files:
            return "not included"
        found = files_sha256((place, self._kernel_files[place]) for place in sorted(self._kernel_files))
        if found not in recorded:
            self._corrupt(f"data/sources/{KERNELS}", "these are not the sources that the results were made with")
        return f"{len(self._kernel_files)} files, as recorded when they ran"

    def _text(self, data: bytes, place: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptError(f"{self._name}: {place}: not UTF-8 at byte {error.start}") from error

    def _at(self, where: str) -> str:
        return f"{self._name}: data/results.jsonl: {where}"

    def _corrupt(self, place: str, what: str) -> NoReturn:
        raise CorruptError(f"{self._name}: {place}: {what}")


@dataclass(slots=True)
class _Records:
    """What is kept of results.jsonl."""

    results: dict[str, Result] = field(default_factory=dict)
    environments: dict[str, Environment] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    summaries: dict[tuple[str, str], Summary] = field(default_factory=dict)

    def add(self, records: Iterable[Result | Environment | Session], keep_samples: bool) -> None:
        """Take some records in; of results the summaries stay, and the samples only if they are to be kept."""
        results = []
        for record in records:
            match record:
                case Result():
                    results.append(record)
                case Environment():
                    self.environments[record.environment_id] = record
                case Session():
                    self.sessions.append(record)
        self.summaries |= summaries_of(results)
        for result in results:
            self.results[result.cell_id] = result if keep_samples else _slim(result)


def _slim(result: Result) -> Result:
    """The result without its samples."""
    for measurement in result.measurements:
        # nobody else has it yet, and a copy of each takes longer than reading it
        measurement.__dict__.update(samples_s=measurement.samples_s[:1], warmup_s=())
    return result


def _first_difference(there: bytes, due: bytes) -> str:
    """The first line that differs, where the text was kept."""
    pairs = zip_longest(there.decode("utf-8", "replace").splitlines(), due.decode().splitlines(), fillvalue="")
    for number, (line, wanted) in enumerate(pairs if there else (), start=1):
        if line != wanted:
            return f": line {number} is {line[:120]!r}, due is {wanted[:120]!r}"
    return ""
