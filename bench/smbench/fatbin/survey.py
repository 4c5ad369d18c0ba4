"""What device code wheels carry, what a device of each compute capability executes of it, and what stripping saves.

Owns the reading of wheels and the format of docker/wheel_targets.toml. Does not own the rules of what is loaded.

`layer_bytes` estimates what files take in a gzip-compressed image layer: every image and everything between images is
packed on its own, at the level that docker uses. Packed together they would be smaller by what they have in common.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smbench.errors import CorruptError, UsageError
from smbench.fatbin.container import Buffer, Container, OddContainer
from smbench.fatbin.selection import PLACEHOLDER_BYTES, loadable
from smbench.fatbin.sharedobject import IDENTITY, elsewhere, left_alone, rewritable
from smbench.fatbin.strip import targets

FORMAT = 1
"""Version of the wheel_targets.toml format."""
LEVEL = 6
PIECE_BYTES = 1 << 20
NOTHING = "nothing"
"""Stands for containers of which a device can load no image."""


@dataclass(slots=True)
class File:
    """The device code of one file of a wheel."""

    path: str
    size_bytes: int
    targets: dict[str, int]
    """Bytes of images by target."""
    elsewhere: dict[str, int]
    """Bytes of containers in sections that are never rewritten."""
    executes: dict[int, dict[str, int]]
    """By compute capability: number of containers by the target that is loaded of them."""


@dataclass(slots=True)
class Wheel:
    """A wheel, and its size installed and in a layer: as published, and stripped by compute capability."""

    name: str
    version: str
    sha256: str
    wheel_bytes: int
    installed_bytes: int = 0
    layer_bytes: int = 0
    freed_bytes: Counter[int] = field(default_factory=Counter)
    saved_layer_bytes: Counter[int] = field(default_factory=Counter)
    files: list[File] = field(default_factory=list)


def wheel(path: Path, capabilities: Sequence[int]) -> Wheel:
    """Read a wheel. UsageError where it is none, CorruptError where a file of it is not of the known structure."""
    name, _, rest = path.name.partition("-")
    if path.suffix != ".whl" or not path.is_file():
        raise UsageError(f"{path}: no such wheel")
    with path.open("rb") as file:
        found = Wheel(name, rest.split("-")[0], hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            found.installed_bytes += member.file_size
            with archive.open(member) as content:
                if content.read(len(IDENTITY)) != IDENTITY:
                    # a wheel is packed with the same method as a layer
                    found.layer_bytes += member.compress_size
                    continue
            with tempfile.TemporaryFile() as copy:
                with archive.open(member) as content:
                    while piece := content.read(PIECE_BYTES):
                        copy.write(piece)
                copy.flush()
                with mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as buffer:
                    try:
                        _read(found, member.filename, buffer, capabilities)
                    except OddContainer as error:
                        raise CorruptError(f"{path.name}: {member.filename}: {error}") from error
    return found


def _read(found: Wheel, name: str, buffer: memoryview, capabilities: Sequence[int]) -> None:
    containers = [] if left_alone(Path(name).name) else rewritable(buffer)
    packed = {
        entry.offset: _packed([buffer[entry.offset : entry.end]]) for item in containers for entry in item.entries
    }
    found.layer_bytes += _packed(_between(buffer, containers)) + sum(packed.values())
    other = elsewhere(buffer)
    if not containers and not other:
        return
    executes: dict[int, dict[str, int]] = {}
    for capability in capabilities:
        counts: Counter[str] = Counter()
        for item in containers:
            keep = loadable(item.entries, capability)
            counts[" + ".join(sorted({entry.target for entry in keep})) or NOTHING] += 1
            gone = [entry for entry in item.entries if entry not in keep]
            found.freed_bytes[capability] += sum(entry.size for entry in gone)
            found.saved_layer_bytes[capability] += sum(packed[entry.offset] for entry in gone)
            if not keep:
                found.freed_bytes[capability] -= PLACEHOLDER_BYTES
        executes[capability] = dict(sorted(counts.items()))
    _, sizes, _ = targets(buffer, containers)
    found.files.append(File(name, len(buffer), dict(sorted(sizes.items())), other, executes))


def _between(buffer: memoryview, containers: Sequence[Container]) -> Iterable[Buffer]:
    position = 0
    for container in containers:
        yield buffer[position : container.offset]
        position = container.end
    yield buffer[position:]


def _packed(pieces: Iterable[Buffer]) -> int:
    """Bytes of the pieces, one after the other, packed as in a layer."""
    packer = zlib.compressobj(LEVEL)
    size = 0
    for piece in pieces:
        for begin in range(0, len(piece), PIECE_BYTES):
            size += len(packer.compress(piece[begin : begin + PIECE_BYTES]))
    return size + len(packer.flush())


def render(wheels: Sequence[Wheel], date: str) -> str:
    """The wheels as TOML."""
    lines = [
        "# What device code the locked wheels carry and what a device executes of it; see docker/STRIPPING.md.",
        "# Written by `python -m smbench.fatbin survey`; the wheels are those of PyPI with these hashes.",
        "#",
        "# targets      bytes of images by target; `sm_` is machine code, `compute_` is PTX, compiled at first use",
        "# elsewhere    bytes of containers in sections that are never rewritten",
        "# executes     containers by the target that a device loads of them",
        "",
        f"format = {FORMAT}",
        f'date = "{date}"',
    ]
    for item in wheels:
        lines += [
            "",
            "[[wheel]]",
            f'name = "{item.name}"',
            f'version = "{item.version}"',
            f'sha256 = "{item.sha256}"',
            f"wheel_bytes = {item.wheel_bytes}",
            f"installed_bytes = {item.installed_bytes}",
            f"layer_bytes = {item.layer_bytes}",
            f"freed_bytes = {_inline({f'sm{sm}': size for sm, size in item.freed_bytes.items()})}",
            f"saved_layer_bytes = {_inline({f'sm{sm}': size for sm, size in item.saved_layer_bytes.items()})}",
        ]
        for file in item.files:
            lines += [
                "",
                "[[wheel.file]]",
                f'path = "{file.path}"',
                f"size_bytes = {file.size_bytes}",
                f"targets = {_inline(file.targets)}",
            ]
            if file.elsewhere:
                lines.append(f"elsewhere = {_inline(file.elsewhere)}")
            lines += [f"executes.sm{sm} = {_inline(counts)}" for sm, counts in file.executes.items() if counts]
    return "\n".join(lines) + "\n"


def _inline(table: dict[str, int]) -> str:
    pairs = ", ".join(
        f'"{key}" = {value}' if not key.isidentifier() else f"{key} = {value}" for key, value in table.items()
    )
    return f"{{ {pairs} }}" if pairs else "{}"
