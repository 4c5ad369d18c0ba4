"""Which Python runs a stack here. Owns where stacks lie; what is installed in them is docker/locks' to say.

An image has one virtual environment per stack in a folder that `SMBENCH_STACKS` names. A checkout has them in
`.stacks/` (`make stack STACK=…`). A rented machine may have an engine in the very Python that runs smbench. They are
looked at in this order.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smbench.resources import REPOSITORY

OWN = Path(sys.executable)
PROBE_LIMIT_S = 60.0
_PROBE = (
    "import importlib.util, json, sys; "
    "print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))"
)


@dataclass(frozen=True, slots=True)
class Stacks:
    """Where to look for stacks."""

    folders: Sequence[Path]
    """Each holds `<stack>/bin/python`."""
    own: Path = OWN
    """The Python of a stack that has no folder."""
    complete: bool = False
    """Whether a stack without a folder is not here at all: so in an image, whose own Python has no torch."""

    def python(self, stack: str) -> Path:
        """The Python that runs a stack: its own environment where there is one, else this very Python."""
        places = (folder / stack / "bin" / "python" for folder in self.folders)
        return next((place for place in places if place.exists()), self.own)

    def lacks(self, stack: str) -> bool:
        """Whether the stack is surely not here, whatever is installed."""
        return self.complete and self.python(stack) == self.own

    def missing(self, stack: str, packages: Sequence[str]) -> list[str]:
        """Those of the packages that the stack's Python cannot import."""
        return list(_missing(self.python(stack), tuple(packages))) if packages else []

    def advice(self, stack: str) -> str:
        """What to do about a stack that is not here."""
        if os.environ.get("SMBENCH_STACKS"):
            return f"run the same command in an image of stack {stack!r} on the same folder"
        return f"make stack STACK={stack} installs it beside this checkout; an image of it can complete the same folder"


NONE = Stacks(())
"""No stack has an environment of its own."""


def here() -> Stacks:
    """The stacks of this machine."""
    named = os.environ.get("SMBENCH_STACKS")
    return Stacks([Path(named)], complete=True) if named else Stacks([REPOSITORY / ".stacks"])


@functools.cache
def _missing(python: Path, packages: tuple[str, ...]) -> tuple[str, ...]:
    # asked of the stack's own Python, without importing anything: an engine takes many seconds
    done = subprocess.run(
        [python, "-c", _PROBE, *packages], capture_output=True, text=True, check=False, timeout=PROBE_LIMIT_S
    )
    if done.returncode != 0:
        return packages
    found: list[str] = json.loads(done.stdout)
    return tuple(found)
