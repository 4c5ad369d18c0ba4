"""Recipes: strict TOML in, resolved experiment out. Owns the file format; does not run anything."""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from smbench.cell import AxisValue, Cell
from smbench.errors import CorruptError, UsageError
from smbench.faults import explain
from smbench.workloads import MEASURES, WORKLOADS

FORMAT = 1
"""Version of the recipe format. History: 1 = first."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=60)]
"""A name that a shell, a file system and a table take as it is."""


class Table(BaseModel):
    """Base of every table of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProviderRow(Table):
    """`[providers.<name>]`: what the recipe says of one implementation."""

    title: str
    """How reports and legends call it."""
    color: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
    """Line colour of its plots, `#rrggbb`."""
    requires: list[str] = []
    """Python packages that must be importable where it runs."""
    devices: list[Literal["cuda", "cpu"]] = ["cuda", "cpu"]
    selection: Literal["default", "tuned", "library", "library-tuned"]
    """Where its launch parameters must come from, as a guard demands; `library-tuned`: our tuner's, for a library."""
    interpreted: bool = False
    """A Triton kernel: on a CPU the interpreter runs it, so it can be verified but not timed."""
    stack: Name | None = None
    """The stack that has it, where that is not the recipe's."""
    archs: list[str] | None = None
    """The archs that it exists for; None for all."""
    engine: Name | None = None
    """In recipes of kind `engine`: which driver runs it."""
    settings: dict[str, int | str | bool] = {}
    """What the driver is told beyond the axes of a cell, by smbench's names."""
    kernel: str | None = None
    """The implementation of linear layers that the engine must report; the selection guard holds it to that."""


class MeasureRow(Table):
    """`[[profile.<name>.measure]]`: one way of timing every cell."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    """Also part of file names."""
    title: str
    method: Literal["graph", "event", "wall"]
    l2: Literal["cold", "warm", "none"]
    calls: Annotated[int, Field(ge=1)]
    """Calls in one graph or loop; with a cold L2 the most, since each call needs buffers of its own."""
    replays: Annotated[int, Field(ge=1)] = 1
    """Graph replays or loops that make one sample."""
    warmup: Annotated[int, Field(ge=0)]
    """Samples that come first and are kept but not counted."""
    samples: Annotated[int, Field(ge=1)]
    """Most samples to take."""
    min_samples: Annotated[int, Field(ge=1)] = 1
    window_s: Annotated[float, Field(gt=0)]
    """Once `min_samples` are taken, no new sample starts after this much time."""
    part: Literal["whole", "forward", "backward"] = "whole"
    """The whole call, or one half of it; operations without halves are not timed by a row that names one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.part != "whole" and (self.method == "graph" or self.l2 == "cold" or self.calls * self.replays > 1):
            raise ValueError(
                f"part {self.part!r} is timed call by call: method 'event' or 'wall', l2 not 'cold', calls 1"
            )
        if self.min_samples > self.samples:
            raise ValueError(f"min_samples {self.min_samples} exceeds samples {self.samples}")
        if (self.method == "wall") != (self.l2 == "none"):
            raise ValueError(f"method {self.method!r} cannot have l2 {self.l2!r}: only wall-clock timing has l2 'none'")
        return self


class EngineLimits(Table):
    """`[profile.<name>.engine]`: what all engines of a profile are given alike."""

    max_model_len: Annotated[int, Field(ge=2)]
    """Context limit in tokens."""
    max_num_seqs: Annotated[int, Field(ge=1)]
    """Most requests at a time."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)]
    """Part of the device's memory that an engine may take for weights, cache and work space."""
    kv_cache_bytes: Annotated[int, Field(ge=1)] | None = None
    """Size of the KV cache, where the device's memory does not decide it."""
    reference: Name | None = None
    """Provider whose outputs on the same weights the others are compared with."""


class Unsupported(Table):
    """`[[unsupported]]`: cells that the published document has and no present engine offers."""

    where: dict[str, AxisValue | list[AxisValue]]
    """Axes, or `provider`, with the values that are meant; all of them must match."""
    reason: str

    def matches(self, cell: Cell) -> bool:
        """Whether a cell is meant."""
        known = {"provider": cell.provider, **cell.axes}
        return all(
            known.get(name) in (wanted if isinstance(wanted, list) else [wanted]) for name, wanted in self.where.items()
        )


class Estimate(Table):
    """`[profile.<name>.estimate]`: what the plan's minutes are computed from."""

    startup_s: float
    """One worker: imports, device initialization, timer check."""
    cell_s: float
    """One cell, compilation included, on the machine that `source` names."""
    source: str


def _axis_values(value: Any) -> Any:
    """Explain in one line what a union's validation would say in three."""
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        # True is an int to Python, and no value of an axis
        if not isinstance(entry, int | str) or isinstance(entry, bool):
            raise ValueError(f"an axis takes integers and strings, found {entry!r}")
    return value


