"""Rewrites a shared object so that it holds only the device code that one compute capability loads.

Owns the rewriting of a file and its proof. Does not own the rules of what is loaded (`selection`) or the search for
files (`tree`).

The file keeps its size and every address in it: kept images move to the front of their container, the rest of the
container becomes zeros. They pack to nothing in an image's layer, and are a hole of the file where the file system
keeps holes. Nothing outside containers changes. The new file is read again and compared before it replaces the old one
in one step.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smbench.fatbin.container import HEADER, MAGIC, VERSION, Buffer, Container, OddContainer
from smbench.fatbin.selection import is_placeholder, loadable, reduced
from smbench.fatbin.sharedobject import rewritable

PIECE_BYTES = 1 << 20
"""Bytes that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Stripped:
    """What stripping one file did."""

    size: int
    """Bytes of the file, before and after."""
    unstripped_sha256: str
    stripped_sha256: str
    freed_bytes: int
    """Bytes of device code that became zeros."""
    containers: int
    placeholders: int
    """Containers of which a device of this capability can load nothing; each now holds an image without code."""
    kept: dict[str, int]
    """Images left, by target."""
    removed: dict[str, int]
    """Images gone, by target."""


@dataclass(frozen=True, slots=True)
class _Plan:
    container: Container
    body: bytes
    """What stands after the container's header from now on."""

    @property
    def start(self) -> int:
        return self.container.offset

    @property
    def end(self) -> int:
        return self.container.end

    @property
    def body_end(self) -> int:
        return self.start + HEADER.size + len(self.body)


@contextmanager
def read(path: Path) -> Iterator[memoryview]:
    """The bytes of a file that is not empty."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as buffer,
    ):
        yield buffer


def targets(buffer: Buffer, found: list[Container]) -> tuple[Counter[str], Counter[str], int]:
    """Images and bytes of images by target, without placeholders, and the number of placeholders."""
    images: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    placeholders = 0
    for container in found:
        for entry in container.entries:
            if is_placeholder(buffer, entry):
                placeholders += 1
            else:
                images[entry.target] += 1
                sizes[entry.target] += entry.size
    return images, sizes, placeholders


def surplus(buffer: Buffer, found: list[Container], capability: int) -> Counter[str]:
    """Images by target that stripping for this capability would remove."""
    extra: Counter[str] = Counter()
    for container in found:
        if len(reduced(buffer, container, capability)) != container.end - container.offset - HEADER.size:
            keep = loadable(container.entries, capability)
            extra.update(entry.target for entry in container.entries if entry not in keep)
    return extra


def strip_file(path: Path, capability: int) -> Stripped | None:
    """Strip one shared object in place. None where there is nothing to do; the file is then as it was.

    OddContainer where the file is not exactly as it has to be; it is then as it was, too. Mode, owner and time of
    modification stay; of several names of one file (hard links) only this one leads to the new file.
    """
    with read(path) as old:
        found = rewritable(old)
        plans = [_Plan(container, reduced(old, container, capability)) for container in found]
        if all(plan.body_end == plan.end for plan in plans):
            return None
        before, _, _ = targets(old, found)
        new_path = _write(path, old, plans)
        try:
            after, placeholders, digest = _check(new_path, old, plans)
            new_path.replace(path)
        finally:
            new_path.unlink(missing_ok=True)
        return Stripped(
            size=len(old),
            unstripped_sha256=hashlib.sha256(old).hexdigest(),
            stripped_sha256=digest,
            freed_bytes=sum(plan.end - plan.body_end for plan in plans),
            containers=len(found),
            placeholders=placeholders,
            kept=dict(sorted(after.items())),
            removed=dict(sorted((before - after).items())),
        )


def _pieces(old: memoryview, plans: list[_Plan]) -> Iterator[tuple[int, bytes | memoryview]]:
    """The new file as offsets and bytes; what is not named is zeros."""
    position = 0
    for plan in plans:
        yield position, old[position : plan.start]
        yield plan.start, HEADER.pack(MAGIC, VERSION, HEADER.size, len(plan.body)) + plan.body
        position = plan.end
    yield position, old[position:]


def _write(path: Path, old: memoryview, plans: list[_Plan]) -> Path:
    """The new file beside the old one, with its mode, owner and times."""
    status = path.stat()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".strip", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as target:
            # what is sought over is a hole where the file system knows holes, and zeros everywhere
            target.truncate(len(old))
            for offset, piece in _pieces(old, plans):
                target.seek(offset)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        os.chown(name, status.st_uid, status.st_gid)
        Path(name).chmod(status.st_mode & 0o7777)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _check(path: Path, old: memoryview, plans: list[_Plan]) -> tuple[Counter[str], int, str]:
    """Images by target, placeholders and sha256 of the new file. OddContainer where it is not what was planned."""
    with read(path) as new:
        if len(new) != len(old):
            raise OddContainer(f"the rewritten file has {len(new)} bytes, not {len(old)}")
        position = 0
        for plan in plans:
            if not _equal(new, old, position, plan.start):
                raise OddContainer("the rewritten file differs outside its containers")
            if not _zeros(new, plan.body_end, plan.end):
                raise OddContainer(f"the rewritten container at {plan.start:#x} is not followed by zeros")
            position = plan.end
        if not _equal(new, old, position, len(old)):
            raise OddContainer("the rewritten file differs outside its containers")
        found = rewritable(new)
        if [(container.offset, container.end) for container in found] != [
            (plan.start, plan.body_end) for plan in plans
        ]:
            raise OddContainer("the rewritten file does not hold the containers of the old one")
        for plan in plans:
            if bytes(new[plan.start + HEADER.size : plan.body_end]) != plan.body:
                raise OddContainer(f"the rewritten container at {plan.start:#x} is not what was planned")
        images, _, placeholders = targets(new, found)
        return images, placeholders, hashlib.sha256(new).hexdigest()


def _equal(first: memoryview, second: memoryview, start: int, end: int) -> bool:
    return all(
        bytes(first[begin : min(begin + PIECE_BYTES, end)]) == bytes(second[begin : min(begin + PIECE_BYTES, end)])
        for begin in range(start, end, PIECE_BYTES)
    )


def _zeros(buffer: memoryview, start: int, end: int) -> bool:
    return not any(
        bytes(buffer[begin : min(begin + PIECE_BYTES, end)]).strip(b"\0") for begin in range(start, end, PIECE_BYTES)
    )
