"""HTTP to a server on this machine, and who listens on a port. Owns both ends of 127.0.0.1; knows no engine.

No proxy is asked and no credential is sent, whatever the user's shell says; `private` gives programs the same peace.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
FOREIGN = re.compile(r"(?i)(.*_)?(proxy|api_key|apikey|token|secret|password|credentials)")
"""Environment variables that point elsewhere or open something: none of a benchmark's business."""
_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NoAnswer(Exception):
    """A server did not answer with what was asked; the message says what came instead."""


def private(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without proxies and credentials, in which 127.0.0.1 is asked directly."""
    kept = {name: value for name, value in environment.items() if not FOREIGN.fullmatch(name)}
    return {**kept, "no_proxy": f"{HOST},localhost", "NO_PROXY": f"{HOST},localhost"}


def free_port() -> int:
    """A port that nobody has right now; somebody may take it before it is used."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server could bind a port now."""
    with socket.socket() as probe:
        # as servers do it: a connection that is closing does not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def listens(processes: Collection[int], port: int) -> bool | None:
    """Whether one of the processes listens on a port: who answers there may be somebody else.

    None where the system shows nobody who listens there; a sandbox may hide it.
    """
    wanted = _listeners(port)
    if not wanted:
        return None
    for pid in processes:
        # a process, or one of its files, may be gone before it is looked at
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()) in wanted:
                        return True
    return False


def _listeners(port: int) -> set[str]:
    """The sockets that listen on a port, as /proc/PID/fd names them."""
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for row in path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else ():
            fields = row.split()
            # a sandbox may give all sockets the number 0
            if fields[3] == _LISTEN and fields[9] != "0" and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def status(port: int, path: str, limit_s: float) -> int | None:
    """The HTTP status of a GET; None where nobody answers in time."""
    try:
        with _OPENER.open(f"http://{HOST}:{port}{path}", timeout=limit_s) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def ask(port: int, path: str, limit_s: float, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object that answers a GET, or a POST of `body`. NoAnswer where it is anything else."""
    data = None if body is None else json.dumps(body).encode()
    wanted = urllib.request.Request(
        f"http://{HOST}:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    try:
        with _OPENER.open(wanted, timeout=limit_s) as answer:
            said = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        words = " ".join(error.read().decode("utf-8", errors="replace").split())[:300]
        raise NoAnswer(f"{path}: HTTP {error.code} {error.reason}{f': {words}' if words else ''}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(said, dict):
        raise NoAnswer(f"{path}: answered no JSON object")
    return said
