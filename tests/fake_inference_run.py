"""Made-up results of the shipped recipe `hstu-inference` by one honest model of time, and faults to put into them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import fake_run
from smbench import recipe
from smbench.cell import AxisValue, Cell
from smbench.recipe import Profile
from smbench.result import Measurement, Result, Selection, Status, Work

PATH = Path(__file__).resolve().parent.parent / "recipes" / "hstu-inference.toml"
RECIPE = recipe.parse(PATH.read_bytes(), PATH.name)
FLOPS_PER_S, BUS_BYTES_PER_S = 400e12, 50e9
HOST_S: Mapping[str, float] = {"recompute": 60e-6, "cache": 200e-6, "cache-graph": 40e-6, "cache-graph-serial": 40e-6}
"""What launching costs each provider."""
STEPS = 7
SPREAD = (0.99, 1.0, 1.0, 1.0, 1.02)
GRAPH = {"GRAPH_BATCH": 8, "GRAPH_ROWS": 4352, "CAPTURE_US": 250_000, "CAPTURE_BYTES": 3 << 20}


def integers(cell: Cell) -> Mapping[str, int]:
    return {name: value for name, value in cell.axes.items() if isinstance(value, int)}


def flops(axes: Mapping[str, int], total: int, new: int) -> int:
    """Linear maps of new rows and candidates, and what they attend to."""
    width = axes["heads"] * axes["head_dim"]
    rows = new + axes["targets"]
    pairs = new * (total - new) + new * (new + 1) // 2 + axes["targets"] * (total + 1)
    return axes["layers"] * axes["batch"] * (10 * rows * axes["embedding"] * width + 4 * width * pairs)


def token_bytes(axes: Mapping[str, int]) -> int:
    return axes["layers"] * 2 * axes["heads"] * axes["head_dim"] * 2


def computed(cell: Cell) -> int:
    """New tokens of what is really computed."""
    return integers(cell)["total" if cell.provider == "recompute" or cell.axes["source"] == "nowhere" else "new"]


def work(cell: Cell) -> Work:
    """The least, as the operations define it."""
    if cell.subject == "hstu_bookkeeping":
        return Work(bytes=4096, flops=0)
    axes = integers(cell)
    new = axes["total"] if cell.axes["source"] == "nowhere" else axes["new"]
    return Work(bytes=token_bytes(axes) * axes["batch"] * axes["total"], flops=flops(axes, axes["total"], new))


def seconds(cell: Cell) -> float:
    """By operations, launches, and the bus where the cache is on the host."""
    if cell.subject == "hstu_bookkeeping":
        return 50e-6
    axes = integers(cell)
    compute = HOST_S[cell.provider] + flops(axes, axes["total"], computed(cell)) / FLOPS_PER_S
    if cell.axes["source"] != "host":
        return compute
    copies = onload_bytes(cell) / BUS_BYTES_PER_S
    return compute + copies if cell.provider.endswith("serial") else 1.1 * max(compute, copies)


def onload_bytes(cell: Cell) -> int:
    axes = integers(cell)
    return token_bytes(axes) * axes["batch"] * (axes["total"] - axes["new"])


def counts(cell: Cell) -> dict[str, int]:
    """What STEPS honest steps meet."""
    if cell.subject == "hstu_bookkeeping":
        return {}
    axes = integers(cell)
    history = STEPS * axes["batch"] * axes["total"]
    cached = STEPS * axes["batch"] * (axes["total"] - computed(cell))
    host = cell.axes["source"] == "host"
    found = {"steps": STEPS, "attended_tokens": history, "new_tokens": history - cached}
    found["host_tokens" if host else "device_tokens"] = cached
    if host:
        moved = STEPS * onload_bytes(cell)
        found |= {"onloaded_bytes": moved, "onload_ns": round(moved / BUS_BYTES_PER_S * 1e9), "evicted_users": STEPS}
        found |= {"offloaded_bytes": moved // 4, "offload_ns": round(moved / BUS_BYTES_PER_S * 1e9 / 2)}
    return found


def result(cell: Cell, status: Status, reason: str | None = None, measurements: tuple[Measurement, ...] = ()) -> Result:
    """As `fake_run.result`, with the work of these operations."""
    patch = pytest.MonkeyPatch()
    patch.setattr(fake_run, "work", work)
    try:
        return fake_run.result(cell, status, reason, measurements)
    finally:
        patch.undo()


def timed(cell: Cell, profile: Profile, taken_s: float | None = None, spread: tuple[float, ...] = SPREAD) -> Result:
    """A timed cell; `taken_s` is its median where it is not the model's."""
    median = seconds(cell) if taken_s is None else taken_s
    measurements = tuple(
        Measurement(
            name=measure.name,
            method=measure.method,
            l2=measure.l2,
            calls_per_sample=1,
            warmup_s=(),
            samples_s=tuple(median * factor for factor in spread),
            busy_s=0.01,
        )
        for measure in profile.measure
    )
    found = result(cell, "ok", measurements=measurements)
    config = GRAPH if "graph" in cell.provider else {}
    changes = {"counts": counts(cell), "work": work(cell), "selection": Selection(source="default", config=config)}
    return found.model_copy(update=changes)


def on_a_card(cell: Cell, profile: Profile) -> Result | None:
    """Large steps meet the card's power limit."""
    found = timed(cell, profile)
    if found and cell.subject == "hstu_block" and cell.axes["batch"] == 8:
        return found.model_copy(update={"telemetry": {**found.telemetry, "throttle_reasons": ["idle", "sw_power_cap"]}})
    return found


def on_a_processor(cell: Cell, profile: Profile) -> Result | None:
    if "graph" in cell.provider:
        return result(cell, "unsupported", "needs a device of kind cuda, this profile runs on cpu")
    return timed(cell, profile)


def ignoring_the_cache(cell: Cell, profile: Profile) -> Result | None:
    """The published fault: a step attends to its new tokens alone."""
    if cell.subject == "hstu_bookkeeping" or cell.provider == "recompute":
        return timed(cell, profile)
    axes = integers(cell)
    new = computed(cell)
    return timed(cell, profile, HOST_S[cell.provider] + flops(axes, new, new) / FLOPS_PER_S)


def block_cell(provider: str, batch: AxisValue, total: AxisValue, new: AxisValue) -> Cell | None:
    """The full profile's cell of the block in the document's sizes."""
    wanted = {"batch": batch, "total": total, "new": new, "targets": 256, "source": "device", "page_size": 32}
    return next(
        (
            cell
            for cell in RECIPE.cells("full")
            if (cell.subject, cell.provider, cell.axes.get("heads")) == ("hstu_block", provider, 4)
            and all(cell.axes[name] == value for name, value in wanted.items())
        ),
        None,
    )
