"""A cell under NVIDIA Nsight Systems: run once more, as a program of its own that nsys watches from its start.

So nothing that counts is measured under nsys. Only one repetition is recorded, between the calls of CUDA's profiler
interface that `enginecell` makes. Owns the command and how its summary is read. The recording itself stays in the run
folder: it holds the environment of the processes, so a bundle leaves it out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smbench.worker import chrometrace
from smbench.worker.cellprocess import CellProcess
from smbench.worker.tracing import TRACES, Tracing, nothing

REPORT = "cuda_gpu_kern_sum"
"""nsys' own summary of kernels by name."""
LIMIT_S = 600.0
"""For nsys to summarize a recording."""


def take(asked: Tracing, request: Mapping[str, Any], job: Mapping[str, Any], logs: Path) -> dict[str, Any]:
    """The record of a trace by nsys. Never raises: what goes wrong is a note in it."""
    program = shutil.which("nsys")
    if program is None:
        return nothing("nsys", "nsys is not on the PATH")
    try:
        return _take(program, asked, request, job, logs)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        return nothing("nsys", f"{type(error).__name__}: {str(error)[:300]}")


def _take(
    program: str, asked: Tracing, request: Mapping[str, Any], job: Mapping[str, Any], logs: Path
) -> dict[str, Any]:
    tool = _version(program)
    place = f"{TRACES}/{job['cell_id']}.nsys-rep"
    file = asked.folder / place
    file.parent.mkdir(exist_ok=True)
    told = logs / f"{job['cell_id']}.nsys.request.json"
    told.write_text(json.dumps({**request, "alone": True, "recorded": True, "jobs": [job]}), encoding="utf-8")
    worker = [sys.executable, "-m", "smbench.worker", str(told)]
    process = CellProcess.start(logs / f"{job['cell_id']}.nsys.log", [*_profile(program, file), *worker])
    seconds = None
    for event in process.events():
        if event["event"] == "recorded":
            seconds = float(event["repetition_s"])
    told.unlink()
    if seconds is None or not file.is_file():
        return nothing(tool, f"the program under nsys left no recording ({process.cause()}), see its log")
    return nothing(tool, "") | {
        "note": None,
        "file": place,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "size_bytes": file.stat().st_size,
        "repetition_s": seconds,
        "kernels": _kernels(program, file),
    }


def _profile(program: str, file: Path) -> list[str]:
    return [
        *(program, "profile", "--output", str(file), "--force-overwrite=true"),
        # only what lies between cudaProfilerStart and cudaProfilerStop
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
        *("--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", "--trace-fork-before-exec=true"),
    ]


def _kernels(program: str, file: Path) -> list[dict[str, Any]]:
    command = [
        program,
        "stats",
        "--report",
        REPORT,
        "--format",
        "csv",
        "--output",
        "-",
        "--force-export=true",
        str(file),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout
    # progress comes before the table
    lines = said.splitlines()
    head = next(
        (i for i, line in enumerate(lines) if line.startswith('"Time (%)"') or line.startswith("Time (%)")), None
    )
    if head is None:
        return []
    rows = csv.DictReader(io.StringIO("\n".join(lines[head:])))
    return chrometrace.shares(
        (row["Name"][: chrometrace.LONGEST_NAME], int(row["Instances"]), float(row["Total Time (ns)"]) * 1e-9)
        for row in rows
        if row.get("Name")
    )


def _version(program: str) -> str:
    """`nsys` with its version, from a line such as `NVIDIA Nsight Systems version 2025.3.1.90-…`."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    return f"nsys {said.rpartition('version ')[2].strip() or 'of unknown version'}"
