"""Reads a bundle front to back: tag files, hashes, completeness, and the records in it. Owns what a bag must be.

Writes nothing, and keeps of a result its summary and not its samples, so that memory grows with the number of cells and
not with the size of the file. Does not know whether recipe, plan, records and report are of one experiment (verify.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NoReturn

from smbench import bag
from smbench.analysis import summaries_of
from smbench.archive import Member, Reader, unsafe
from smbench.cell import Cell
from smbench.errors import CorruptError
from smbench.identity import environment_id
from smbench.result import FORMAT as RUN_FORMAT
from smbench.result import Environment, Result, Session
from smbench.runfolder import PlanFile, parse_json, parse_record
from smbench.sources import KERNELS
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


@dataclass(slots=True)
class Manifest:
    """The payload that was promised, in its order."""

    data: bytes
    digests: Mapping[str, str]
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Records:
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


class BagReader:
    """One pass over one file; `read` fills the rest. CorruptError names the file in it and what is wrong."""

    def __init__(self, name: str, reader: Reader, keep_samples: bool) -> None:
        self._name = name
        self._reader = reader
        self._keep_samples = keep_samples
        self._environments: set[str] = set()
        self.root = ""
        """The name of the top folder."""
        self.tags: list[bytes] = []
        """The tag files."""
        self.info: Mapping[str, str] = {}
        """bag-info.txt."""
        self.manifest = Manifest(b"", {})
        self.kept: dict[str, bytes] = {}
        """Files of MOST_BYTES, by their places."""
        self.figures: dict[str, bytes] = {}
        self.kernel_files: dict[str, bytes] = {}
        """Sources by relative path."""
        self.plan: dict[str, Cell] = {}
        self.records = Records()

    def read(self) -> None:
        """Read the file to its end."""
        members = iter(self._reader)
        self.root, self.tags = self._tags(members)
        self.manifest = self._manifest(self.tags[2])
        if self.tags[3] != bag.tag_files(self.tags[1], self.tags[2])[bag.TAG_FILES[3]]:
            self.corrupt(bag.TAG_FILES[3], "the hashes of the tag files are not theirs")
        self.info = self._info(self.tags[1])
        self._payload(members, self.root, self.manifest)

    def corrupt(self, place: str, what: str) -> NoReturn:
        """Raise the error for a file of the bundle."""
        raise CorruptError(f"{self._name}: {place}: {what}")

    def _tags(self, members: Iterator[Member]) -> tuple[str, list[bytes]]:
        """The name of the top folder and the content of the tag files."""
        root, contents = "", []
        for name in bag.TAG_FILES:
            member = next(members, None)
            root = root or (member.name.partition("/")[0] if member else "")
            if member is None or member.name != f"{root}/{name}":
                self.corrupt(name, f"missing: {member.name if member else 'the end'} comes where it is due")
            contents.append(self._reader.read(MOST_TAG_BYTES))
            if name == "bagit.txt" and contents[0] != bag.BAGIT:
                self.corrupt(name, "it does not say BagIt 1.0 in UTF-8")
        return root, contents

    def _manifest(self, data: bytes) -> Manifest:
        text = self._text(data, "manifest-sha256.txt")
        digests: dict[str, str] = {}
        last, end = "", 0
        for line in _MANIFEST_LINE.finditer(text):
            digest, place = line.groups()
            if line.start() != end:
                break
            end = line.end()
            if unsafe(place) or bag.foreign_place(place):
                self.corrupt("manifest-sha256.txt", f"bundles of format {bag.FORMAT} have no file {place!a}")
            if place <= last:
                self.corrupt("manifest-sha256.txt", f"{place} comes after {last}: the order is not a manifest's")
            digests[place], last = digest, place
        if end != len(text):
            self.corrupt("manifest-sha256.txt", f"line {len(digests) + 1} is no line of a manifest")
        for place in bag.REQUIRED:
            if place not in digests:
                self.corrupt("manifest-sha256.txt", f"it leaves {place} out")
        return Manifest(data, digests)

    def _info(self, data: bytes) -> Mapping[str, str]:
        lines = [line.partition(": ") for line in self._text(data, "bag-info.txt").splitlines()]
        info = {key: value for key, _, value in lines}
        for key, known in (("Smbench-Bundle-Format", bag.FORMAT), ("Smbench-Run-Format", RUN_FORMAT)):
            version = info.get(key, "")
            if re.fullmatch(r"[1-9]\d{0,8}", version) and int(version) > known:
                self.corrupt(
                    "bag-info.txt", f"{key} {version} is newer than smbench reads here ({known}); update smbench"
                )
        if tuple(key for key, _, _ in lines) != bag.INFO:
            self.corrupt("bag-info.txt", f"its keys are not {', '.join(bag.INFO)}")
        if not re.fullmatch(r"[0-9a-f]{16}", info["Smbench-Renderer"]):
            self.corrupt("bag-info.txt", "Smbench-Renderer is not 16 hex digits")
        return info

    def _payload(self, members: Iterator[Member], root: str, manifest: Manifest) -> None:
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
            self.corrupt(f"data/{place}", "missing: the manifest lists it")

    def _content(self, place: str, update: Callable[[bytes], None]) -> None:
        """Read one file of the payload; keep what later checks need."""
        if place == "results.jsonl":
            self._results(update)
            return
        folder = place.partition("/")[0]
        if place in MOST_BYTES or folder in ("figures", "sources"):
            held = sum(map(len, chain(self.figures.values(), self.kernel_files.values())))
            data = self._reader.read(MOST_BYTES.get(place, MOST_HELD_BYTES - held))
            update(data)
            self._keep(place, folder, data)
        for chunk in self._reader.chunks():
            update(chunk)

    def _keep(self, place: str, folder: str, data: bytes) -> None:
        if folder == "figures":
            if not data.startswith(PNG):
                raise self._reader.corrupt("it is no PNG")
            self.figures[place] = data
        elif folder == "sources":
            self.kernel_files[place.removeprefix(f"sources/{KERNELS}/")] = data
        else:
            self.kept[place] = data
            if place == "plan.json":
                cells = parse_json(data, PlanFile, f"{self._name}: data/plan.json").cells
                self.plan = {cell.cell_id: cell for cell in cells}

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
                self.records.add(batch, self._keep_samples)
                batch, size_bytes = [], 0
        self.records.add(batch, self._keep_samples)

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
            if record.cell_id not in self.plan:
                return f"the plan has no cell {record.cell_id}"
            if record.environment_id is not None and record.environment_id not in self._environments:
                return f"no environment {record.environment_id} comes before it"
        return None

    def _text(self, data: bytes, place: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptError(f"{self._name}: {place}: not UTF-8 at byte {error.start}") from error

    def _at(self, where: str) -> str:
        return f"{self._name}: data/results.jsonl: {where}"
