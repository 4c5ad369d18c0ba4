"""Tuned configurations: `configs/<device>/<op>.json`. Owns the file format and the choice of an entry for a point.

Does not own the search that fills the files. A file of format 2 is
`{"format", "op", "device", "library", "triton", "method", "entries": [{"point", "config", "time_s", "candidates"}]}`.
Launch parameters of a library's kernel are in `configs/<device>/<op>.<library>-<version>.json`: they hold for no
other version of it. Format history: 1 is the first; 2 adds `library`, null for kernels of our own; 1 is still read.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smbench_kernels.op import Config, Point, UnsupportedPoint

if TYPE_CHECKING:
    import torch

FORMAT = 2
ROOT = Path(__file__).parent / "configs"
FILE_KEYS: Mapping[int, Sequence[str]] = {
    1: ("format", "op", "device", "triton", "method", "entries"),
    2: ("format", "op", "device", "library", "triton", "method", "entries"),
}
ENTRY_KEYS = ("point", "config", "time_s", "candidates")
TUNE = "`make tune` with the recipe that measures it"
"""What to do about a missing entry."""


class ConfigFileError(ValueError):
    """A configuration file is not what this version reads. The message names file, key and what is expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The best configuration found for one point."""

    point: Point
    config: Config
    time_s: float
    candidates: int
    """Size of the search space that this is the best of."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was tuned for one operation on one device."""

    op: str
    device: str
    """The device's product name, as torch gives it."""
    triton: str
    """The Triton version that compiled the candidates."""
    method: str
    """How candidates were timed and pruned, in words."""
    entries: Sequence[Entry]
    library: str | None = None
    """The library that the kernel is of, with its version, such as `vllm 0.26.0`; None for our own."""


def folder_name(device: str) -> str:
    """The folder of a device's files: `NVIDIA H200` is `NVIDIA_H200`."""
    return re.sub(r"[^A-Za-z0-9.]", "_", device)


def path_of(device: str, op: str, root: Path = ROOT, library: str | None = None) -> Path:
    """Where the file of a device and an operation is, present or not; of a library's kernel, if it is one's."""
    suffix = "." + re.sub(r"[^A-Za-z0-9._+-]", "-", library) if library else ""
    return root / folder_name(device) / f"{op}{suffix}.json"


def device_name(device: torch.device) -> str:
    """The product name of a CUDA device, the type of any other."""
    # here and not above, since files are also read where there is no torch
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load(path: Path) -> Tuned:
    """Read a file strictly. FileNotFoundError if there is none, ConfigFileError if it is not as the format says."""
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _load(path: Path, _mtime_ns: int) -> Tuned:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigFileError(f"{path}: expected an object")
    found: Any = content.get("format")
    if found not in FILE_KEYS:
        known = " and ".join(str(number) for number in FILE_KEYS)
        raise ConfigFileError(f"{path}: format is {found!r}; this version reads formats {known}")
    _check_keys(path, "", content, FILE_KEYS[found])
    library = content.get("library")
    entries = _typed(path, "entries", content["entries"], list)
    return Tuned(
        op=_typed(path, "op", content["op"], str),
        device=_typed(path, "device", content["device"], str),
        triton=_typed(path, "triton", content["triton"], str),
        method=_typed(path, "method", content["method"], str),
        entries=tuple(_entry(path, f"entries[{number}]", entry) for number, entry in enumerate(entries)),
        library=library if library is None else _typed(path, "library", library, str),
    )


