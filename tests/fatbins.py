"""Shared objects with device code, made by bytes: small, and of the structure that compilers write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

PTX, SASS, LTO = 1, 2, 8
PLAIN, ONLY_THIS, FAMILY = 0x11, 0x100011, 0x200011
ZSTD = 0x8000


@dataclass(frozen=True)
class Image:
    """One entry of a container."""

    kind: int
    capability: int
    flags: int = PLAIN
    payload: bytes = b"code" * 200
    options: bytes = b""

    def pack(self) -> bytes:
        payload = self.payload.ljust(-(-len(self.payload) // 8) * 8, b"\0")
        packed = len(self.payload) if self.flags & ZSTD else 0
        header = struct.pack(
            "<HHIQIIHHIIIQQQ",
            self.kind,
            0x101,
            64 + len(self.options),
            len(payload),
            packed,
            64 if self.options else 0,
            8,
            1,
            self.capability,
            0,
            0,
            self.flags,
            0,
            4 * packed,
        )
        return header + self.options + payload


def container(images: Sequence[Image], padding: int = 0) -> bytes:
    body = b"".join(image.pack() for image in images)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + bytes(padding)


@dataclass
class SharedObject:
    """An ELF64 file with the given sections, and wrappers for the containers of `.nv_fatbin`."""

    containers: Sequence[bytes]
    others: dict[str, bytes] = field(default_factory=dict)
    wrapper_shift: int = 0
    """Added to what the wrappers point at, so that they point at no container."""

    ADDRESS = 0x10000

    def pack(self) -> bytes:
        fatbin = b"".join(self.containers)
        pointers, position = [], self.ADDRESS
        for item in self.containers:
            pointers.append(position + self.wrapper_shift)
            position += len(item)
        wrappers = b"".join(struct.pack("<IIQQ", 0x466243B1, 1, pointer, 0) for pointer in pointers)
        sections = {".text": b"\x90\xc3" * 32, ".nv_fatbin": fatbin, ".nvFatBinSegment": wrappers, **self.others}
        names = b"\0" + b"".join(name.encode() + b"\0" for name in (*sections, ".shstrtab"))
        data, headers = bytearray(64), [bytes(64)]
        for name, content in (*sections.items(), (".shstrtab", names)):
            data += bytes(-len(data) % 16)
            address = self.ADDRESS if name == ".nv_fatbin" else 0
            at = names.index(name.encode() + b"\0")
            headers.append(struct.pack("<IIQQQQIIQQ", at, 1, 2, address, len(data), len(content), 0, 0, 16, 0))
            data += content
        data += bytes(-len(data) % 8)
        data[:64] = struct.pack(
            "<16sHHIQQQIHHHHHH",
            b"\x7fELF\x02\x01\x01".ljust(16, b"\0"),
            3,
            62,
            1,
            0,
            0,
            len(data),
            0,
            64,
            56,
            0,
            64,
            len(headers),
            len(headers) - 1,
        )
        return bytes(data) + b"".join(headers)
