"""An engine's own OpenAI-compatible server: started, found ready, watched, ended. Owns its process, port and log.

It listens on loopback alone. A free port is chosen and may be taken by somebody before the server binds it: then
another one is tried. Who answers is believed only where the listening socket is the server's own. Does not own which
server (`engines`), what is asked of it (`loadclient`), nor what its end means for a cell (`online`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from smbench.worker import loopback, warden
from smbench.worker.cellprocess import tail
from smbench.worker.enginecell import OUT_OF_MEMORY
from smbench.worker.engines import ServeCommand
from smbench.worker.processes import descendants

FIXED_PORT = "SMBENCH_SERVER_PORT"
"""Environment variable with the port to use, where it must be a certain one."""
IN_USE = re.compile(r"[Aa]ddress already in use|EADDRINUSE|\[Errno 98\]|[Pp]ort \d+ is (?:already )?(?:in use|taken)")
"""How servers say that somebody else has the port."""
MOST_PORTS = 4
"""Ports that are tried before giving up."""
ACCESS = re.compile(r'"(?:GET|POST) /\S* HTTP/\d')
"""Lines of a log that only tell that somebody asked, above all whether the server is ready."""
LAST_WORDS = 300
"""Characters of a log's end that a reason quotes."""
GRACE_S = 20.0
"""A server gets this long to shut down."""
POLL_S = 0.1
BEAT_S = 1.0
"""Least time between two signs of life while a server starts."""
ANSWER_LIMIT_S = 5.0
"""For one question whether a server is ready."""
LOG_TAIL_BYTES = 40_000
"""How much of a dead server's log is searched for what ended it."""

Commands = Callable[[int], ServeCommand]
"""The server's command for a port."""


class ServerFailed(Exception):
    """The server did not get ready, and nothing of it is left."""

    def __init__(self, status: Literal["crashed", "oom", "timeout"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Server:
    """A server that was ready when it was returned."""

    def __init__(self, command: ServeCommand, port: int, log: Path) -> None:
        self.command = command
        self.port = port
        self.log = log
        self._ended = False
        words = warden.command([*command.argv], GRACE_S)
        environment = {**loopback.private(os.environ), **command.environment}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    @property
    def alive(self) -> bool:
        """Whether its main process runs."""
        return self._process.poll() is None

    def cause(self) -> str:
        """How it ended, with its last words."""
        code = self._process.poll()
        return f"{'it still runs' if code is None else warden.cause(code)}{self.quoted()}"

    def quoted(self) -> str:
        """Its last words to append to a reason, without those about being asked; empty where it said none."""
        lines = [line for line in tail(self.log, LOG_TAIL_BYTES).splitlines() if not ACCESS.search(line)]
        words = " ".join(" ".join(lines).split())[-LAST_WORDS:]
        return f": … {words}" if words else ""

    def out_of_memory(self) -> bool:
        """Whether its log says that memory did not suffice."""
        return OUT_OF_MEMORY.search(tail(self.log, LOG_TAIL_BYTES)) is not None

    def processes(self) -> list[int]:
        """Its process ids, the warden's aside."""
        return descendants(self._process.pid)

    def ready(self) -> bool:
        """Whether it is the one that listens, answers, and has the model."""
        if loopback.listens(self.processes(), self.port) is False:
            return False
        if loopback.status(self.port, self.command.ready, ANSWER_LIMIT_S) != 200:
            return False
        try:
            models = loopback.ask(self.port, "/v1/models", ANSWER_LIMIT_S).get("data")
        except loopback.NoAnswer:
            return False
        return isinstance(models, list) and any(
            isinstance(model, dict) and model.get("id") == self.command.model for model in models
        )

    def stop(self) -> None:
        """End it and everything that it started; once is enough."""
        if self._ended:
            return
        self._ended = True
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=2 * GRACE_S)
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"{self.log.stem}: the warden of the server does not end: killed\n")
            for pid in [*self.processes(), self._process.pid]:
                _kill(pid)
            self._process.wait()


def start(commands: Commands, log: Path, ready_limit_s: float, beat: Callable[[], None]) -> Server:
    """A server that is ready. `beat` is called while it starts and its log grows.

    ServerFailed says why there is none: a port that must be had and is taken, its end, or `ready_limit_s` gone by.
    """
    fixed = _fixed_port()
    if fixed is not None and not loopback.is_free(fixed):
        raise ServerFailed(
            "crashed",
            f"port {fixed} of {loopback.HOST} is taken by another program, and {FIXED_PORT} asks for it: end that "
            f"program, or unset {FIXED_PORT} and a free port is chosen",
        )
    log.unlink(missing_ok=True)
    tried: list[int] = []
    while True:
        port = loopback.free_port() if fixed is None else fixed
        tried.append(port)
        server = Server(commands(port), port, log)
        try:
            _wait(server, ready_limit_s, beat)
        except ServerFailed as failed:
            taken = failed.status == "crashed" and IN_USE.search(tail(log, LOG_TAIL_BYTES)) is not None
            if not taken:
                raise
            if fixed is not None or len(tried) == MOST_PORTS:
                ports = ", ".join(map(str, tried))
                raise ServerFailed("crashed", f"every port that was tried was taken ({ports}): {failed}") from failed
            sys.stderr.write(f"{log.stem}: somebody took port {port} first: another one is tried\n")
            # the words of this attempt must not be taken for those of the next
            log.rename(log.with_name(f"{log.stem}.port-{port}.log"))
        # also a KeyboardInterrupt: a server outlives nobody who waits for it
        except BaseException:
            server.stop()
            raise
        else:
            return server


def _wait(server: Server, limit_s: float, beat: Callable[[], None]) -> None:
    """Return once a server is ready. ServerFailed, with the server ended, where it will not be."""
    deadline = time.monotonic() + limit_s
    size, quiet_until = 0, 0.0
    while not server.ready():
        if not server.alive:
            server.stop()
            status: Literal["oom", "crashed"] = "oom" if server.out_of_memory() else "crashed"
            raise ServerFailed(status, f"the server ended before it was ready ({server.cause()})")
        if time.monotonic() > deadline:
            words = server.quoted()
            server.stop()
            said = words or ", and it said nothing"
            raise ServerFailed("timeout", f"the server was not ready within {limit_s:g} s{said}")
        grown = server.log.stat().st_size
        if grown != size and time.monotonic() >= quiet_until:
            size, quiet_until = grown, time.monotonic() + BEAT_S
            beat()
        time.sleep(POLL_S)


def _fixed_port() -> int | None:
    """The port that the user asks for. ServerFailed where it is none."""
    words = os.environ.get(FIXED_PORT)
    if not words:
        return None
    if not words.isdecimal() or not 0 < int(words) < 1 << 16:
        raise ServerFailed("crashed", f"{FIXED_PORT}={words!r} is no port: give a number from 1 to 65535, or unset it")
    return int(words)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
