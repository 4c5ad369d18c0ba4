"""How large images are: on disk, and on the wire, which a renter waits for. Owns the measuring, not the images."""

from __future__ import annotations

import json
import posixpath
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from smbench.errors import UsageError
from smbench.images import daemon

CHUNK_BYTES = 1 << 20
GZIP = 31
"""zlib's number for the gzip format with the largest window, in which registries keep layers."""
LEVEL = 6
"""The compression that docker pushes with: zlib's own default."""


@dataclass(frozen=True, slots=True)
class Size:
    """One image of smbench on this machine."""

    tag: str
    arch: str
    stacks: str
    disk_bytes: int
    """All layers, unpacked."""
    pull_bytes: int | None
    """All layers, compressed; None where that was not asked for."""


def measure(docker: str, with_pull: bool) -> Iterator[Size]:
    """Every image of smbench here, by tag. Compressing them all takes minutes, so it is asked for."""
    query = ["image", "ls", "--filter", "label=smbench.arch", "--format", "{{.Repository}}:{{.Tag}}"]
    for tag in sorted(line for line in daemon.ask(docker, *query).splitlines() if not line.endswith(":<none>")):
        labels_and_size = '{"labels": {{json .Config.Labels}}, "size": {{.Size}}}'
        facts = json.loads(daemon.ask(docker, "image", "inspect", "--format", labels_and_size, tag))
        labels = facts["labels"]
        pull = compressed_bytes(docker, tag) if with_pull else None
        yield Size(tag, labels["smbench.arch"], labels["smbench.stacks"], facts["size"], pull)


def compressed_bytes(docker: str, tag: str) -> int:
    """What a registry would send of an image: the sum of its layers, each compressed as docker does it."""
    with subprocess.Popen([docker, "image", "save", tag], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        total = archive_bytes(saving.stdout)
    if saving.returncode != 0:
        raise UsageError(f"{docker} image save {tag} failed (exit status {saving.returncode})")
    return total


def archive_bytes(stream: IO[bytes]) -> int:
    """Sum of the compressed layers of one saved image, read as it comes. Layers that repeat count once."""
    sizes: dict[str, int] = {}
    links: dict[str, str] = {}
    layers: list[str] = []
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.issym():
                # a layer that an image has twice, such as an empty one, is saved once
                links[member.name] = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if member.name == "manifest.json":
                layers = json.load(file)[0]["Layers"]
            else:
                sizes[member.name] = _gzip_bytes(file)
    return sum(sizes[name] for name in {links.get(layer, layer) for layer in layers})


def _gzip_bytes(file: IO[bytes]) -> int:
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP)
    total = 0
    while chunk := file.read(CHUNK_BYTES):
        total += len(packer.compress(chunk))
    return total + len(packer.flush())
