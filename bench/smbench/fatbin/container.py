"""The bytes of a CUDA fatbin container: a header, then entries, each a header and one image for one target.

Owns the structure and its checks. Does not own which entries a device loads, nor files.

The structure is not published by NVIDIA. It is read here as `cuobjdump` and public descriptions agree on it, and as it
was found in every container of the wheels in docker/wheel_targets.toml:

    container  u32 magic ba55ed50, u16 version 1, u16 header bytes 16, u64 bytes of all entries
    entry      u16 kind, u16 version 0x101, u32 header bytes, u64 payload bytes, u32 compressed bytes,
               u32 options offset, u16 minor, u16 major, u32 compute capability, u32 name offset, u32 name bytes,
               u64 flags, u64, u64 bytes when decompressed; then options and name up to the header's size; then the
               payload

Whatever does not fit exactly is an OddContainer, never a guess.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<4sHHQ")
ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
VERSION = 1
ENTRY_VERSION = 0x101
ALIGNMENT = 8

PTX = 1
SASS = 2
KINDS = {PTX: "compute", SASS: "sm"}
"""Kinds of entries whose loading is known, and how nvcc begins their targets' names."""

ONLY_THIS = 0x100000
"""Flag of a target with the suffix `a`: runs on exactly its compute capability."""
THIS_FAMILY = 0x200000
"""Flag of a target with the suffix `f`: runs on its compute capability and later ones of the same family."""
COMPRESSED = 0x2000 | 0x8000
"""Flags of an LZ4 and of a Zstandard payload."""


class OddContainer(Exception):
    """Bytes that are no container as this module knows them; the message says where and what."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a container."""

    offset: int
    """Of its header, in the buffer that was read."""
    header_bytes: int
    payload_bytes: int
    kind: int
    capability: int
    """10 * major + minor, such as 90."""
    flags: int

    @property
    def size(self) -> int:
        """Bytes of header and payload."""
        return self.header_bytes + self.payload_bytes

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def target(self) -> str:
        """As nvcc names it: `sm_90`, `sm_90a`, `compute_80`; `kind8_80` for a kind whose loading is not known."""
        family = KINDS.get(self.kind, f"kind{self.kind}")
        suffix = "a" if self.flags & ONLY_THIS else "f" if self.flags & THIS_FAMILY else ""
        return f"{family}_{self.capability}{suffix}"


@dataclass(frozen=True, slots=True)
class Container:
    """A container and its entries. Offsets are those of the buffer that was read."""

    offset: int
    end: int
    """Of the last entry; a stripped container is followed by zeros up to where it ended before."""
    entries: tuple[Entry, ...]


def containers(buffer: Buffer, start: int, end: int) -> Iterator[Container]:
    """The containers between two offsets, in order, with nothing but zeros between them. OddContainer otherwise."""
    position = start
    while (position := _skip_zeros(buffer, position, end)) < end:
        if (position - start) % ALIGNMENT:
            raise OddContainer(f"bytes at {position:#x} are neither a container nor padding")
        container = parse(buffer, position, end)
        yield container
        position = container.end


def parse(buffer: Buffer, offset: int, limit: int) -> Container:
    """The container at an offset, which must end by `limit`. OddContainer where anything does not fit."""
    if limit - offset < HEADER.size:
        raise OddContainer(f"container at {offset:#x}: cut off in its header")
    magic, version, header_bytes, body_bytes = HEADER.unpack_from(buffer, offset)
    if magic != MAGIC:
        raise OddContainer(f"container at {offset:#x}: begins with {bytes(magic).hex()}, not {MAGIC.hex()}")
    if (version, header_bytes) != (VERSION, HEADER.size):
        raise OddContainer(f"container at {offset:#x}: version {version} with a header of {header_bytes} bytes")
    end = offset + HEADER.size + body_bytes
    if end > limit or body_bytes % ALIGNMENT:
        raise OddContainer(f"container at {offset:#x}: {body_bytes} bytes do not fit before {limit:#x}")
    entries: list[Entry] = []
    position = offset + HEADER.size
    while position < end:
        entries.append(_entry(buffer, position, end))
        position = entries[-1].end
    return Container(offset, end, tuple(entries))


def _entry(buffer: Buffer, offset: int, limit: int) -> Entry:
    if limit - offset < ENTRY.size:
        raise OddContainer(f"entry at {offset:#x}: cut off in its header")
    (kind, version, header_bytes, payload_bytes, packed_bytes, _, _, _, capability, _, _, flags, _, _) = (
        ENTRY.unpack_from(buffer, offset)
    )
    entry = Entry(offset, header_bytes, payload_bytes, kind, capability, flags)
    if version != ENTRY_VERSION:
        raise OddContainer(f"entry at {offset:#x}: version {version:#x}")
    if header_bytes < ENTRY.size or header_bytes % ALIGNMENT or payload_bytes % ALIGNMENT or entry.end > limit:
        raise OddContainer(f"entry at {offset:#x}: {header_bytes} + {payload_bytes} bytes do not fit")
    if bool(packed_bytes) != bool(flags & COMPRESSED) or packed_bytes > payload_bytes:
        raise OddContainer(f"entry at {offset:#x}: flags {flags:#x} with {packed_bytes} compressed bytes")
    if not 10 <= capability <= 999:
        raise OddContainer(f"entry at {offset:#x}: compute capability {capability}")
    return entry


def _skip_zeros(buffer: Buffer, position: int, end: int) -> int:
    """The first offset whose byte is not zero, or `end`."""
    step = 1 << 16
    zeros = bytes(step)
    while position < end:
        piece = bytes(buffer[position : min(position + step, end)])
        if piece != zeros[: len(piece)]:
            return position + len(piece) - len(piece.lstrip(b"\0"))
        position += len(piece)
    return end
