"""One cell of an engine in a process of its own: forked from the worker, or started afresh where forking is no use.

Owns the process, its log and the way of its events to the worker. Does not own what the cell does (`cell`) nor what the
worker makes of its end (`serving`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from smbench.worker.processes import die_with_parent

POLL_S = 0.1
GRACE_S = 30.0
"""An engine gets this long to shut down after its cell's result; then it is killed."""
LAST_WORDS = 300
"""Characters of a log's end that a reason quotes."""

Say = Callable[[str, Mapping[str, Any]], None]


class CellProcess:
    """A child of the worker. Its standard output and error are `log`; its events come through a pipe of their own."""

    def __init__(self, log: Path, pid: int, descriptor: int) -> None:
        self.log = log
        self._pid = pid
        self._descriptor = descriptor
        self._rest = b""
        self._status: int | None = None

    @classmethod
    def fork(cls, log: Path, run: Callable[[Say], None]) -> CellProcess:
        """A copy of this process that calls `run` with what emits events, and ends."""
        reading, writing = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            os.close(writing)
            return cls(log, pid, reading)
        # nothing of the parent's code may run on in the child, whatever happens
        code = 1
        try:
            os.close(reading)
            die_with_parent(parent)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            with os.fdopen(writing, "w", encoding="utf-8") as stream:

                def say(event: str, fields: Mapping[str, Any]) -> None:
                    stream.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
                    stream.flush()

                run(say)
            code = 0
        # also SystemExit, by which some engines end themselves
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            # no handlers at exit: they are the parent's too, and an engine's may hang
            os._exit(code)

    @classmethod
    def start(cls, log: Path, command: list[str]) -> CellProcess:
        """A program that writes its events to its standard output."""
        reading, writing = os.pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, writing, 1),
            (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        ]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        os.close(writing)
        return cls(log, pid, reading)

    def events(self) -> Iterator[dict[str, Any]]:
        """Events until the process ends. A result starts its grace: who does not end in time is killed."""
        deadline: float | None = None
        try:
            while True:
                ended = self._ended()
                for event in self._available(0.0 if ended else POLL_S):
                    if event["event"] == "result":
                        deadline = time.monotonic() + GRACE_S
                    yield event
                if ended:
                    return
                if deadline is not None and time.monotonic() > deadline:
                    sys.stderr.write(f"{self.log.stem}: did not end within {GRACE_S:g} s of its result: killed\n")
                    os.kill(self._pid, signal.SIGKILL)
                    deadline = None
        finally:
            os.close(self._descriptor)

    def cause(self) -> str:
        """How the ended process ended."""
        assert self._status is not None
        code = os.waitstatus_to_exitcode(self._status)
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def _available(self, wait_s: float) -> Iterator[dict[str, Any]]:
        """What whole lines the pipe holds. What is no event is a fault of the cell and goes to the log."""
        closed = False
        while not closed and select.select([self._descriptor], [], [], wait_s)[0]:
            wait_s = 0.0
            chunk = os.read(self._descriptor, 1 << 16)
            closed = not chunk
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                event = _event(line)
                if event is None:
                    sys.stderr.write(f"{self.log.stem}: wrote a line that is no event: {line[:LAST_WORDS]!r}\n")
                else:
                    yield event
        if closed and self._status is None:
            # nobody holds the pipe any more: only the end is left to wait for
            time.sleep(POLL_S)


def last_words(log: Path) -> str:
    """The end of a log in one line."""
    return " ".join(tail(log, 4 * LAST_WORDS)[-LAST_WORDS:].split())


def tail(log: Path, size: int) -> str:
    """The last `size` bytes of a log as text."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode("utf-8", errors="replace")


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
