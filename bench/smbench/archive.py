"""The bytes of a bundle file: a gzip-compressed tar in one canonical form. Owns what is written and what is accepted.

The reader takes what the writer writes and nothing else. Whatever tar and gzip allow beyond that (links, devices, pax
records, sparse files, absolute names, two members of one name) is refused, not interpreted; nothing is ever written to
a disk, and no more than a chunk is in memory. Does not know what the files mean.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Self

from smbench.errors import CorruptError

BLOCK = 512
ZEROS = bytes(BLOCK)
CHUNK = 1 << 18
TIME = 315532800
"""1980-01-01, the time of every member: tar takes the epoch itself for a mistake."""
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
"""Deflate, no name, no time, system unknown."""
LEVEL = 6
LONGEST_NAME = 240
"""What the two name fields of a header hold in any split."""
MOST_MEMBERS = 20_000
MOST_BYTES = 4 << 30
"""Of all members together. Reading is streaming, so this bounds time, not memory."""
BOMB_FROM_BYTES = 64 << 20
BOMB_RATIO = 120
"""A stream that expands further than this is no measurement; what runs leave compresses 3 to 40 times."""

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,-]*(?<!\.)")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_KINDS: Mapping[bytes, str] = {
    b"\x00": "a file of the old tar format",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a fifo",
    b"7": "a contiguous file",
    b"g": "a global pax record",
    b"x": "a pax record",
    b"K": "a GNU long link name",
    b"L": "a GNU long name",
    b"S": "a sparse file",
}
_FIELDS = {
    "name": (0, 100),
    "mode": (100, 108),
    "owner": (108, 116),
    "group": (116, 124),
    "size": (124, 136),
    "time": (136, 148),
    "checksum": (148, 156),
    "link name": (157, 257),
    "magic": (257, 265),
    "owner name": (265, 297),
    "group name": (297, 329),
    "device": (329, 345),
    "prefix": (345, 500),
    "padding": (500, 512),
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive."""

    name: str
    size_bytes: int


def unsafe(name: str) -> str | None:
    """Why a member may not be called so, None where it may: the names are safe to create on every system."""
    if len(name) > LONGEST_NAME:
        return f"longer than {LONGEST_NAME} characters"
    if name.startswith(("/", "\\")):
        return "absolute"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "leaving or repeating a folder"
        if not _COMPONENT.fullmatch(part):
            return "holding a character other than ASCII letters, digits and _ . + = , - or a dot at an end"
        if _RESERVED.fullmatch(part):
            return "reserved on some systems"
    return None