def _axis(value: Any) -> Any:
    if not isinstance(value, list | str):
        raise ValueError(f"an axis is a list of values or the name of a list in [values], found {value!r}")
    return _axis_values(value)


class Grid(Table):
    """`[[profile.<name>.grid]]`: the product of axes for some operations."""

    ops: Annotated[list[str], Field(min_length=1)]
    axes: dict[str, Annotated[list[AxisValue] | str, BeforeValidator(_axis)]]
    """Each axis is a list of values, or the name of a list in `[values]`."""
    providers: list[str] | None = None
    """The profile's providers that these points are measured with; None for all."""


class Profile(Table):
    """`[profile.<name>]`: one size of the experiment."""

    device: Literal["cuda", "cpu"]
    providers: Annotated[list[str], Field(min_length=1)]
    verify_only: list[str] = []
    """Providers whose output is checked but not timed in this profile."""
    time_limit_s: Annotated[float, Field(gt=0)]
    """A cell that takes longer is stopped and gets status `timeout`."""
    grid: Annotated[list[Grid], Field(min_length=1)]
    measure: Annotated[list[MeasureRow], Field(min_length=1)]
    estimate: Estimate
    template: str | None = None
    """Template of its report, where that is not the recipe's."""
    engine: EngineLimits | None = None
    """In recipes of kind `engine`, and there it must be."""


