"""What a run will do: cells, where each runs, how long it should take, what cannot run here and why. Runs nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smbench import engineplan, stacks
from smbench.cell import Cell
from smbench.engineplan import EngineJob
from smbench.errors import UsageError
from smbench.models import Model
from smbench.recipe import Profile, ProviderRow, Recipe, profile_named
from smbench.stacks import Stacks
from smbench.workloads import gpus_of

INTERPRETED = "checked under the Triton interpreter, which has no meaningful time: verified, not timed"
VERIFY_ONLY = "this profile checks the provider and does not time it"


@dataclass(frozen=True, slots=True)
class Here:
    """The machine that a plan is made for."""

    device_name: str | None = None
    """None without a GPU."""
    arch: str | None = None
    """None without a GPU, or for one whose compute capability is unknown."""
    memory_bytes: int | None = None
    """Of the GPU, or of the machine without one; None where unknown."""
    stacks: Stacks = stacks.NONE
    gpus: int = 1
    """Cards that a worker would see, where there is one."""

    @property
    def gpu_present(self) -> bool:
        """Whether there is a GPU."""
        return self.device_name is not None


@dataclass(frozen=True, slots=True)
class Planned:
    """One cell and what becomes of it."""

    cell: Cell
    stack: str
    unsupported: str | None
    """Why it cannot run on such a machine; None where it can."""
    untimed: str | None
    """Why it is verified and not timed; None where it is timed."""
    interpreted: bool
    """It runs under the Triton interpreter, in a worker of its own."""
    skipped: str | None = None
    """Why it does not run this time although it could: its stack is not here."""
    python: Path = stacks.OWN
    """What runs its worker."""
    job: EngineJob | None = None
    """What its engine is told; None for operations."""

    @property
    def group(self) -> tuple[str, bool, str]:
        """Cells of one group share worker processes: one Python, one mode, one engine."""
        return str(self.python), self.interpreted, self.job.engine if self.job else ""

    @property
    def runs(self) -> bool:
        """Whether a worker gets it."""
        return self.unsupported is None and self.skipped is None


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved profile of a recipe."""

    recipe: Recipe
    recipe_text: bytes
    """The file as it is, so that the run folder's copy loads again."""
    profile_name: str
    entries: Sequence[Planned]
    models: Mapping[str, Model] = field(default_factory=dict)
    """The models that engines load, by their names in cells."""

    @property
    def profile(self) -> Profile:
        """The chosen profile."""
        return self.recipe.profile[self.profile_name]

    def estimate_s(self, done: Collection[str] = ()) -> float:
        """Seconds that the cells not in `done` should take, by the recipe's measured cost of a cell."""
        left = [entry for entry in self.entries if entry.runs and entry.cell.cell_id not in done]
        estimate = self.profile.estimate
        return len({entry.group for entry in left}) * estimate.startup_s + len(left) * estimate.cell_s


def make(
    recipe: Recipe,
    recipe_text: bytes,
    profile_name: str | None,
    here: Here,
    providers: Sequence[str] = (),
    model: str | None = None,
    sharegpt: Path | None = None,
) -> Plan:
    """Resolve a profile. Without a name the machine decides: a GPU gets `full`, none gets `cpu`.

    `providers` narrows the profile's own list; `model` stands for every model of an engine recipe; `sharegpt` is the
    file of dataset `sharegpt`. UsageError names what is unknown, a profile this machine cannot run, a model that is not
    fit for the recipe, and a file that is not there.
    """
    name = profile_name or ("full" if here.gpu_present else "cpu")
    profile = profile_named(recipe, name)
    if profile.device == "cuda" and not here.gpu_present:
        raise UsageError(
            f"profile {name!r} of recipe {recipe.name!r} needs an NVIDIA GPU and none is visible; "
            f"run PROFILE=cpu, or see `smbench doctor`"
        )
    for provider in providers:
        if provider not in profile.providers:
            raise UsageError(
                f"unknown provider {provider!r} in profile {name!r}; known: {', '.join(profile.providers)}"
            )
    if model is not None and recipe.kind != "engine":
        raise UsageError(f"recipe {recipe.name!r} has no model to choose: MODEL= is for recipes that run engines")
    models = engineplan.models_of(recipe, name, model)
    cells = [
        cell
        for cell in recipe.cells(name, {"model": engineplan.only(models)} if model is not None else {})
        if not providers or cell.provider in providers
    ]
    engineplan.check_sharegpt(recipe, cells, sharegpt)
    jobs = engineplan.jobs_of(recipe, name, cells, models, here.memory_bytes, sharegpt)
    entries = [_planned(cell, recipe, profile, here, jobs.get(cell.cell_id)) for cell in cells]
    return Plan(recipe, recipe_text, name, entries, models)


