"""A worker with scripted behaviour: speaks the protocol and measures nothing. What a job does is decided by its axes.

`hidden_size` picks the behaviour: a number of BEHAVIOURS does what stands there, any other is an honest `ok` whose
samples are known to the last digit (`samples_of`). Environment variables: FAKE_WORKER_DELAY_S, how long each cell
takes; FAKE_WORKER_JOURNAL, a file that gets a line for every process and every cell that was begun;
FAKE_WORKER_COMPILES, how many kernels it says that it compiles before, a quarter of a second each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STARTED_AT = "2025-01-02T03:04:05.678+00:00"
ENVIRONMENT = {"python": {"version": "3.11"}, "gpu": {}}
ENVIRONMENT_ID = "53ae9ebddc049d71"
"""What `smbench.identity` makes of it."""
TIMER_CHECK = {"method": "wall", "expected_s": 0.0004, "measured_s": 0.0004}
REFUSED = 20
"""A job with this hidden size makes the whole request impossible."""
NEVER_READY = 21
"""A request whose first job has this hidden size dies before `ready`."""

Job = Mapping[str, Any]
Behaviour = Callable[[Job, list[Mapping[str, Any]]], None]


def samples_of(hidden_size: int) -> list[float]:
    """The samples of an honest cell: five of them, a known distance apart."""
    return [hidden_size * 1e-6 + k * 1e-9 for k in range(5)]


def emit(event: str, **fields: Any) -> None:
    """Unlike the real worker, this one may write NaN."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def result(job: Job, status: str, **fields: Any) -> None:
    emit("result", cell_id=job["cell_id"], started_at=STARTED_AT, status=status, **fields)


def check(passed: bool) -> dict[str, Any]:
    error = 1e-4 if passed else 1.0
    return {
        "passed": passed,
        "rounds": 2,
        "relative_error": error,
        "relative_bound": 1e-2,
        "elementwise_error": error,
        "elementwise_bound": 1e-1,
        "reference": "float64",
    }


def measurements(job: Job, measures: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    samples = samples_of(job["axes"]["hidden_size"])
    return [
        {
            "name": row["name"],
            "method": row["method"],
            "l2": row["l2"],
            "calls_per_sample": row["calls"],
            "warmup_s": samples[:1],
            "samples_s": samples,
            "busy_s": sum(samples),
        }
        for row in measures
    ]


def ok(job: Job, measures: list[Mapping[str, Any]]) -> None:
    if job["untimed_reason"]:
        verified(job, measures)
        return
    result(
        job,
        "ok",
        reason=None,
        check=check(True),
        work={"bytes": 1000, "flops": 2000},
        selection={"source": "library", "config": {}},
        measurements=measurements(job, measures),
        phases_s={"inputs": 0.001, "check": 0.002, "total": 0.01},
    )


def verified(job: Job, _: object) -> None:
    result(job, "verified", reason=job["untimed_reason"] or "only checked", check=check(True))


def segmentation_fault(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(*_: object) -> None:
    time.sleep(600)


def hang_with_a_child(*_: object) -> None:
    child = subprocess.Popen(["sleep", "600"])
    sys.stderr.write(f"child {child.pid}\n")
    sys.stderr.flush()
    hang()


def half_a_line(job: Job, _: object) -> None:
    sys.stdout.write('{"event": "result", "cell_id": "' + job["cell_id"])
    sys.stdout.flush()
    os._exit(9)


def not_a_number(job: Job, measures: list[Mapping[str, Any]]) -> None:
    rows = measurements(job, measures)
    rows[0]["samples_s"][2] = float("nan")
    result(job, "ok", reason=None, check=check(True), measurements=rows)


def number_on_a_red_gate(job: Job, measures: list[Mapping[str, Any]]) -> None:
    result(job, "ok", reason=None, check=check(False), measurements=measurements(job, measures))


def no_start_time(job: Job, _: object) -> None:
    emit("result", cell_id=job["cell_id"], status="ok", reason=None, check=check(True))


def broken(job: Job, _: object) -> None:
    result(job, "crashed", reason="RuntimeError: CUDA error: an illegal memory access was encountered")
    emit("broken", reason="CUDA error: an illegal memory access was encountered")
    sys.exit(3)


def huge_stderr(*_: object) -> None:
    for number in range(100_000):
        sys.stderr.write(f"line {number} of a very long complaint\n")
    sys.stderr.write("the very last words\n")
    sys.exit(7)


def incorrect(job: Job, _: object) -> None:
    result(job, "incorrect", reason="first inputs: relative error 1 exceeds 0.01", check=check(False))


def out_of_memory(job: Job, _: object) -> None:
    result(job, "oom", reason="CUDA out of memory. Tried to allocate 2.00 TiB")


def unsupported(job: Job, _: object) -> None:
    result(job, "unsupported", reason="needs a hidden size above 12")


def raw(line: bytes) -> Behaviour:
    """Write a line that is no event, and live on."""

    def write(*_: object) -> None:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        hang()

    return write


BEHAVIOURS: Mapping[int, Behaviour] = {
    2: verified,
    3: segmentation_fault,
    4: hang,
    5: half_a_line,
    6: not_a_number,
    7: number_on_a_red_gate,
    8: broken,
    9: huge_stderr,
    10: incorrect,
    11: out_of_memory,
    12: unsupported,
    13: raw(b"Loading checkpoint shards: 100%"),
    14: raw(b"\xff\xfe no text"),
    15: raw(b"[1, 2]"),
    16: no_start_time,
    17: hang_with_a_child,
}


def main(request_file: str) -> None:
    from smbench.worker.__main__ import _die_with_the_host

    _die_with_the_host()
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    sizes = [job["axes"]["hidden_size"] for job in request["jobs"]]
    journal(f"worker {os.getpid()} interpreted={os.environ.get('TRITON_INTERPRET', '0')}")
    if sizes[0] == NEVER_READY:
        sys.exit("the driver on your system is too old")
    if REFUSED in sizes:
        emit("refused", errors=["axis 'rank' is missing", "axis 'rnak' is unknown"])
        sys.exit(2)
    emit("ready", environment_id=ENVIRONMENT_ID, environment=ENVIRONMENT, timer_checks=[TIMER_CHECK])
    if kernels := int(os.environ.get("FAKE_WORKER_COMPILES", "0")):
        for done in range(kernels + 1):
            emit("compiled", done=done, of=kernels, seconds=0.25 * done)
    for job, size in zip(request["jobs"], sizes, strict=True):
        emit("start", cell_id=job["cell_id"])
        journal(f"cell {job['cell_id']}")
        time.sleep(float(os.environ.get("FAKE_WORKER_DELAY_S", "0")))
        BEHAVIOURS.get(size, ok)(job, request["measures"])
    emit("done")


def journal(line: str) -> None:
    if path := os.environ.get("FAKE_WORKER_JOURNAL"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
