"""What a run will do: cells, where each runs, how long it should take, what cannot run here and why. Runs nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.recipe import Profile, ProviderRow, Recipe, profile_named

INTERPRETED = "checked under the Triton interpreter, which has no meaningful time: verified, not timed"
VERIFY_ONLY = "this profile checks the provider and does not time it"


@dataclass(frozen=True, slots=True)
class Planned:
    """One cell and what becomes of it."""

    cell: Cell
    stack: str
    unsupported: str | None
    """Why it cannot run here; None where it can."""
    untimed: str | None
    """Why it is verified and not timed; None where it is timed."""
    interpreted: bool
    """It runs under the Triton interpreter, in a worker of its own."""

    @property
    def group(self) -> tuple[str, bool]:
        """Cells of one group share worker processes."""
        return self.stack, self.interpreted


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved profile of a recipe."""

    recipe: Recipe
    recipe_text: bytes
    """The file as it is, so that the run folder's copy loads again."""
    profile_name: str
    entries: Sequence[Planned]

    @property
    def profile(self) -> Profile:
        """The chosen profile."""
        return self.recipe.profile[self.profile_name]

    def estimate_s(self, done: Collection[str] = ()) -> float:
        """Seconds that the cells not in `done` should take, by the recipe's measured cost of a cell."""
        left = [entry for entry in self.entries if not entry.unsupported and entry.cell.cell_id not in done]
        estimate = self.profile.estimate
        return len({entry.group for entry in left}) * estimate.startup_s + len(left) * estimate.cell_s


def make(
    recipe: Recipe,
    recipe_text: bytes,
    profile_name: str | None,
    gpu_present: bool,
    providers: Sequence[str] = (),
    is_installed: Callable[[str], bool] | None = None,
) -> Plan:
    """Resolve a profile. Without a name the machine decides: a GPU gets `full`, none gets `cpu`.

    `providers` narrows the profile's own list. UsageError names what is unknown, and a profile this machine cannot run.
    """
    name = profile_name or ("full" if gpu_present else "cpu")
    profile = profile_named(recipe, name)
    if profile.device == "cuda" and not gpu_present:
        raise UsageError(
            f"profile {name!r} of recipe {recipe.name!r} needs an NVIDIA GPU and none is visible; "
            f"run PROFILE=cpu, or see `smbench doctor`"
        )
    for provider in providers:
        if provider not in profile.providers:
            raise UsageError(
                f"unknown provider {provider!r} in profile {name!r}; known: {', '.join(profile.providers)}"
            )
    find = is_installed or _is_installed
    entries = [
        _planned(cell, recipe, profile, find)
        for cell in recipe.cells(name)
        if not providers or cell.provider in providers
    ]
    return Plan(recipe, recipe_text, name, entries)


def default_folder(plan: Plan, device_name: str | None, root: Path) -> Path:
    """`runs/<recipe>-<device>`, with the profile where it is not the machine's own choice."""
    device = slug(device_name) if plan.profile.device == "cuda" and device_name else "cpu"
    suffix = "" if plan.profile_name in ("full", "cpu") else f"-{plan.profile_name}"
    return root / "runs" / f"{plan.recipe.name}-{device}{suffix}"


def slug(device_name: str) -> str:
    """A device's name as part of a file name: `NVIDIA GeForce RTX 4090` is `rtx-4090`."""
    words = "".join(c if c.isalnum() else " " for c in device_name.lower()).split()
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "gpu"


def _planned(cell: Cell, recipe: Recipe, profile: Profile, find: Callable[[str], bool]) -> Planned:
    row = recipe.providers[cell.provider]
    interpreted = profile.device == "cpu" and row.interpreted
    untimed = INTERPRETED if interpreted else VERIFY_ONLY if cell.provider in profile.verify_only else None
    unsupported = next(_obstacles(row, profile, find), None)
    return Planned(cell, recipe.stack, unsupported, untimed, interpreted)


def _obstacles(row: ProviderRow, profile: Profile, find: Callable[[str], bool]) -> Iterator[str]:
    if profile.device not in row.devices:
        yield f"needs a device of kind {' or '.join(row.devices)}, this profile runs on {profile.device}"
    for package in row.requires:
        if not find(package):
            yield f"the Python package {package!r} is not installed here"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