def save(path: Path, tuned: Tuned) -> None:
    """Write a file in one step, one entry a line in the order of the points, so that a diff shows what changed."""
    head = {
        "format": FORMAT,
        "op": tuned.op,
        "device": tuned.device,
        "library": tuned.library,
        "triton": tuned.triton,
        "method": tuned.method,
    }
    ordered = sorted(tuned.entries, key=lambda entry: [(key, entry.point[key]) for key in sorted(entry.point)])
    lines = [
        json.dumps(
            {
                "point": dict(entry.point),
                "config": dict(entry.config),
                "time_s": entry.time_s,
                "candidates": entry.candidates,
            }
        )
        for entry in ordered
    ]
    text = json.dumps(head, indent=2)[:-2] + ',\n  "entries": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lookup(tuned: Tuned, point: Point) -> tuple[Config, str]:
    """The configuration for a point and where it comes from: `tuned-exact` or `tuned-nearest: <the entry's axes>`.

    Nearest is the least Euclidean distance of the logarithms of the numeric axes, the first entry of equals; axes that
    are words, such as dtype, must match. UnsupportedPoint if no entry matches them.
    """
    best: tuple[float, Entry] | None = None
    for entry in tuned.entries:
        if entry.point.keys() != point.keys():
            continue
        distance = _distance(entry.point, point)
        if distance is not None and (best is None or distance < best[0]):
            best = (distance, entry)
    if best is None:
        words = ", ".join(f"{key} {value}" for key, value in point.items() if isinstance(value, str))
        of = f" of {tuned.library}" if tuned.library else ""
        raise UnsupportedPoint(f"{tuned.op}{of} on {tuned.device} has no tuned entry for {words}: {TUNE}")
    distance, entry = best
    if distance == 0.0:
        return entry.config, "tuned-exact"
    differing = ", ".join(f"{key} {value}" for key, value in entry.point.items() if value != point[key])
    return entry.config, f"tuned-nearest: {differing}"


def tuned_config(
    op: str, point: Point, device: torch.device, root: Path | None = None, library: str | None = None
) -> tuple[Config, str]:
    """What `lookup` finds for this device. UnsupportedPoint, with the remedy, where the device has no file."""
    name = device_name(device)
    path = path_of(name, op, root or ROOT, library)
    if not path.exists():
        of = f" of {library}" if library else ""
        raise UnsupportedPoint(f"{op}{of} is not tuned for {name}: {TUNE}")
    return _looked_up(path, path.stat().st_mtime_ns, tuple(sorted(point.items())))


@lru_cache(maxsize=8192)
def _looked_up(path: Path, _mtime_ns: int, point: tuple[tuple[str, int | str], ...]) -> tuple[Config, str]:
    """A provider is bound to many buffers of one point, and a file holds hundreds of entries."""
    return lookup(load(path), dict(point))


def _distance(known: Point, wanted: Point) -> float | None:
    """Distance of two points with the same axes; None where an axis of words differs."""
    total = 0.0
    for key, value in wanted.items():
        other = known[key]
        if isinstance(value, int) and isinstance(other, int):
            total += math.log(value / other) ** 2
        elif value != other:
            return None
    return math.sqrt(total)


def _entry(path: Path, where: str, content: Any) -> Entry:
    entry = _typed(path, where, content, dict)
    _check_keys(path, f"{where}.", entry, ENTRY_KEYS)
    point = _typed(path, f"{where}.point", entry["point"], dict)
    config = _typed(path, f"{where}.config", entry["config"], dict)
    for key, value in point.items():
        if isinstance(value, bool) or not (isinstance(value, str) or (isinstance(value, int) and value >= 1)):
            raise ConfigFileError(f"{path}: {where}.point.{key} is {value!r}; expected a positive integer or a word")
    for key, value in config.items():
        if isinstance(value, bool) or not (isinstance(value, int) and value >= 0):
            raise ConfigFileError(f"{path}: {where}.config.{key} is {value!r}; expected an integer from 0")
    time_s = entry["time_s"]
    if isinstance(time_s, bool) or not (isinstance(time_s, int | float) and math.isfinite(time_s) and time_s > 0):
        raise ConfigFileError(f"{path}: {where}.time_s is {time_s!r}; expected seconds above zero")
    return Entry(point, config, float(time_s), _typed(path, f"{where}.candidates", entry["candidates"], int))


def _check_keys(path: Path, where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ConfigFileError(f"{path}: unknown key {where}{key}; known: {', '.join(known)}")
    for key in known:
        if key not in content:
            raise ConfigFileError(f"{path}: {where}{key} is missing")


def _typed(path: Path, where: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigFileError(f"{path}: {where} is {value!r}; expected {kind.__name__}")
    return value
