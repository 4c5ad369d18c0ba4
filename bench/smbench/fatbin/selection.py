"""Which images of a container a device of one compute capability can load, and what stands for a container without any.

Owns the rules. Does not own bytes in files.

The rules are those of the CUDA C++ Programming Guide ("Binary Compatibility", "PTX Compatibility", "Compute
Capabilities") and of the NVIDIA Ampere and Hopper compatibility guides: a binary runs on its own compute capability and
on higher minor ones of the same major (not between desktop parts and Tegra); where a binary fits, PTX is not compiled;
PTX is compiled for any later capability; a target with suffix `a` fits its own capability alone, with `f` those of its
major from its minor on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from smbench.fatbin.container import (
    COMPRESSED,
    ENTRY,
    ENTRY_VERSION,
    HEADER,
    KINDS,
    ONLY_THIS,
    PTX,
    SASS,
    THIS_FAMILY,
    Buffer,
    Container,
    Entry,
)

TEGRA = frozenset({53, 62, 72, 87, 88, 101, 110})
"""Capabilities of integrated parts, whose binaries other parts do not take."""

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")


def _image_without_code(capability: int) -> bytes:
    """An ELF64 file for EM_CUDA whose only section is the table of section names, and in it a note of who wrote it."""
    names = b"\0.shstrtab\0code removed by smbench.fatbin\0".ljust(48, b"\0")
    identity = b"\x7fELF\x02\x01\x01\x33\x07".ljust(16, b"\0")
    at = _ELF_HEADER.size
    # where cubins of this version of the format name their capability
    flags = capability << 16 | 0x500 | capability
    header = _ELF_HEADER.pack(identity, 2, 190, 128, 0, 0, at + len(names), flags, at, 0, 0, _SECTION_HEADER.size, 2, 1)
    return header + names + bytes(_SECTION_HEADER.size) + _SECTION_HEADER.pack(1, 3, 0, 0, at, len(names), 0, 0, 1, 0)


PLACEHOLDER_BYTES = ENTRY.size + len(_image_without_code(0))
"""Size of a placeholder."""


def loadable(entries: Sequence[Entry], capability: int) -> tuple[Entry, ...]:
    """The entries that a device of this capability (such as 86) can load, in their order; empty where none fits.

    All images of the best capability are kept, since a container may hold several, as for `sm_90` and `sm_90a`. PTX
    beside a binary is kept only where it is for a later capability than the binary: no document says outright which of
    these two wins. Entries of a kind whose loading is not known make every entry count as loadable.
    """
    if any(entry.kind not in KINDS for entry in entries):
        return tuple(entries)
    binaries = [entry for entry in entries if entry.kind == SASS and _binary_fits(entry, capability)]
    best_binary = max((entry.capability for entry in binaries), default=0)
    ptx = [entry for entry in entries if entry.kind == PTX and _ptx_fits(entry, capability)]
    best_ptx = max((entry.capability for entry in ptx if entry.capability > best_binary), default=0)
    return tuple(
        entry
        for entry in entries
        if (entry in binaries and entry.capability == best_binary) or (entry in ptx and entry.capability == best_ptx)
    )


def _binary_fits(entry: Entry, capability: int) -> bool:
    if entry.flags & ONLY_THIS or entry.capability in TEGRA or capability in TEGRA:
        return entry.capability == capability
    return entry.capability // 10 == capability // 10 and entry.capability <= capability


def _ptx_fits(entry: Entry, capability: int) -> bool:
    if entry.flags & ONLY_THIS:
        return entry.capability == capability
    if entry.flags & THIS_FAMILY:
        return entry.capability // 10 == capability // 10 and entry.capability <= capability
    return entry.capability <= capability


def reduced(buffer: Buffer, container: Container, capability: int) -> bytes:
    """What is to stand after a container's header so that it holds only what a device of this capability loads.

    A container that is reduced already gives its own bytes. So does one whose images, though for other devices, are
    smaller than a placeholder.
    """
    body = bytes(buffer[container.offset + HEADER.size : container.end])
    if not container.entries or any(is_placeholder(buffer, entry) for entry in container.entries):
        return body
    keep = loadable(container.entries, capability)
    if keep:
        return b"".join(bytes(buffer[entry.offset : entry.end]) for entry in keep)
    # of equals the first: what is there stays
    return min(body, placeholder(buffer, container.entries), key=len)


def placeholder(buffer: Buffer, entries: Sequence[Entry]) -> bytes:
    """An entry of a target that was in the container and that this device cannot load, with an image without code.

    A container that holds nothing for a device is legal: a use of its kernels fails with "no kernel image is
    available". One entry for the wrong target keeps it so; an empty container might be taken for a damaged one.
    """
    model = min(entries, key=lambda entry: entry.size)
    _, _, _, _, _, _, minor, major, capability, _, _, flags, extra, _ = ENTRY.unpack_from(buffer, model.offset)
    if model.kind == PTX:
        # the version fields of PTX are those of its language; a binary's are those of its format
        minor, major = 8, 1
    return ENTRY.pack(
        SASS,
        ENTRY_VERSION,
        ENTRY.size,
        PLACEHOLDER_BYTES - ENTRY.size,
        0,
        0,
        minor,
        major,
        capability,
        0,
        0,
        flags & ~COMPRESSED,
        extra,
        0,
    ) + _image_without_code(capability)


def is_placeholder(buffer: Buffer, entry: Entry) -> bool:
    """Whether an entry is what `placeholder` makes."""
    payload = bytes(buffer[entry.offset + entry.header_bytes : entry.end])
    return entry.kind == SASS and payload == _image_without_code(entry.capability)
