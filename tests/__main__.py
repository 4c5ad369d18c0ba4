"""All tests: `python tests [pytest arguments]`. Owns which processes they need; does not own what they test.

Triton decides between its compiler and its interpreter when a kernel's module is imported, so one process cannot test
both. Every process runs, whatever became of the one before it; the exit status is the worst.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pytest import ExitCode

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = {
    "tests": (["--ignore=tests/interpreter", "--ignore=tests/compile"], {}),
    "tests/interpreter": ([], {"TRITON_INTERPRET": "1"}),
    "tests/compile": ([], {}),
}
"""Folder to its pytest arguments and its environment."""


def main(arguments: list[str]) -> int:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    worst = 0
    for folder, (own, variables) in PROCESSES.items():
        print(f"== {' '.join([*(f'{key}={value}' for key, value in variables.items()), 'pytest', folder])}", flush=True)
        command = [sys.executable, "-m", "pytest", folder, *own, *arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment | variables, check=False).returncode
        # with a selection of the caller's, one process may well have nothing to do
        if code == ExitCode.NO_TESTS_COLLECTED and arguments:
            code = 0
        # a signal's negative status is worse than any of pytest's
        worst = max(worst, abs(code))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
