"""Makes the stack that a recipe cannot do without, before it runs in place from a checkout. Owns only when that is due.

What a stack is and how it is installed is bench/setup_stack.py's to know. Stacks that are merely compared with are left
to the user: an engine is gigabytes.
"""

from __future__ import annotations

import subprocess
import sys

from smbench.errors import UsageError
from smbench.plan import Plan
from smbench.resources import REPOSITORY
from smbench.stacks import Stacks

SETUP = REPOSITORY / "bench" / "setup_stack.py"


def missing_stack(plan: Plan, stacks: Stacks) -> str | None:
    """The recipe's own stack, where a cell that could run on this machine lacks it; None where all is there."""
    if plan.recipe.kind != "engine" or stacks.complete:
        return None
    lacking = (
        entry
        for entry in plan.entries
        if entry.unsupported is None
        and entry.stack == plan.recipe.stack
        and stacks.missing(entry.stack, plan.recipe.providers[entry.cell.provider].requires)
    )
    return next((entry.stack for entry in lacking), None)


def command(stack: str) -> list[str] | None:
    """What makes a stack beside this checkout; None where smbench is installed and has none."""
    # the set-up reads its own folder only: what is installed in this environment must not decide
    return [sys.executable, "-E", "-s", "-S", "-B", str(SETUP), stack] if SETUP.exists() else None


def make(stack: str) -> None:
    """Run the set-up of a stack. UsageError where it fails; what failed is on the terminal already."""
    asked = command(stack)
    if asked is not None and subprocess.run(asked, check=False).returncode != 0:
        raise UsageError(
            f"stack {stack!r} could not be made; the cause is above; `make stack STACK={stack}` tries again"
        )
