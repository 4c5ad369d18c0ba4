"""Small recipes, plans and records for tests. Owns values only: what a test asserts stands in the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smbench import plan, recipe
from smbench.cell import Cell
from smbench.plan import Plan
from smbench.recipe import Recipe
from smbench.result import Check, Environment, Measurement, Result, Selection, Session, Work
from smbench.stacks import Stacks

REPOSITORY = Path(__file__).resolve().parent.parent
FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
TIME = "2025-01-02T03:04:05.678+00:00"

RECIPE = """\
format = 1
name = "small"
title = "A small experiment"
document = "000"
protocol_version = 1
kind = "op"
stack = "kernels"
seed = 5
template = "lora.md.j2"
baseline = "torch"
headline = "wall"

[values]
sizes = {sizes}

[providers.torch]
title = "torch"
color = "#7f7f7f"
selection = "library"

[providers.ours]
title = "ours"
color = "#1f77b4"
selection = "default"
interpreted = true

[providers.cuda-only]
title = "another's"
color = "#ff7f0e"
selection = "library"
devices = ["cuda"]

[providers.absent]
title = "not installed"
color = "#2ca02c"
selection = "library"
requires = ["no_such_package_anywhere"]

[profile.cpu]
device = "cpu"
providers = {providers}
time_limit_s = {time_limit_s}

[profile.cpu.estimate]
startup_s = 2.0
cell_s = 0.25
source = "made up"

[[profile.cpu.measure]]
name = "wall"
title = "host clock"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 5
window_s = 1.0

[[profile.cpu.grid]]
ops = ["bgmv_shrink"]
[profile.cpu.grid.axes]
hidden_size = "sizes"

[profile.full]
device = "cuda"
providers = ["torch", "ours", "cuda-only"]
verify_only = ["cuda-only"]
time_limit_s = 60.0

[profile.full.estimate]
startup_s = 2.0
cell_s = 0.25
source = "made up"

[[profile.full.measure]]
name = "wall"
title = "events"
method = "event"
l2 = "warm"
calls = 10
warmup = 1
samples = 5
window_s = 1.0

[[profile.full.grid]]
ops = ["bgmv_shrink"]
[profile.full.grid.axes]
hidden_size = "sizes"
"""


class AllInstalled(Stacks):
    """Stacks whose Python can import every package."""

    def missing(self, stack: str, packages: Sequence[str]) -> list[str]:
        return []


def recipe_text(
    sizes: Sequence[int] = (100, 200), providers: Sequence[str] = ("torch",), time_limit_s: float = 60.0
) -> bytes:
    """A recipe over hidden sizes, which decide what the fake worker does."""
    text = RECIPE.replace("{sizes}", repr(list(sizes)))
    return text.replace("{providers}", repr(list(providers))).replace("{time_limit_s}", repr(time_limit_s)).encode()


def small_recipe() -> Recipe:
    return recipe.parse(recipe_text(), "small.toml")


def cpu_plan(
    sizes: Sequence[int] = (100, 200), providers: Sequence[str] = ("torch",), time_limit_s: float = 60.0
) -> Plan:
    text = recipe_text(sizes, providers, time_limit_s)
    return plan.make(recipe.parse(text, "small.toml"), text, None, plan.Here())


def cell(hidden_size: int = 100, provider: str = "torch", **axes: int | str) -> Cell:
    return Cell(kind="op", subject="bgmv_shrink", provider=provider, axes={"hidden_size": hidden_size, **axes}, seed=5)


CHECK = Check(
    passed=True,
    rounds=2,
    relative_error=1e-4,
    relative_bound=1e-2,
    elementwise_error=1e-3,
    elementwise_bound=1e-1,
    reference="float64",
)


def measurement(samples_s: Sequence[float], name: str = "wall", **changes: Any) -> Measurement:
    fields = {"method": "wall", "l2": "none", "calls_per_sample": 1, "warmup_s": (), "busy_s": sum(samples_s)}
    return Measurement.model_validate({"name": name, "samples_s": tuple(samples_s)} | fields | changes)


def timed(what: Cell, samples_s: Sequence[float] = (1e-6, 1e-6, 1e-6), **changes: Any) -> Result:
    """An `ok` result."""
    fields: dict[str, Any] = {
        "status": "ok",
        "environment_id": "e0",
        "check": CHECK,
        "selection": Selection(source="default" if what.provider == "ours" else "library", config={}),
        "work": Work(bytes=1000, flops=2000),
        "measurements": (measurement(samples_s),),
        "started_at": TIME,
    }
    return Result(cell_id=what.cell_id, cell=what, **(fields | changes))


def untimed(what: Cell, status: str, reason: str = "because", **changes: Any) -> Result:
    """A result without a number."""
    fields = {"cell_id": what.cell_id, "cell": what, "status": status, "reason": reason, "started_at": TIME}
    return Result.model_validate(fields | changes)


def environment(environment_id: str = "e0", **facts: Any) -> Environment:
    return Environment(environment_id=environment_id, environment=facts)


def session(wall_s: float = 10.0, worker_start_s: float = 1.0, **changes: Any) -> Session:
    fields = {"started_at": TIME, "wall_s": wall_s, "worker_start_s": worker_start_s, "workers": 1, "results": 1}
    return Session.model_validate(fields | {"ended": "finished"} | changes)
