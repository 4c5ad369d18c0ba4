"""Which profilers `--trace` takes, and where. Owns the refusals; profiles nothing (`worker.tracing`)."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping

from smbench.errors import UsageError
from smbench.plan import Plan

TOOLS: Mapping[str, str] = {
    "torch": "torch's profiler, in the engine's own process or by the engine's own command",
    "nsys": "NVIDIA Nsight Systems, around a program of its own for each cell",
}


def require(tool: str | None, plan: Plan) -> None:
    """UsageError for a tool that nobody knows, that is not here, or that has nothing to look at."""
    if tool is None:
        return
    if tool not in TOOLS:
        hint = difflib.get_close_matches(tool, TOOLS, n=1)
        raise UsageError(
            f"--trace {tool}: unknown profiler; known: {', '.join(TOOLS)}"
            + (f"; did you mean {hint[0]!r}?" if hint else "")
        )
    if plan.recipe.kind != "engine":
        raise UsageError(f"--trace {tool}: recipe {plan.recipe.name!r} measures operations; traces are of engines")
    if tool != "nsys":
        return
    if plan.profile.device != "cuda":
        raise UsageError("--trace nsys: it watches a GPU, and this profile runs on the CPU; take --trace torch")
    if shutil.which("nsys") is None:
        raise UsageError("--trace nsys: nsys is not on the PATH: install NVIDIA Nsight Systems, or take --trace torch")
