"""What the engines of a recipe are told: one job a cell, from recipe, axes and model. Owns no process and no file.

Refuses before anything is loaded: a model that fits neither card nor context, a chunk that an engine cannot take.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smbench import enginerules, models
from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.models import Model
from smbench.recipe import EngineLimits, Recipe
from smbench.workloads import measures_of, work_of

SHAREGPT = "SHAREGPT=FILE (smbench: --sharegpt FILE)"
"""How the file of dataset `sharegpt` is named."""


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
    # document 002 compares kernels of quantized layers, so a model without any is no model for it
    plain = all("generate" not in grid.ops for grid in recipe.profile[profile_name].grid)
    found = [models.find(spec, plain=plain) for spec in named]
    return {entry.name: entry for entry in found}


def check_sharegpt(recipe: Recipe, cells: Sequence[Cell], file: Path | None) -> None:
    """UsageError for a file of conversations that is not there, or that no cell would read."""
    if file is None:
        return
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UsageError(f"{file}: {what}; {SHAREGPT} takes a JSON file of conversations in the form of ShareGPT")
    if not any(cell.axes.get("dataset") == "sharegpt" for cell in cells):
        raise UsageError(f"{file}: recipe {recipe.name!r} has no cell of dataset sharegpt here; leave {SHAREGPT} out")


def only(found: Mapping[str, Model]) -> str:
    """The name of the one model."""
    (name,) = found
    return name


def jobs_of(
    recipe: Recipe,
    profile_name: str,
    cells: Sequence[Cell],
    found: Mapping[str, Model],
    memory_bytes: int | None,
    sharegpt: Path | None = None,
) -> Mapping[str, EngineJob]:
    """The job of every cell by cell_id; empty for recipes of operations.

    A cell whose engine cannot run it, or cannot hold it in `memory_bytes`, carries the reason. UsageError for an engine
    that nobody knows, a context too long, and a model too large for every cell, with the arithmetic.
    """
    profile = recipe.profile[profile_name]
    if recipe.kind != "engine" or profile.engine is None:
        return {}
    for provider in dict.fromkeys(cell.provider for cell in cells):
        _require_known(recipe, provider)
    jobs = {}
    for name in dict.fromkeys(str(cell.axes["model"]) for cell in cells):
        mine = [cell for cell in cells if cell.axes["model"] == name]
        _check_context(recipe, profile.engine, mine, found[name])
        too_large = _too_large(recipe, profile.engine, mine, found[name], memory_bytes)
        for cell in mine:
            job = _job(recipe, profile_name, profile.engine, cell, found[name], too_large)
            wanted = cell.axes.get("dataset") == "sharegpt" and sharegpt is not None
            file = str(sharegpt.resolve()) if wanted and sharegpt is not None else None
            jobs[cell.cell_id] = replace(job, request={**job.request, "sharegpt": file})
    return jobs


def _named(recipe: Recipe, profile_name: str) -> list[str]:
    grids = recipe.profile[profile_name].grid
    rows = [recipe.values[values] if isinstance(values, str) else values for g in grids for values in [g.axes["model"]]]
    return list(dict.fromkeys(str(value) for row in rows for value in row))


def _job(
    recipe: Recipe, profile_name: str, limits: EngineLimits, cell: Cell, model: Model, too_large: Mapping[str, str]
) -> EngineJob:
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
        "measures": [m.name for m in profile.measure if m.name in measures_of(cell.subject, cell.axes)],
        "expected_kernel": row.kernel,
        "work": {name: work.model_dump() for name, work in work_of(model.facts, cell.axes, cell.subject).items()},
        "compare": limits.reference is not None,
        "is_reference": cell.provider == limits.reference,
    }
    quantized = model.facts.bits is not None
    reasons = list(enginerules.faults(row.engine, profile.device, limits, row, cell, quantized))
    if cell.cell_id in too_large:
        reasons.append(too_large[cell.cell_id])
    return EngineJob(row.engine, request, "; ".join(reasons) or None)


def _require_known(recipe: Recipe, provider: str) -> None:
    engine = recipe.providers[provider].engine
    if engine not in enginerules.ENGINES:
        hint = difflib.get_close_matches(str(engine), enginerules.ENGINES, n=1)
        did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
        raise UsageError(
            f"recipe {recipe.name!r}: providers.{provider}.engine: unknown engine {engine!r}; "
            f"known: {', '.join(enginerules.ENGINES)}{did_you_mean}"
        )


def _check_context(recipe: Recipe, limits: EngineLimits, cells: Sequence[Cell], model: Model) -> None:
    """UsageError where a request is longer than a context, or the context limit than the model's or the cache."""
    facts = model.facts
    longest = max(int(cell.axes["input_len"]) + int(cell.axes["output_len"]) for cell in cells)
    at = f"recipe {recipe.name!r}, model {model.name}"
    for what, length in (("max_model_len", limits.max_model_len), ("the model's context", facts.context)):
        if longest > length:
            raise UsageError(
                f"{at}: a request of {longest} tokens (input_len + output_len) is longer than {what} ({length})"
            )
    if limits.max_model_len > facts.context:
        raise UsageError(f"{at}: max_model_len {limits.max_model_len} is more than the model's context {facts.context}")
    if limits.kv_cache_bytes is not None:
        token = max(facts.kv_token_bytes(str(cell.axes["dtype"])) for cell in cells)
        if limits.kv_cache_bytes < limits.max_model_len * token:
            raise UsageError(
                f"{at}: kv_cache_bytes {limits.kv_cache_bytes} holds {limits.kv_cache_bytes // token} tokens of "
                f"{token} bytes each, and max_model_len is {limits.max_model_len}"
            )


def _too_large(
    recipe: Recipe, limits: EngineLimits, cells: Sequence[Cell], model: Model, memory_bytes: int | None
) -> Mapping[str, str]:
    """Why cells cannot fit the device, by cell_id. UsageError where none of them does."""
    if memory_bytes is None:
        return {}
    needs = {
        cell.cell_id: enginerules.memory(
            str(recipe.providers[cell.provider].engine), limits, model.facts, cell, memory_bytes
        )
        for cell in cells
    }
    if not any(need.fits for need in needs.values()):
        least = min(needs.values(), key=lambda need: need.needed)
        raise UsageError(f"model {model.name} does not fit: {least.arithmetic()}; take a smaller one with MODEL=")
    return {cell_id: f"does not fit: {need.arithmetic()}" for cell_id, need in needs.items() if not need.fits}