def default_folder(plan: Plan, device_name: str | None, root: Path) -> Path:
    """`runs/<recipe>-<device>`, with the profile where it is not the machine's own choice."""
    device = slug(device_name) if plan.profile.device == "cuda" and device_name else "cpu"
    suffix = "" if plan.profile_name in ("full", "cpu") else f"-{plan.profile_name}"
    return root / "runs" / f"{plan.recipe.name}-{device}{suffix}"


def slug(device_name: str) -> str:
    """A device's name as part of a file name: `NVIDIA GeForce RTX 4090` is `rtx-4090`."""
    words = "".join(c if c.isalnum() else " " for c in device_name.lower()).split()
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "gpu"


def _planned(cell: Cell, recipe: Recipe, profile: Profile, here: Here, job: EngineJob | None) -> Planned:
    row = recipe.providers[cell.provider]
    stack = row.stack or recipe.stack
    interpreted = profile.device == "cpu" and row.interpreted
    untimed = INTERPRETED if interpreted else VERIFY_ONLY if cell.provider in profile.verify_only else None
    unsupported = next(_obstacles(cell, recipe, profile, here, job), None)
    skipped = next(_missing(cell, recipe, profile, here, job), None) if unsupported is None else None
    return Planned(cell, stack, unsupported, untimed, interpreted, skipped, here.stacks.python(stack), job)


def _obstacles(cell: Cell, recipe: Recipe, profile: Profile, here: Here, job: EngineJob | None) -> Iterator[str]:
    """Why a cell cannot run on such a machine at all."""
    row: ProviderRow = recipe.providers[cell.provider]
    if profile.device not in row.devices:
        yield f"needs a device of kind {' or '.join(row.devices)}, this profile runs on {profile.device}"
    if row.archs is not None and here.arch is not None and here.arch not in row.archs:
        yield f"needs {' or '.join(row.archs)}, this device is {here.arch}"
    yield from (rule.reason for rule in recipe.unsupported if rule.matches(cell))
    if job is not None and job.unsupported is not None:
        yield job.unsupported
    if not _has_own_stack(recipe, row) and not here.stacks.lacks(recipe.stack):
        for package in here.stacks.missing(recipe.stack, row.requires):
            yield f"the Python package {package!r} is not installed here"


def _missing(cell: Cell, recipe: Recipe, profile: Profile, here: Here, job: EngineJob | None) -> Iterator[str]:
    """What a cell needs that is not here, and may be another time or elsewhere."""
    row = recipe.providers[cell.provider]
    stack = row.stack or recipe.stack
    if job is not None and profile.device == "cuda" and gpus_of(cell.axes) > here.gpus:
        cards = "1 GPU" if here.gpus == 1 else f"{here.gpus} GPUs"
        yield (
            f"tensor_parallel = {gpus_of(cell.axes)} needs as many GPUs, and this machine has {cards}; the same "
            "command on one that has them completes this folder"
        )
    if cell.axes.get("dataset") == "sharegpt" and job is not None and job.request["sharegpt"] is None:
        yield f"dataset sharegpt is your own file, and nothing is downloaded: give it with {engineplan.SHAREGPT}"
    if _is_absent(stack, recipe, row, here.stacks):
        yield f"stack {stack!r} is not here; {here.stacks.advice(stack)}"


def _is_absent(stack: str, recipe: Recipe, row: ProviderRow, stacks: Stacks) -> bool:
    """Whether the stack of a provider is not here, and could be elsewhere."""
    return stacks.lacks(stack) or (_has_own_stack(recipe, row) and bool(stacks.missing(stack, row.requires)))


def _has_own_stack(recipe: Recipe, row: ProviderRow) -> bool:
    """Whether a provider comes in an environment that could be here another time: engines always do."""
    return recipe.kind == "engine" or row.stack is not None
