"""One `docker run` after the other: started, followed, told to stop. Owns processes and signals, not what they mean."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 45.0
"""A container that was told to stop is killed after this; it needs a second or two."""
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended."""

    code: int
    """Of `docker run`: the container's own, or docker's where that is 125 to 127."""
    out: str
    """Its standard output; its standard error went to ours."""


class ContainerProcesses:
    """As a context manager: signals are passed on to the container at hand, and are kept for who asks."""

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        """The first signal that came."""
        self._told_at = 0.0
        self._process: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        # who ignores a signal, as nohup does with SIGHUP, goes on ignoring it
        self._before = {
            number: signal.getsignal(number) for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN
        }
        for number in self._before:
            signal.signal(number, self._tell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], name: str) -> Ended:
        """Run a `docker run` whose container is called `name` to its end, however that comes."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            # a session of its own: Ctrl-C would reach docker twice, from the terminal and from here
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)
            self._process = process
            try:
                while process.poll() is None:
                    try:
                        process.wait(LOOK_S)
                    except subprocess.TimeoutExpired:
                        if self.told is not None and time.monotonic() - self._told_at > GRACE_S:
                            _docker("kill", name)
            finally:
                self._process = None
            out.seek(0)
            return Ended(process.returncode, out.read())

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if self.told is None:
            self.told, self._told_at = signal.Signals(number), time.monotonic()
        if self._process is not None:
            # a terminal that goes away is an eviction like any other
            self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _docker(*arguments: str) -> None:
    subprocess.run(["docker", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
