"""Processes of a worker, by the means of Linux: dying with the parent, adopting orphans, ending what is left.

Owns system calls and /proc. Does not own what runs in a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from smbench import machine

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int, word: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to end this process when `parent` ends, even by SIGKILL: an orphan would disturb the next run.

    `word` is what it is sent; another than SIGKILL lets it end its own children first.
    """
    _prctl(_PR_SET_PDEATHSIG, word)
    if os.getppid() != parent:
        sys.exit("the parent process has gone")


def adopt_orphans() -> None:
    """From now on a descendant whose parent ends becomes a child of this process, so that it can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(limit_s: float = 10.0) -> int:
    """Kill and reap every process that descends from this one; how many there were. TimeoutError where some remain."""
    deadline = time.monotonic() + limit_s
    ended: set[int] = set()
    while found := descendants(os.getpid()):
        for pid in found:
            ended.add(pid)
            # it may be gone already
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(found)} do not end")
        time.sleep(0.01)
    return len(ended)


def descendants(ancestor: int) -> list[int]:
    """Process ids below one process, zombies included."""
    children: dict[int, list[int]] = {}
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        if (parent := machine.parent_process(pid)) is not None:
            children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kernel_memory_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since it booted; None where it does not say."""
    try:
        rows = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts = [int(row.split()[1]) for row in rows if row.startswith("oom_kill ")]
    return counts[0] if counts else None


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
