"""`python -m smbench.worker.warden PARENT GRACE_S PROGRAM ARGUMENT…`: a program whose processes all end with it.

A server is a tree of processes in groups of their own making. The warden adopts them all: when its program ends, or
somebody sends the warden SIGTERM, the program gets SIGTERM, so many seconds to shut down, and then everything that
descends from the warden is killed; at once where the warden's parent is gone, even by SIGKILL. If the warden itself is
killed, its program dies with it, and the worker, which adopts orphans too, finds the rest. Owns that tree; knows
nothing of what runs in it.

Its exit code is the program's; 128 + n where the program was ended by signal n, as in a shell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

from smbench.worker.processes import adopt_orphans, die_with_parent, end_descendants

AWAITED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
BY_SIGNAL = 128


def command(program: list[str], grace_s: float) -> list[str]:
    """What to run so that `program` runs below a warden of this process."""
    return [sys.executable, "-m", "smbench.worker.warden", str(os.getpid()), f"{grace_s:g}", *program]


def cause(code: int) -> str:
    """How a program ended, from its warden's exit code."""
    if code < 0 or code > BY_SIGNAL:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(abs(code) % BY_SIGNAL).name}"
    return f"exit code {code}"


def main(arguments: list[str]) -> int:
    """Run a program to its end, or until it shall end."""
    # signals are awaited and never interrupt, so none is lost between looking and waiting
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    parent = int(arguments[0])
    die_with_parent(parent, signal.SIGTERM)
    adopt_orphans()
    mine = os.getpid()

    def unblock() -> None:
        die_with_parent(mine)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)

    try:
        # the warden has one thread, so that code between fork and exec is safe
        process = subprocess.Popen(arguments[2:], start_new_session=True, preexec_fn=unblock)
    except OSError as error:
        sys.stderr.write(f"{arguments[2]}: {error.strerror}\n")
        return 127
    while process.poll() is None:
        if signal.sigwait(AWAITED) != signal.SIGCHLD:
            # whoever comes after a worker that was killed wants the device now
            _shut_down(process, float(arguments[1]) if os.getppid() == parent else 0.0)
    end_descendants()
    return process.returncode if process.returncode >= 0 else BY_SIGNAL - process.returncode


def _shut_down(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask the program and its group to end; kill what has not ended in time."""
    deadline = time.monotonic() + grace_s
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    while process.poll() is None and (left_s := deadline - time.monotonic()) > 0:
        signal.sigtimedwait([signal.SIGCHLD], left_s)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
