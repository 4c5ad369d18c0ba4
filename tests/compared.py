"""Made-up sides and big run folders, for tests of comparisons. Owns values only: what a test asserts stands there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import small_runs
from smbench import identity, recipe, runfolder
from smbench.cell import AxisValue, Cell
from smbench.compare import Entry, Side
from smbench.result import Environment
from smbench.verdicts import Timing


def cell(hidden_size: int = 128, provider: str = "torch", seed: int = 0, **axes: AxisValue) -> Cell:
    return Cell(
        kind="op",
        subject="bgmv_shrink",
        provider=provider,
        axes={"dtype": "float16", "batch": 1, **axes, "hidden_size": hidden_size},
        seed=seed,
    )


def timing(*runs: Sequence[float], method: str = "graph", l2: str = "cold", metric: str = "duration") -> Timing:
    return Timing(metric, method, l2, tuple(tuple(samples) for samples in runs))


def side(cells: Sequence[Entry | tuple[Cell, Mapping[str, Timing]]], name: str = "a run", **changes: Any) -> Side:
    """A side of cells with their numbers."""
    entries = [entry if isinstance(entry, Entry) else Entry(entry[0], "ok", None, entry[1]) for entry in cells]
    fields: dict[str, Any] = {
        "name": name,
        "kind": "run",
        "recipe": "lora",
        "profile": "full",
        "protocol_version": 1,
        "runs": 1,
        "devices": frozenset({"a card"}),
        "entries": {entry.cell.cell_id: entry for entry in entries},
        "environments": [Environment(environment_id="e", environment={"gpu": {"name": "a card"}})],
    }
    return Side(**(fields | changes))


def simulated(
    rng: np.random.Generator,
    runs: int = 1,
    slowdown: float = 1.0,
    of_the_run: float = 0.005,
    of_the_cell: float = 0.005,
    of_samples: float = 0.0065,
    samples: int = 60,
    memory: float = 0.2,
) -> Side:
    """180 cells with the noise of a machine: a factor for each run, one for each cell in a run, and its samples.

    Standard deviations are relative; `memory` is how much a sample's deviation keeps of the one before.
    """
    of_runs = rng.normal(0, of_the_run, runs)
    entries: list[tuple[Cell, Mapping[str, Timing]]] = []
    for provider in ("a", "b", "c"):
        for batch in (1, 8, 16):
            for size in range(1, 21):
                taken = []
                for offset in of_runs:
                    deviations = rng.normal(0, 1, samples)
                    for i in range(1, samples):
                        deviations[i] = memory * deviations[i - 1] + (1 - memory**2) ** 0.5 * deviations[i]
                    middle = 1e-6 * size * slowdown * np.exp(offset + rng.normal(0, of_the_cell))
                    taken.append((middle * np.exp(of_samples * deviations)).tolist())
                entries.append((cell(128 * size, provider, batch=batch), {"cold": timing(*taken)}))
    return side(entries, runs=runs)


def big_run(folder: Path, cells: int, samples: int, seed: int) -> Path:
    """A run folder with so many timed cells. Written as JSON, since the models would take most of a test's time."""
    text = small_runs.recipe_text(sizes=range(1, cells + 1))
    loaded = recipe.parse(text, "small.toml")
    planned = loaded.cells("cpu")
    runfolder.create(folder, text, loaded.name, "cpu", planned)
    rng = np.random.default_rng(seed)
    noise = 1 + 0.01 * rng.standard_normal((cells, samples))
    template = json.loads(small_runs.timed(planned[0]).model_dump_json())
    facts = {"gpu": {"name": None}, "cpu": {"model": "A processor"}}
    template["environment_id"] = identity.environment_id(facts)
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        file.write(small_runs.environment(template["environment_id"], **facts).model_dump_json() + "\n")
        for i, what in enumerate(planned):
            template["cell_id"], template["cell"] = what.cell_id, what.model_dump()
            template["measurements"][0]["samples_s"] = (1e-6 * (i + 100) * noise[i]).tolist()
            file.write(json.dumps(template) + "\n")
    return folder


def packable(folder: Path) -> Path:
    """A fake run under its environments' true identities, which a bundle is held to."""
    results = folder / "results.jsonl"
    text = results.read_text(encoding="utf-8")
    for environment in runfolder.load(folder).environments:
        true = identity.environment_id(environment.environment)
        text = text.replace(f'"environment_id":"{environment.environment_id}"', f'"environment_id":"{true}"')
    results.write_text(text, encoding="utf-8")
    return folder
