"""Reads the memory snapshots that PyTorch's CUDA allocator writes, as far as a timeline needs them. Trusts none.

The file is a pickle (`torch.cuda.memory._dump_snapshot`). Unpickling runs what a file names, so names are refused here:
what is left are Python's own containers, numbers and strings, and a real snapshot holds nothing else. Owns no figure.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from smbench.errors import CorruptError

SUFFIX = ".memory.pickle"
"""How the files are called that runs keep."""
LARGEST_BYTES = 16 << 20
"""A snapshot of two layers without stack traces has some 100 KB."""
MOST_VALUES = 2_000_000
"""A pickle can name one list many times: what it unfolds to is counted, too."""
CHANGES: Mapping[str, int] = {"alloc": 1, "free_completed": -1}
"""What an entry of the trace does to the bytes in use. A block whose free is only requested is still in use; segments
are what the allocator itself holds, in use or not."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """How the memory in use went up and down."""

    bytes: tuple[int, ...]
    """In use after each allocation or release, counted from 0 at the first entry of the trace."""
    snapshots: tuple[int, ...]
    """Where earlier snapshots were taken: so many entries of `bytes` came before."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no memory snapshot needs")


def read(data: bytes, name: str, device: int = 0) -> Timeline:
    """The timeline of one device in the bytes of a snapshot. CorruptError, beginning with `name`, for anything else."""
    found = parse(data, name)
    try:
        return timeline(found["device_traces"][device])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptError(f"{name}: no device_traces of device {device} in this snapshot: {error!r}") from error


def parse(data: bytes, name: str) -> Any:
    """What a snapshot holds: dictionaries by words, lists, tuples, numbers and strings. CorruptError as above."""
    if len(data) > LARGEST_BYTES:
        raise CorruptError(f"{name}: {len(data)} bytes are more than a memory snapshot is read from ({LARGEST_BYTES})")
    try:
        found = _PlainUnpickler(io.BytesIO(data)).load()
        _require_plain(found)
    # a broken pickle raises whatever its opcodes stumble over
    except Exception as error:
        raise CorruptError(f"{name}: no memory snapshot of PyTorch: {error}") from error
    return found


def rewritten(data: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """A snapshot with what it holds changed; the very same bytes where nothing changes. CorruptError as above."""
    found = parse(data, name)
    changed = change(found)
    # the protocol that PyTorch's viewer reads
    return data if changed == found else pickle.dumps(changed, protocol=4)


def _require_plain(value: Any) -> None:
    """ValueError for what JSON could not say, and for what has no end or unfolds to very much."""
    waiting = [value]
    seen = 0
    while waiting:
        seen += 1
        if seen > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES} values")
        match waiting.pop():
            case dict() as table:
                if not all(isinstance(key, str) for key in table):
                    raise ValueError("a key is no word")
                waiting.extend(table.values())
            case list() | tuple() as items:
                waiting.extend(items)
            case None | bool() | int() | float() | str():
                pass
            case other:
                raise ValueError(f"it holds a {type(other).__name__}")


def timeline(trace: Iterable[Mapping[str, Any]]) -> Timeline:
    """The timeline of one device's trace. KeyError, TypeError or ValueError where an entry is none."""
    in_use: list[int] = []
    snapshots: list[int] = []
    level = 0
    for entry in trace:
        action, size = entry["action"], entry["size"]
        if action in CHANGES:
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"size {size!r}")
            level += CHANGES[action] * size
            in_use.append(level)
        elif action == "snapshot":
            snapshots.append(len(in_use))
    return Timeline(tuple(in_use), tuple(snapshots))
