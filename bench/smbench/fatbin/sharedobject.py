"""Where a shared object keeps fatbin containers, and which of these places may be rewritten.

Owns the ELF64 reading that this needs and the table of what is left alone. Does not own containers or files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fnmatch import fnmatchcase

from smbench.fatbin.container import MAGIC, Buffer, Container, OddContainer, containers

IDENTITY = b"\x7fELF\x02\x01"
"""How a 64-bit little-endian ELF file begins."""
SECTION = ".nv_fatbin"
"""Containers of code that the driver loads, each registered by a wrapper in `.nvFatBinSegment`."""
WRAPPERS = ".nvFatBinSegment"

LEFT_SECTIONS = {
    "__nv_relfatbin": "relocatable code, kept for a device linker; the driver loads none of it",
    ".cask_resource": "the library's own index selects among these containers, not the driver",
    ".ldata": "the library itself hands these images, some of them LTO IR, to the linker at run time",
    ".rodata": "the library itself hands these images, some of them LTO IR, to the linker at run time",
}
"""Other sections in which containers were found, and why they stay as they are."""

LEFT_FILES = {
    "libnvrtc*": "a compiler: what it embeds is its library of device functions for every target",
    "libnvJitLink*": "a device linker: what it embeds is input of its own",
    "libnvptxcompiler*": "a compiler",
    "libnvvm*": "a compiler",
    "libcuda.so*": "the driver's own library comes from the host, and must equal it",
    "libnvidia-*": "the driver's own libraries come from the host, and must equal it",
    "*.a": "static libraries are linked, never loaded",
    "*.o": "objects are linked, never loaded",
}
"""File names that are never rewritten, and why."""

_WRAPPER = struct.Struct("<IIQQ")
_WRAPPER_MAGIC = 0x466243B1
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NO_BITS = 8


@dataclass(frozen=True, slots=True)
class Section:
    """A section that has bytes in the file."""

    name: str
    address: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


def left_alone(name: str) -> str | None:
    """Why a file of this name is never rewritten, None where it may be."""
    return next((reason for pattern, reason in LEFT_FILES.items() if fnmatchcase(name, pattern)), None)


def sections(buffer: Buffer) -> list[Section]:
    """Sections of an ELF64 file. OddContainer where its section table does not fit the file."""
    size = len(buffer)
    try:
        (table,) = struct.unpack_from("<Q", buffer, 40)
        entry_bytes, count, names_index = struct.unpack_from("<HHH", buffer, 58)
        if count == 0:
            return []
        if entry_bytes != _SECTION_HEADER.size or table + entry_bytes * count > size or names_index >= count:
            raise OddContainer("its section table does not fit the file")
        headers = [_SECTION_HEADER.unpack_from(buffer, table + entry_bytes * index) for index in range(count)]
    except struct.error as error:
        raise OddContainer("its ELF header is cut off") from error
    names = bytes(buffer[headers[names_index][4] : headers[names_index][4] + headers[names_index][5]])
    found = []
    for name, kind, _, address, offset, length, *_ in headers:
        if kind in (0, _NO_BITS):
            continue
        if offset + length > size:
            raise OddContainer(f"its section at {offset:#x} ends after the file")
        found.append(Section(names[name : names.find(b"\0", name)].decode("ascii", "replace"), address, offset, length))
    return found


def rewritable(buffer: Buffer) -> list[Container]:
    """The containers of `.nv_fatbin`, in order; none where the file has no such section.

    OddContainer where anything in the section is not a container or zeros, or where a wrapper points between them.
    """
    found: list[Container] = []
    table = sections(buffer)
    for section in table:
        if section.name != SECTION:
            continue
        inside = list(containers(buffer, section.offset, section.end))
        starts = {container.offset - section.offset + section.address for container in inside}
        for pointer in _wrapped(buffer, table):
            if section.address <= pointer < section.address + section.size and pointer not in starts:
                raise OddContainer(f"a wrapper points at {pointer:#x}, where no container begins")
        found += inside
    return found


def elsewhere(buffer: Buffer) -> dict[str, int]:
    """Bytes of containers by section, outside `.nv_fatbin`."""
    found: dict[str, int] = {}
    for section in sections(buffer):
        if section.name == SECTION:
            continue
        piece = bytes(buffer[section.offset : section.end])
        position = piece.find(MAGIC)
        while position >= 0:
            version, header_bytes, body_bytes = struct.unpack_from(
                "<HHQ", piece.ljust(position + 16, b"\0"), position + 4
            )
            fits = (version, header_bytes) == (1, 16) and position + 16 + body_bytes <= len(piece)
            if fits:
                found[section.name] = found.get(section.name, 0) + 16 + body_bytes
            position = piece.find(MAGIC, position + (16 + body_bytes if fits else 4))
    return found


def _wrapped(buffer: Buffer, table: list[Section]) -> list[int]:
    """Addresses of containers in the file's wrappers; linkers that leave them to relocations wrote zero here."""
    found = []
    for section in table:
        if section.name == WRAPPERS:
            for offset in range(section.offset, section.end - _WRAPPER.size + 1, _WRAPPER.size):
                magic, _, pointer, _ = _WRAPPER.unpack_from(buffer, offset)
                if magic == _WRAPPER_MAGIC and pointer:
                    found.append(pointer)
    return found
