"""Small bundles for tests, and ways of making bad ones out of them. Owns values only: a test says what is due."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_run
from smbench import bag, bundle
from smbench.archive import GZIP_HEADER, Writer
from smbench.identity import environment_id
from smbench.redaction import Personal

NOBODY = Personal({}, (), ())
"""A machine with nothing to hide: what a test packs does not depend on who runs it."""

Files = dict[str, bytes]
"""Members by name, the top folder left out."""


def run_folder(folder: Path, outcome: Any = fake_run.on_a_processor, **changes: Any) -> Path:
    """A run folder whose environments have their true identities; the profile is `cpu` unless `changes` say so."""
    made = fake_run.build(
        folder,
        changes.get("recipe", fake_run.RECIPE),
        changes.get("profile", "cpu"),
        outcome,
        [changes.get("environment", fake_run.CPU)],
    )
    true_identities(made / "results.jsonl")
    return made


def true_identities(path: Path) -> None:
    """Give the environments of a results.jsonl the identities that they have, and tell the results."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = {
        record["environment_id"]: environment_id(record["environment"])
        for record in records
        if record["record"] == "environment"
    }
    for record in records:
        if record.get("environment_id"):
            record["environment_id"] = names[record["environment_id"]]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def packed(folder: Path, out: Path | None = None, personal: Personal = NOBODY) -> Path:
    """The bundle of a run folder."""
    done = bundle.pack(folder, out, personal)
    assert done is not None
    return done.path


def files_of(path: Path) -> tuple[str, Files]:
    """The top folder of a bundle, and its files."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        top = members[0].name.partition("/")[0]
        return top, {m.name.removeprefix(f"{top}/"): (tar.extractfile(m) or io.BytesIO()).read() for m in members}


def write(path: Path, top: str, files: Mapping[str, bytes]) -> Path:
    """A file of the canonical form with these members in this order."""
    with path.open("wb") as file, Writer(file) as writer:
        for name, data in files.items():
            writer.add(f"{top}/{name}", len(data), [data])
    return path


def honest(files: Files) -> tuple[str, Files]:
    """The files with manifests that fit them, and the name of their top folder: what a forger would send."""
    payload = {name: files[name] for name in sorted(files) if name.startswith("data/")}
    manifest = bag.manifest_of((hashlib.sha256(data).hexdigest(), name) for name, data in payload.items())
    info = dict(line.split(": ", 1) for line in files["bag-info.txt"].decode().splitlines())
    info["Payload-Oxum"] = f"{sum(map(len, payload.values()))}.{len(payload)}"
    tags = bag.tag_files("".join(f"{key}: {value}\n" for key, value in info.items()).encode(), manifest)
    name = f"lora-{info['Smbench-Device']}-{hashlib.sha256(manifest).hexdigest()[:12]}"
    return name, {**tags, **payload}


def forged(path: Path, source: Path, change: Callable[[Files], None]) -> Path:
    """A copy of a bundle with changed files and hashes that fit the change."""
    _, files = files_of(source)
    change(files)
    return write(path, *honest(files))


def edited_records(files: Files, change: Callable[[dict[str, Any]], None]) -> None:
    """Change records of results.jsonl in place, each by itself; what JSON cannot say is written as Python says it."""
    records = [json.loads(line) for line in files["data/results.jsonl"].splitlines()]
    for record in records:
        change(record)
    files["data/results.jsonl"] = "".join(json.dumps(record) + "\n" for record in records).encode()


def raw(path: Path, blocks: Iterable[bytes]) -> Path:
    """A file that is gzip with our header around any bytes."""
    plain = gzip.compress(b"".join(blocks), 6, mtime=0)
    path.write_bytes(GZIP_HEADER + plain[len(GZIP_HEADER) :])
    return path


def tar_of(members: Sequence[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar by the standard library, which writes whatever it is given."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()
