"""`python -m smbench.worker REQUEST`: measure the cells of a request, one JSON event a line on standard output.

Owns the protocol's worker side. Whatever libraries print goes to standard error, which the host keeps as a log.

Events: `ready` (environment, timer checks), `refused` (errors; nothing was measured), `compiled` (how many of how many
kernels are compiled ahead, and in how many seconds), `start` (cell_id), `result`,
`broken` (this process can go on no further), `done`. For engines also `request` (one more request of the cell at hand
is done) and `died` (the cell's own process ended without a result). A tuning request is answered by `ready`,
`compiled`, a `tuned` for each point, perhaps a `quality` for some, and `done`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from smbench.worker.processes import die_with_parent

PROTOCOL = 1
"""Version of request and events. History: 1 = first."""


class Events:
    """The stream to the host."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event. ValueError for NaN or infinity, BrokenPipeError when the host has gone."""
        line = json.dumps({"event": event, **fields}, allow_nan=False, separators=(",", ":"))
        self._stream.write(line + "\n")
        self._stream.flush()


def main(arguments: list[str]) -> int:
    """Run one request; the exit code says only whether the protocol was completed."""
    _die_with_the_host()
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    # libraries print to descriptor 1 as they like, so the host's stream moves to a descriptor of its own
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if request["protocol"] != PROTOCOL:
        Events(stream).emit("refused", errors=[f"request has protocol {request['protocol']}, this worker {PROTOCOL}"])
        return 2
    if "points" in request:
        return serve_tuning(request, Events(stream))
    return serve_engines(request, Events(stream)) if request["kind"] == "engine" else serve(request, Events(stream))


def serve(request: dict[str, Any], events: Events) -> int:
    """Answer a request: every job gets its result, unless the process breaks."""
    import torch

    from smbench.identity import environment_id
    from smbench.worker import baked, environment, telemetry
    from smbench.worker.op import Job, OpRunner
    from smbench.worker.timing import Spec

    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.init()
        baked.use()
    native = Path(request["folder"]) / "native" if "folder" in request else None
    runner = OpRunner(device, [Spec(**row) for row in request["measures"]], sys.stderr, native)
    jobs = [Job(**row) for row in request["jobs"]]
    errors = runner.refusals(jobs)
    if errors:
        events.emit("refused", errors=errors)
        return 2
    facts = environment.capture()
    events.emit(
        "ready",
        environment_id=environment_id(facts),
        environment=facts,
        timer_checks=_timer_checks(device, runner),
    )
    if device.type == "cuda":
        from smbench.worker import precompile

        for progress in precompile.ahead(jobs, device):
            events.emit("compiled", **progress)
    sampler = telemetry.open_telemetry() if device.type == "cuda" else telemetry.NullSampler("runs on the CPU")
    with sampler:
        for job in jobs:
            started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
            events.emit("start", cell_id=job.cell_id)
            began = time.monotonic()
            result = runner.run(job)
            result["telemetry"] = sampler.window(began, time.monotonic())
            events.emit("result", cell_id=job.cell_id, started_at=started_at, **result)
            if runner.broken:
                events.emit("broken", reason=runner.broken)
                return 3
    events.emit("done")
    return 0


def serve_engines(request: dict[str, Any], events: Events) -> int:
    """Answer a request whose cells are engines: each runs in a process of its own."""
    from smbench.worker.serving import serve_cells

    return serve_cells(request, events)


def serve_tuning(request: dict[str, Any], events: Events) -> int:
    """Answer a tuning request: the best configuration of every point."""
    from smbench.identity import environment_id
    from smbench.worker import environment
    from smbench.worker.tune import tune

    facts = environment.capture()
    events.emit("ready", environment_id=environment_id(facts), environment=facts, timer_checks=[])
    for outcome in tune(request):
        events.emit(**outcome)
    events.emit("done")
    return 0


def _timer_checks(device: Any, runner: Any) -> list[dict[str, Any]]:
    if device.type != "cuda":
        return []
    from smbench.worker.timer_check import check_timer

    return check_timer(device, runner.stream)


def _die_with_the_host() -> None:
    """An orphan would disturb the next run."""
    die_with_parent(os.getppid())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
