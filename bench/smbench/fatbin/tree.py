"""Strips, lists and verifies whole folders.

Owns the search for files, what is recorded of each, and the manifest's format. Does not own how a file is rewritten.

The manifest is JSON: `format`, `capability`, `files` (one record for each stripped file) and `left` (files with device
code that stayed as they were, each with the reason). Paths are those given, so that an image's manifest names the
paths in the image. Stripping again keeps the records of files that are as it left them.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smbench.errors import CorruptError, UsageError
from smbench.fatbin.container import OddContainer
from smbench.fatbin.sharedobject import IDENTITY, LEFT_SECTIONS, elsewhere, left_alone, rewritable
from smbench.fatbin.strip import read, strip_file, surplus, targets

FORMAT = 1
"""Version of the manifest's format."""


@dataclass(frozen=True, slots=True)
class Held:
    """The device code of one file."""

    path: Path
    size: int
    containers: int
    images: dict[str, int]
    """Number by target."""
    image_bytes: dict[str, int]
    """Bytes by target."""
    placeholders: int
    elsewhere_bytes: dict[str, int]
    """Bytes of containers by section, in sections that are never rewritten."""
    left: str | None
    """Why the file is never rewritten, None where it may be."""


@dataclass(slots=True)
class Outcome:
    """What stripping folders did."""

    files: list[dict[str, Any]] = field(default_factory=list)
    left: list[dict[str, str]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    """Messages of files that are not as they have to be; these files are as they were."""

    @property
    def freed_bytes(self) -> int:
        return sum(record["freed_bytes"] for record in self.files)


def objects(roots: Iterable[Path]) -> Iterator[Path]:
    """ELF files below folders, or given themselves, in order of their path; links are not followed.

    UsageError for a root that is not there.
    """
    for root in roots:
        if not root.exists():
            raise UsageError(f"{root}: no such file or folder")
        for path in [root] if root.is_file() else sorted(_walk(root)):
            with path.open("rb") as file:
                if file.read(len(IDENTITY)) == IDENTITY:
                    yield path


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def held(path: Path) -> Held | None:
    """The device code of a file, None where it has none. CorruptError where it cannot be read."""
    try:
        with read(path) as buffer:
            found = rewritable(buffer)
            other = elsewhere(buffer)
            if not found and not other:
                return None
            images, sizes, placeholders = targets(buffer, found)
            return Held(
                path=path,
                size=len(buffer),
                containers=len(found),
                images=dict(sorted(images.items())),
                image_bytes=dict(sorted(sizes.items())),
                placeholders=placeholders,
                elsewhere_bytes=other,
                left=left_alone(path.name),
            )
    except OddContainer as error:
        raise CorruptError(f"{path}: {error}") from error


def strip_tree(roots: Sequence[Path], capability: int, leave: Sequence[str], before: dict[str, Any] | None) -> Outcome:
    """Strip every shared object below the roots, except those whose names match a pattern of `leave`.

    `before` is the manifest of an earlier run. Several names of one file (hard links) stay names of one file.
    """
    outcome = Outcome()
    wheels = _Wheels(roots)
    known = {record["path"]: record for record in (before or {}).get("files", [])}
    links: dict[tuple[int, int], Path] = {}
    records: dict[Path, dict[str, Any]] = {}
    for path in objects(roots):
        status = path.stat()
        first = links.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            _follow(path, first, records, outcome)
            continue
        reason = left_alone(path.name) or ("asked for" if any(path.match(pattern) for pattern in leave) else None)
        if reason is not None:
            _note_left(path, reason, outcome)
            continue
        try:
            done = strip_file(path, capability)
        except OddContainer as error:
            outcome.odd.append(f"{path}: {error}")
            continue
        if done is None:
            continue
        records[path] = {
            "path": str(path),
            **asdict(done),
            **wheels.origin(path, done.unstripped_sha256),
        }
        outcome.files.append(records[path])
    new = {record["path"] for record in outcome.files}
    outcome.files += [record for path, record in known.items() if path not in new and _unchanged(record)]
    return outcome


def _unchanged(record: dict[str, Any]) -> bool:
    path = Path(record["path"])
    return path.is_file() and _sha256(path) == record["stripped_sha256"]


def _follow(path: Path, first: Path, records: dict[Path, dict[str, Any]], outcome: Outcome) -> None:
    """Make a further name of a file lead to what its first name was stripped to."""
    if first not in records:
        return
    spare = path.with_name(f".{path.name}.strip")
    os.link(first, spare)
    spare.replace(path)
    # the bytes were freed once
    outcome.files.append({**records[first], "path": str(path), "freed_bytes": 0})


def _note_left(path: Path, reason: str, outcome: Outcome) -> None:
    try:
        with read(path) as buffer:
            if rewritable(buffer):
                outcome.left.append({"path": str(path), "reason": reason})
    except OddContainer:
        # it is left as it is, whatever it holds
        outcome.left.append({"path": str(path), "reason": reason})


def check_tree(roots: Sequence[Path], capability: int, manifest: dict[str, Any] | None) -> list[str]:
    """What is wrong with stripped folders, one line each; nothing where all is as it has to be.

    Without a manifest only the images are judged. With one, its files must be there with the recorded hash, and files
    that it records as left may hold anything.
    """
    wrong: list[str] = []
    left = {record["path"] for record in (manifest or {}).get("left", [])}
    for record in (manifest or {}).get("files", []):
        path = Path(record["path"])
        if not path.is_file():
            wrong.append(f"{path}: the manifest names it, but it is not there")
        elif not _unchanged(record):
            wrong.append(f"{path}: its sha256 is not the one in the manifest")
    for path in objects(roots):
        if str(path) in left or left_alone(path.name) is not None:
            continue
        try:
            with read(path) as buffer:
                extra = surplus(buffer, rewritable(buffer), capability)
        except OddContainer as error:
            wrong.append(f"{path}: {error}")
            continue
        if extra:
            images = ", ".join(f"{count} × {target}" for target, count in sorted(extra.items()))
            wrong.append(f"{path}: holds images that sm_{capability} does not load: {images}")
    return wrong


def manifest(outcome: Outcome, capability: int) -> dict[str, Any]:
    """The manifest of an outcome."""
    return {
        "format": FORMAT,
        "capability": capability,
        "freed_bytes": outcome.freed_bytes,
        "files": sorted(outcome.files, key=lambda record: record["path"]),
        "left": sorted(outcome.left, key=lambda record: record["path"]),
        "sections_left": LEFT_SECTIONS,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest. UsageError where there is none, CorruptError where it is not one of this format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such manifest; `strip --manifest {path}` writes it") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptError(f"{path}: not a manifest: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CorruptError(f"{path}: not a manifest of format {FORMAT}")
    return data


class _Wheels:
    """Which installed wheel a file came with, by the RECORD files below the roots."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._files: dict[Path, tuple[str, str]] = {}
        for root in roots:
            for record in sorted(root.glob("**/*.dist-info/RECORD")) if root.is_dir() else ():
                package = record.parent.name.removesuffix(".dist-info")
                with record.open(encoding="utf-8", newline="") as file:
                    for name, digest, *_ in csv.reader(file):
                        if digest.startswith("sha256="):
                            # PEP 376: urlsafe base64 without padding
                            raw = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "==")
                            self._files[Path(os.path.normpath(record.parent.parent / name))] = (package, raw.hex())

    def origin(self, path: Path, unstripped_sha256: str) -> dict[str, Any]:
        """The wheel, and whether the file was as the wheel had it; both None for a file of no wheel."""
        package, digest = self._files.get(Path(os.path.normpath(path)), (None, None))
        return {"package": package, "as_published": None if digest is None else digest == unstripped_sha256}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
