"""One more repetition of a cell under a profiler, after everything that counts. Owns the trace and what is kept of it.

A trace is plain JSON in the run folder, so that packing can redact it; what took the most time stands in the result. A
profile that cannot be taken is a note in the result and no failure of the cell. Nsight Systems watches a program from
its start, so with it a cell runs once more as a program of its own (`nsys`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smbench.worker import chrometrace
from smbench.worker.engines import Engine, UnsupportedByEngine

TRACES = "traces"
"""Folder of traces in a run folder."""
LARGEST_BYTES = 64 << 20
"""A larger trace is not kept: viewers do not open it, and a bundle is to be sent."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """What was asked for."""

    tool: str
    """`torch` or `nsys`."""
    folder: Path
    """The run folder."""


def take(folder: Path, cell_id: str, engine: Engine, repeat: Callable[[], None]) -> dict[str, Any]:
    """Run `repeat` under torch's profiler; the record of what was seen, its trace in a run folder. Never raises."""
    import torch

    tool = f"torch.profiler {torch.__version__}"
    try:
        with tempfile.TemporaryDirectory(prefix="smbench-trace-") as private:
            repetition_s = _run(engine, repeat, Path(private))
            found = sorted(Path(private).rglob("*.json*"))
            if not found:
                return nothing(tool, "the engine wrote no trace")
            # of several processes that share layers the first stands for all
            return _kept(tool, found[0], folder, cell_id, repetition_s)
    except UnsupportedByEngine as error:
        return nothing(tool, str(error))
    # the numbers are taken already, and a profiler raises whatever it likes
    except Exception as error:  # noqa: BLE001
        traceback.print_exc(file=sys.stderr)
        return nothing(tool, f"{type(error).__name__}: {str(error)[:300]}")


def nothing(tool: str, note: str) -> dict[str, Any]:
    """The record of a trace that could not be taken."""
    return {
        "tool": tool,
        "note": note,
        "file": None,
        "file_sha256": None,
        "size_bytes": 0,
        "repetition_s": 0.0,
        "kernels": [],
    }


def _run(engine: Engine, repeat: Callable[[], None], folder: Path) -> float:
    """Seconds of the repetition; its trace is in `folder` afterwards."""
    theirs = engine.tracer(folder)
    if theirs is not None:
        with theirs:
            return _timed(repeat)
    from torch import profiler

    with profiler.profile() as profile:
        seconds = _timed(repeat)
    profile.export_chrome_trace(str(folder / "trace.json"))
    return seconds


def _timed(repeat: Callable[[], None]) -> float:
    began = time.perf_counter()
    repeat()
    return time.perf_counter() - began


def _kept(tool: str, file: Path, folder: Path, cell_id: str, repetition_s: float) -> dict[str, Any]:
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    if file.suffix == ".gz":
        with gzip.open(file) as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    size_bytes = plain.stat().st_size
    text = plain.read_bytes()
    content: Mapping[str, Any] = json.loads(text)
    record = nothing(tool, "") | {
        "note": None,
        "size_bytes": size_bytes,
        "repetition_s": repetition_s,
        "kernels": chrometrace.longest(content["traceEvents"]),
    }
    if size_bytes > LARGEST_BYTES:
        return record | {"note": f"a trace of {size_bytes} bytes is not kept, the most is {LARGEST_BYTES}"}
    place = f"{TRACES}/{cell_id}.json"
    target = folder / place
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(text)
    return record | {"file": place, "file_sha256": hashlib.sha256(text).hexdigest()}