class Recipe(Table):
    """A whole recipe file."""

    format: int
    name: Name
    title: str
    document: str
    """Number of the published document that it repeats."""
    protocol_version: Annotated[int, Field(ge=1)]
    """Raised whenever what lies inside a timed interval changes; unlike versions are never compared."""
    kind: Literal["op", "engine"]
    """Whether cells are operations, timed by us, or engines that are asked to serve."""
    stack: str
    """The stack whose Python runs its cells, where a provider names no other."""
    seed: int
    template: str
    baseline: str
    """Provider that speed-ups are relative to."""
    headline: str
    """The measure that summaries and the first plots show."""
    published: list[str] = []
    """Files in `recipes/published/` that the report shows beside the measured numbers."""
    values: dict[str, Annotated[list[AxisValue], Field(min_length=1), BeforeValidator(_axis_values)]] = {}
    """Named lists of axis values."""
    unsupported: list[Unsupported] = []
    providers: Annotated[dict[Name, ProviderRow], Field(min_length=1)]
    profile: Annotated[dict[Name, Profile], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        known_ops = _ops() if self.kind == "op" else WORKLOADS
        for name, profile in self.profile.items():
            at = f"profile.{name}"
            for key in ("providers", "verify_only"):
                for provider in getattr(profile, key):
                    _require(provider, self.providers, f"{at}.{key}", "provider")
            for i, grid in enumerate(profile.grid):
                for op in grid.ops:
                    _require(op, known_ops, f"{at}.grid[{i}].ops", "op" if self.kind == "op" else "workload")
                for provider in grid.providers or ():
                    _require(
                        provider,
                        dict.fromkeys(profile.providers),
                        f"{at}.grid[{i}].providers",
                        "provider of the profile",
                    )
                for axis, values in grid.axes.items():
                    if isinstance(values, str):
                        _require(values, self.values, f"{at}.grid[{i}].axes.{axis}", "list of [values]")
                    elif not values:
                        raise ValueError(f"{at}.grid[{i}].axes.{axis}: an axis needs at least one value")
            names = [measure.name for measure in profile.measure]
            if len(set(names)) != len(names):
                raise ValueError(f"{at}.measure: names repeat: {', '.join(names)}")
            if self.kind == "engine":
                self._engine_profile(profile, at)
        _require(self.baseline, self.providers, "baseline", "provider")
        measures = {measure.name: measure for profile in self.profile.values() for measure in profile.measure}
        _require(self.headline, measures, "headline", "measure")
        return self

    def _engine_profile(self, profile: Profile, at: str) -> None:
        """ValueError for what only a profile of engines must have and be."""
        if profile.engine is None:
            raise ValueError(f"{at}.engine: this table is missing; a recipe of kind 'engine' needs it")
        for provider in profile.providers:
            if self.providers[provider].engine is None:
                raise ValueError(f"providers.{provider}.engine: this key is missing; kind 'engine' needs it")
        if (reference := profile.engine.reference) is not None:
            providers = dict.fromkeys(profile.providers)
            _require(reference, providers, f"{at}.engine.reference", "provider of the profile")
        workloads = dict.fromkeys(workload for grid in profile.grid for workload in grid.ops)
        measures = dict.fromkeys(name for workload in workloads for name in MEASURES[workload])
        for measure in profile.measure:
            _require(measure.name, measures, f"{at}.measure", f"measure of {', '.join(workloads)}")
            if measure.method != "wall":
                raise ValueError(f"{at}.measure: {measure.name}: engines are timed by method 'wall'")
        if len({(measure.warmup, measure.samples) for measure in profile.measure}) > 1:
            raise ValueError(f"{at}.measure: all measures are of the same requests: warmup and samples must be equal")
        for i, grid in enumerate(profile.grid):
            for workload in grid.ops:
                rules = WORKLOADS[workload]
                for axis in rules.keys() ^ grid.axes.keys():
                    what = "is missing" if axis in rules else "is unknown"
                    raise ValueError(f"{at}.grid[{i}].axes: {axis!r} {what}; axes of {workload}: {', '.join(rules)}")
                for axis, values in grid.axes.items():
                    for value in self.values.get(values, []) if isinstance(values, str) else values:
                        if fault := rules[axis].fault(axis, value):
                            raise ValueError(f"{at}.grid[{i}].axes.{axis}: {fault}")
                        most = profile.engine.max_num_seqs
                        if axis == "batch" and int(value) > most:
                            raise ValueError(f"{at}.grid[{i}].axes.batch: {value} exceeds engine.max_num_seqs ({most})")

    def size(self, profile: str) -> int:
        """Most cells that a profile can have, without making one."""
        chosen = self.profile[profile]
        return sum(
            len(chosen.providers if grid.providers is None else grid.providers)
            * len(grid.ops)
            * math.prod(len(self.values[v] if isinstance(v, str) else v) for v in grid.axes.values())
            for grid in chosen.grid
        )

    def cells(self, profile: str, instead: Mapping[str, AxisValue] = MappingProxyType({})) -> list[Cell]:
        """Every cell of a profile: points in the order of the file, the providers of a point side by side.

        `instead` gives axes one value in place of those of the file.
        """
        chosen = self.profile[profile]
        # by content: hashing thousands of cells takes longer than making them
        found: dict[object, Cell] = {}
        for grid in chosen.grid:
            axes = [
                [instead[axis]] if axis in instead else self.values[values] if isinstance(values, str) else values
                for axis, values in grid.axes.items()
            ]
            for op, *values in itertools.product(grid.ops, *axes):
                point = dict(zip(grid.axes, values, strict=True))
                for provider in chosen.providers if grid.providers is None else grid.providers:
                    cell = Cell(kind=self.kind, subject=op, provider=provider, axes=point, seed=self.seed)
                    found.setdefault((provider, cell.point), cell)
        return list(found.values())

    def instead(self, profile: str, cells: Iterable[Cell]) -> Mapping[str, AxisValue]:
        """What the cells of a plan have in place of the file's values: the model that `MODEL=` named, if any."""
        if self.kind != "engine":
            return {}
        # a plan from elsewhere may hold anything
        named = {cell.axes.get("model", "") for cell in cells}
        listed = {cell.axes["model"] for cell in self.cells(profile)}
        return {"model": named.pop()} if len(named) == 1 and not named <= listed else {}


def load(path: Path) -> Recipe:
    """The recipe in a file. UsageError names file, key path and the known keys or values."""
    return parse(path.read_bytes(), path.name)


def parse(text: bytes, name: str) -> Recipe:
    """The recipe in the bytes of a TOML file called `name`."""
    try:
        data = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from error
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CorruptError(f"{name}: format {version} is newer than this smbench reads ({FORMAT}); update smbench")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, Recipe, name))) from error
    return recipe


def find(name: str, folder: Path) -> Path:
    """The file of a recipe by name. UsageError lists the names that exist and the nearest one."""
    known = names(folder)
    if name not in known:
        hint = difflib.get_close_matches(name, known, n=1)
        did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
        raise UsageError(f"unknown recipe {name!r}; known: {', '.join(known) or 'none'}{did_you_mean}")
    return folder / f"{name}.toml"


def names(folder: Path) -> list[str]:
    """Names of all recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def profile_named(recipe: Recipe, name: str) -> Profile:
    """A profile of a recipe. UsageError lists the profiles that exist."""
    if name not in recipe.profile:
        raise UsageError(f"recipe {recipe.name!r} has no profile {name!r}; known: {', '.join(recipe.profile)}")
    return recipe.profile[name]


def _require(name: str, known: Mapping[str, Any], at: str, what: str) -> None:
    if name not in known:
        hint = difflib.get_close_matches(name, known, n=1)
        did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
        raise ValueError(f"{at}: unknown {what} {name!r}; known: {', '.join(known)}{did_you_mean}")


def _ops() -> Mapping[str, str]:
    """The registry of operations; the module imports neither torch nor triton."""
    from smbench_kernels.registry import OPS

    return OPS
