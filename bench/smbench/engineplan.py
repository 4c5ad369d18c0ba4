"""What the engines of a recipe are told: one job a cell, from recipe, axes and model. Owns no process and no file.

Refuses before anything is loaded: a model that fits neither card nor context, a chunk that an engine cannot take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smbench import models
from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.models import Model
from smbench.recipe import EngineLimits, Recipe
from smbench.workloads import work_of


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What a worker gets of a cell beyond the cell itself."""

    engine: str
    """The driver."""
    request: Mapping[str, Any]
    """JSON: settings, limits, model, requests, expected kernel, least work by measure."""
    unsupported: str | None = None
    """Why the engine cannot run the cell."""


def models_of(recipe: Recipe, profile_name: str, model: str | None) -> Mapping[str, Model]:
    """The models that a profile needs, or the one that stands for all of them, by their names in cells.

    Empty for recipes of operations. UsageError for a model that is not there or not fit.
    """
    if recipe.kind != "engine":
        return {}
    named = [model] if model is not None else _named(recipe, profile_name)
    found = [models.find(spec) for spec in named]
    return {entry.name: entry for entry in found}


def only(found: Mapping[str, Model]) -> str:
    """The name of the one model."""
    (name,) = found
    return name


def jobs_of(
    recipe: Recipe, profile_name: str, cells: Sequence[Cell], found: Mapping[str, Model], memory_bytes: int | None
) -> Mapping[str, EngineJob]:
    """The job of every cell by cell_id; empty for recipes of operations.

    UsageError, with the arithmetic, when a model cannot fit the device or the context.
    """
    profile = recipe.profile[profile_name]
    if recipe.kind != "engine" or profile.engine is None:
        return {}
    limits = profile.engine
    for name in dict.fromkeys(str(cell.axes["model"]) for cell in cells):
        _check_fit(recipe, limits, [c for c in cells if c.axes["model"] == name], found[name], memory_bytes)
    return {cell.cell_id: _job(recipe, profile_name, limits, cell, found[str(cell.axes["model"])]) for cell in cells}


def _named(recipe: Recipe, profile_name: str) -> list[str]:
    grids = recipe.profile[profile_name].grid
    rows = [recipe.values[values] if isinstance(values, str) else values for g in grids for values in [g.axes["model"]]]
    return list(dict.fromkeys(str(value) for row in rows for value in row))


def _job(recipe: Recipe, profile_name: str, limits: EngineLimits, cell: Cell, model: Model) -> EngineJob:
    profile = recipe.profile[profile_name]
    row = recipe.providers[cell.provider]
    assert row.engine is not None
    measure = profile.measure[0]
    request = {
        "engine": row.engine,
        "device": profile.device,
        "settings": dict(row.settings),
        "limits": limits.model_dump(exclude={"reference"}),
        "model": {"name": model.name, "path": str(model.path), "vocabulary": model.facts.vocabulary},
        "requests": {"warmup": measure.warmup, "samples": measure.samples},
        "measures": [entry.name for entry in profile.measure],
        "expected_kernel": row.kernel,
        "work": {name: work.model_dump() for name, work in work_of(model.facts, cell.axes).items()},
        "compare": limits.reference is not None,
        "is_reference": cell.provider == limits.reference,
    }
    return EngineJob(row.engine, request, next(iter(_engine_faults(row.engine, limits, cell)), None))


def _engine_faults(engine: str, limits: EngineLimits, cell: Cell) -> list[str]:
    """What the engine cannot do of this cell, from its own documented rules."""
    chunk = int(cell.axes["chunk_tokens"])
    faults = []
    if engine == "vllm" and chunk < limits.max_num_seqs:
        faults.append(f"vLLM needs max_num_batched_tokens ({chunk}) of at least max_num_seqs ({limits.max_num_seqs})")
    if engine == "vllm" and cell.axes["scheduling"] == "whole" and chunk < limits.max_model_len:
        faults.append(f"whole prompts need max_num_batched_tokens ({chunk}) of max_model_len ({limits.max_model_len})")
    return faults


def _check_fit(
    recipe: Recipe, limits: EngineLimits, cells: Sequence[Cell], model: Model, memory_bytes: int | None
) -> None:
    """UsageError where the model, its cache or its context cannot fit, with the arithmetic."""
    facts = model.facts
    longest = max(int(cell.axes["input_len"]) + int(cell.axes["output_len"]) for cell in cells)
    for what, length in (("max_model_len", limits.max_model_len), ("the model's context", facts.context)):
        if longest > length:
            raise UsageError(
                f"recipe {recipe.name!r}, model {model.name}: a request of {longest} tokens (input_len + output_len) "
                f"is longer than {what} ({length})"
            )
    if limits.max_model_len > facts.context:
        raise UsageError(
            f"recipe {recipe.name!r}: max_model_len {limits.max_model_len} is more than the context of {model.name} "
            f"({facts.context})"
        )
    if memory_bytes is None:
        return
    dtype = str(cells[0].axes["dtype"])
    weights, cache = facts.resident_bytes(dtype), longest * facts.kv_token_bytes(dtype)
    available = memory_bytes * limits.memory_fraction
    if weights + cache > available:
        raise UsageError(
            f"model {model.name} does not fit: weights {weights / 1e9:.1f} GB + KV cache of one request of {longest} "
            f"tokens {cache / 1e9:.1f} GB = {(weights + cache) / 1e9:.1f} GB, and {limits.memory_fraction:.0%} of this "
            f"device's {memory_bytes / 1e9:.1f} GB is {available / 1e9:.1f} GB; take a smaller one with MODEL="
        )