class Writer:
    """Writes members in the order in which they are given. The caller opens the file and sorts the names."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._crc = 0
        self._size = 0

    def __enter__(self) -> Self:
        self._file.write(GZIP_HEADER)
        return self

    def add(self, name: str, size_bytes: int, chunks: Iterable[bytes]) -> None:
        """Write one member. ValueError for an unsafe name or a content that is not as long as it was said to be."""
        if why := unsafe(name):
            raise ValueError(f"member name {name!r}: {why}")
        self._write(_header(name, size_bytes))
        written = 0
        for chunk in chunks:
            self._write(chunk)
            written += len(chunk)
        if written != size_bytes:
            raise ValueError(f"member {name}: {written} bytes came, {size_bytes} were announced")
        self._write(bytes(-size_bytes % BLOCK))

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            self._write(bytes(2 * BLOCK))
            self._file.write(self._deflate.flush())
            self._file.write(self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little"))

    def _write(self, data: bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._file.write(self._deflate.compress(data))


class Reader:
    """Iterates the members of a file in their order. CorruptError names the member and what is wrong with it.

    A member's content is read with `chunks` before the next member is asked for; what is left of it is skipped.
    """

    def __init__(self, name: str, file: IO[bytes]) -> None:
        """`name` is what errors call the file."""
        self._name = name
        self._file = file
        self._where = "the first member"
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._packed = b""
        self._ready = bytearray()
        self.packed_bytes = 0
        self.unpacked_bytes = 0
        self._left = 0

    def __iter__(self) -> Iterator[Member]:
        self._check_gzip_header()
        names: dict[str, str] = {}
        while True:
            block = self._take(BLOCK)
            if block == ZEROS:
                break
            member = self._member(block, len(names))
            self._where = member.name
            folded = member.name.casefold()
            if folded in names:
                other = names[folded]
                raise self.corrupt("it is there twice" if other == member.name else f"it differs from {other} in case")
            names[folded] = member.name
            self._left = member.size_bytes
            yield member
            for _ in self.chunks():
                pass
            if self._take(-member.size_bytes % BLOCK).strip(b"\0"):
                raise self.corrupt("its padding is not zero")
        self._where = "the end of the archive"
        self._check_end()

    def chunks(self) -> Iterator[bytes]:
        """The rest of the current member's content."""
        while self._left:
            data = self._take(min(self._left, CHUNK))
            self._left -= len(data)
            yield data

    def read(self, most_bytes: int) -> bytes:
        """The rest of the current member as a whole. CorruptError where it is longer than `most_bytes`."""
        if self._left > most_bytes:
            raise self.corrupt(f"{self._left} bytes, more than the {most_bytes} that it may have")
        return b"".join(self.chunks())

    def corrupt(self, what: str) -> CorruptError:
        """The error for the current member."""
        return CorruptError(f"{self._name}: {self._where}: {what}")

    def _check_gzip_header(self) -> None:
        self._packed = self._file.read(CHUNK)
        self.packed_bytes = len(self._packed)
        if not self._packed.startswith(GZIP_HEADER):
            what = "not in the form that smbench writes" if self._packed.startswith(b"\x1f\x8b") else "not gzip"
            raise CorruptError(f"{self._name}: no bundle: its first bytes are {what}")

    def _member(self, block: bytes, count: int) -> Member:
        raw = block[0:100].rstrip(b"\0")
        prefix = block[345:500].rstrip(b"\0")
        whole = prefix + b"/" + raw if prefix else raw
        self._where = f"member {ascii(whole.decode('utf-8', 'replace'))[1:-1][:LONGEST_NAME]!r}"
        kind = block[156:157]
        if kind != b"0":
            raise self.corrupt(f"it is {_KINDS.get(kind, f'of unknown kind {kind!r}')}; a bundle holds files only")
        if not whole.isascii():
            raise self.corrupt("its name is not ASCII")
        name = whole.decode("ascii")
        if why := unsafe(name):
            raise self.corrupt(f"its name is {why}")
        digits = block[124:135]
        if not re.fullmatch(rb"[0-7]{11}", digits):
            raise self.corrupt("its size is no octal number")
        size_bytes = int(digits, 8)
        expected = _header(name, size_bytes)
        if block != expected:
            wrong = [field for field, (start, end) in _FIELDS.items() if block[start:end] != expected[start:end]]
            raise self.corrupt(f"its header is not in the form that smbench writes ({', '.join(wrong)})")
        if count >= MOST_MEMBERS:
            raise self.corrupt(f"more than {MOST_MEMBERS} members")
        if self.unpacked_bytes + size_bytes > MOST_BYTES:
            raise self.corrupt(f"more than {MOST_BYTES >> 30} GiB of content")
        return Member(name, size_bytes)

    def _check_end(self) -> None:
        if self._take(BLOCK) != ZEROS:
            raise self.corrupt("something follows it")
        if self._ready or self._more() or not self._inflate.eof:
            raise self.corrupt("something follows it")
        if self._inflate.unused_data or self._packed or self._file.read(1):
            raise self.corrupt("something follows the compressed data")

    def _take(self, count: int) -> bytes:
        """Exactly so many bytes of the tar."""
        while len(self._ready) < count:
            if not self._more():
                raise self.corrupt("the file ends here: it is cut short")
        data = bytes(self._ready[:count])
        del self._ready[:count]
        return data

    def _more(self) -> bool:
        """Inflate a little further; False at the end of the compressed data."""
        while not self._inflate.eof:
            if not self._packed:
                self._packed = self._file.read(CHUNK)
                self.packed_bytes += len(self._packed)
                if not self._packed:
                    return False
            try:
                data = self._inflate.decompress(self._packed, CHUNK)
            except zlib.error as error:
                raise self.corrupt(f"the compressed data is damaged in or before it ({error})") from error
            self._packed = self._inflate.unconsumed_tail
            self.unpacked_bytes += len(data)
            if self.unpacked_bytes > max(BOMB_FROM_BYTES, BOMB_RATIO * self.packed_bytes):
                raise self.corrupt(f"it expands more than {BOMB_RATIO} times: a decompression bomb")
            if data:
                self._ready += data
                return True
        return False


def _header(name: str, size_bytes: int) -> bytes:
    """The ustar header of a file of mode 0644 that belongs to nobody. ValueError for a name that no split holds."""
    prefix, tail = _split(name)
    block = b"".join(
        (
            tail.encode("ascii").ljust(100, b"\0"),
            b"0000644\0",
            b"0000000\0",
            b"0000000\0",
            b"%011o\0" % size_bytes,
            b"%011o\0" % TIME,
            b" " * 8,
            b"0",
            bytes(100),
            b"ustar\00000",
            bytes(64),
            b"0000000\0" * 2,
            prefix.encode("ascii").ljust(155, b"\0"),
            bytes(12),
        )
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _split(name: str) -> tuple[str, str]:
    """The name in its two fields: the prefix is empty, or ends at the first slash that leaves a name short enough."""
    if len(name) <= 100:
        return "", name
    cuts = [i for i, char in enumerate(name) if char == "/" and len(name) - i - 1 <= 100 and i <= 155]
    if not cuts:
        raise ValueError(f"member name {name!r} has no slash where a header could split it")
    return name[: cuts[0]], name[cuts[0] + 1 :]
