"""The host's end of a worker: start it, read its events within limits, stop it. Owns the process, not the results."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Self

PROTOCOL = 1
"""Version of request and events that this host speaks; the worker refuses any other."""
START_LIMIT_S = 300.0
"""Imports and device initialization; a cold container on a slow disk is minutes, never this long."""
WORKER_MODULE = ("-m", "smbench.worker")
"""What a Python is told to run; a request file follows."""
WORKER = (sys.executable, *WORKER_MODULE)
LAST_WORDS = 300
"""Characters of the log's end that a reason quotes."""


class Refused(Exception):
    """The worker finds the request impossible as a whole; nothing was measured."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = errors


class WorkerStopped(Exception):
    """The worker is gone before it was done."""

    def __init__(self, status: Literal["timeout", "crashed"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class WorkerProcess:
    """One worker process over one request, as a context manager: leaving it ends the process and all its children."""

    def __init__(
        self, folder: Path, request: Mapping[str, Any], interpreted: bool, command: Sequence[str] = WORKER
    ) -> None:
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        number = 1 + sum(1 for _ in logs.glob("worker-*.log"))
        self._log = logs / f"worker-{number:03d}.log"
        self._request_file = logs / f"worker-{number:03d}.request.json"
        self._request_file.write_text(json.dumps({"protocol": PROTOCOL, **request}), encoding="utf-8")
        self._interpreted = interpreted
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._no_event: bytes | None = None
        """The whole line that ended the reading because it is no event."""

    def __enter__(self) -> Self:
        environment = dict(os.environ)
        # a mode left in the user's shell must not decide what is measured
        environment.pop("TRITON_INTERPRET", None)
        if self._interpreted:
            environment["TRITON_INTERPRET"] = "1"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, str(self._request_file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                # its own group: Ctrl-C reaches the host alone, which then ends the whole group
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._kill_group()
            self._process.wait()
            # with the group gone the pipe has ended; not so if somebody left the group with it
            self._reader.join(timeout=5)
            self._request_file.unlink(missing_ok=True)
            if self._log.stat().st_size == 0:
                self._log.unlink()

    def events(self, time_limit_s: float) -> Iterator[dict[str, Any]]:
        """The worker's events until it is done. Refused; WorkerStopped on death or after `time_limit_s` in a cell."""
        limit_s = START_LIMIT_S
        while True:
            try:
                event = self._events.get(timeout=limit_s)
            except queue.Empty:
                raise WorkerStopped("timeout", f"no result within the limit of {limit_s:g} s") from None
            if event is None:
                raise WorkerStopped("crashed", self._death())
            match event["event"]:
                case "done":
                    return
                case "refused":
                    raise Refused(event["errors"])
                case "broken":
                    # the cell that broke it already has its result
                    return
            limit_s = time_limit_s
            yield event

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                event = _event(line)
                if event is None:
                    # half a line is no fault of its own: the process died while writing
                    self._no_event = line if line.endswith(b"\n") else None
                    break
                self._events.put(event)
        self._events.put(None)

    def _death(self) -> str:
        assert self._process is not None
        if self._no_event is not None:
            return f"the worker wrote a line that is no event: {self._no_event[:LAST_WORDS]!r}"
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._kill_group()
            code = self._process.wait()
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        with self._log.open("rb") as log:
            # a character has four bytes at most
            log.seek(max(0, self._log.stat().st_size - 4 * LAST_WORDS))
            words = " ".join(log.read().decode("utf-8", errors="replace")[-LAST_WORDS:].split())
        return f"the worker died ({cause})" + (f": … {words}" if words else "")

    def _kill_group(self) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _event(line: bytes) -> dict[str, Any] | None:
    """The event that a line holds, None where it holds none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
