"""Which kernels an image ships compiled: the points of all recipes, and the cards of the image's arch.

`python -m smbench.baking --arch sm89 --stack kernels` prints them as JSON for `smbench.worker.bake`, which compiles.
Owns the choice and the list's format; does not own configurations, which follow from a point and a card.

The list is `{"format", "arch", "capability", "stack", "devices": [{"name", "sm_count", "l2_bytes"}], "points": {op:
[axes, …]}}`; a card's figure is null where the arch table does not know it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from smbench import recipe, resources
from smbench.arch import ArchTable
from smbench.arch import load as load_archs
from smbench.errors import CorruptError, UsageError
from smbench.identity import canonical_json
from smbench.recipe import Recipe

FORMAT = 1
"""Version of the list's format. History: 1 = first."""


def bake_list(recipes: Iterable[Recipe], archs: ArchTable, arch_name: str, stack: str) -> dict[str, Any]:
    """What an image of an arch and a stack ships compiled; no points where no recipe runs our kernels in that stack.

    Of a recipe count the cells that a GPU runs with a configuration of ours, default or tuned, whatever the profile.
    UsageError for an arch that is unknown or has no compute capability.
    """
    arch = archs.arch.get(arch_name)
    if arch is None:
        raise UsageError(f"unknown arch {arch_name!r}; known: {', '.join(archs.arch)}")
    if arch.compute_capability is None:
        raise UsageError(f"arch {arch_name!r} has no GPU: there is nothing to compile for it")
    major, minor = arch.compute_capability
    return {
        "format": FORMAT,
        "arch": arch_name,
        "capability": 10 * major + minor,
        "stack": stack,
        "devices": [
            {"name": name, "sm_count": device.sm_count, "l2_bytes": device.l2_bytes}
            for name, device in sorted(archs.device.items())
            if device.arch == arch_name
        ],
        "points": _points(recipes, stack),
    }


def _points(recipes: Iterable[Recipe], stack: str) -> dict[str, list[Any]]:
    """The distinct points of operations that run a configuration of ours on a GPU, by operation, in order."""
    found: dict[str, dict[str, Any]] = {}
    for one in recipes:
        if one.kind != "op":
            continue
        for name, profile in one.profile.items():
            if profile.device != "cuda":
                continue
            for cell in one.cells(name):
                row = one.providers[cell.provider]
                ours = row.selection in ("default", "tuned")
                if (
                    ours
                    and (row.stack or one.stack) == stack
                    and not any(rule.matches(cell) for rule in one.unsupported)
                ):
                    found.setdefault(cell.subject, {}).setdefault(canonical_json(dict(cell.axes)), dict(cell.axes))
    return {op: [points[key] for key in sorted(points)] for op, points in sorted(found.items())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the list; exit status 2 for a mistake of the caller."""
    parser = argparse.ArgumentParser(prog="python -m smbench.baking", description=main.__doc__)
    parser.add_argument("--arch", required=True, help="such as sm89")
    parser.add_argument("--stack", required=True, help="such as kernels")
    options = parser.parse_args(arguments)
    try:
        folder = resources.recipes_dir()
        recipes = [recipe.load(recipe.find(name, folder)) for name in recipe.names(folder)]
        found = bake_list(recipes, load_archs(resources.archs_file()), options.arch, options.stack)
    except (UsageError, CorruptError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
