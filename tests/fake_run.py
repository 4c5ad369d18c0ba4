"""Run folders with exact, made-up numbers, for tests of what is rendered from them. No torch and no worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smbench import recipe, runfolder
from smbench.cell import AxisValue, Cell
from smbench.recipe import MeasureRow, Profile
from smbench.result import Check, Environment, Measurement, Result, Selection, Session, Status, Work

MEMORY_BYTES_PER_S = 4.8e12
STARTED_AT = "2026-01-02T03:04:05Z"

HOSTILE = (
    "a|b <script>alert(1)</script> `x` **bold** ![i](http://x/y.png) [l](javascript:1)\n"
    "# not a heading\n| not | a row | $x^2$ \u202e {{ 7 * 7 }}"
)
"""What an error message or a device name could hold."""

GPU: Mapping[str, Any] = {
    "format": 1,
    "gpu": {
        "name": "NVIDIA H200",
        "l2_bytes": 62914560,
        "power_limit_w": 700.0,
        "sm_clock_max_hz": 1980e6,
        "ecc": True,
    },
    "runtime": {"cuda": "13.0", "cudnn": None},
    "cpu": {"model": "A processor", "cores_usable": 16},
    "libraries": {"torch": "2.11.0", "triton": "3.6.0", "vllm": "0.26.0", "sglang": "0.5.23"},
    "source": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "missing": ["runtime.cudnn: torch does not tell"],
}
CPU: Mapping[str, Any] = {
    "format": 1,
    "gpu": {},
    "cpu": {"model": "A processor", "cores_usable": 2},
    "libraries": {"torch": "2.13.0", "triton": "3.7.1"},
    "source": {"commit": None, "dirty": None},
    "missing": ["source: not a git checkout"],
}

PROVIDER_COST = {"torch": 2.4, "smbench": 1.35, "smbench-tuned": 1.1, "vllm": 1.6, "sglang": 1.45}
"""Time of each provider relative to its point's physical bound; launch cost comes on top."""


def build(
    folder: Path,
    recipe_text: bytes,
    profile: str,
    outcome: Callable[[Cell, Profile], Result | None],
    environments: Sequence[Mapping[str, Any]] = (GPU,),
    sessions: Sequence[Session] | None = None,
) -> Path:
    """Write a run folder; `outcome` gives each cell's result, None for a cell that was not reached."""
    loaded = recipe.parse(recipe_text, "lora.toml")
    cells = loaded.cells(profile)
    runfolder.create(folder, recipe_text, loaded.name, profile, cells)
    found = [result for cell in cells if (result := outcome(cell, loaded.profile[profile]))]
    records = [
        *(Environment(environment_id=str(i), environment=dict(facts)) for i, facts in enumerate(environments)),
        *found,
        *(session(len(found)) if sessions is None else sessions),
    ]
    lines = "".join(record.model_dump_json() + "\n" for record in records)
    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    return folder


def session(results: int) -> tuple[Session, ...]:
    """One session that measured everything."""
    return (
        Session(started_at=STARTED_AT, wall_s=100.0, worker_start_s=5.0, workers=1, results=results, ended="finished"),
    )


def work(cell: Cell) -> Work:
    """Bytes and operations of a LoRA point, every adapter in use."""
    axes = {name: int(value) for name, value in cell.axes.items() if isinstance(value, int)}
    tokens, rank, hidden = axes["batch"] * axes["seq_len"], axes["rank"], axes["hidden_size"]
    weights = min(axes["batch"], axes["num_loras"]) * rank * hidden * 2
    shrink = cell.subject.endswith("shrink")
    moved = tokens * (hidden * 2 + rank * 8 if shrink else rank * 4 + hidden * 4)
    return Work(bytes=weights + moved, flops=2 * tokens * rank * hidden)


def seconds(cell: Cell, measure: MeasureRow) -> float:
    """A plausible time: launch cost plus a multiple of the physical bound, less from a warm cache."""
    bound = work(cell).bytes / MEMORY_BYTES_PER_S
    slowness = 12.0 if measure.l2 == "none" else 0.7 if measure.l2 == "warm" else 1.0
    launch = 8e-6 if cell.provider == "torch" else 2e-6
    # eager kernels win at small sizes and lose at large ones, so that the ratios cross 1
    grown = 1.0 + (0.3 if cell.provider == "sglang" and bound > 2e-5 else 0.0)
    return slowness * (launch + PROVIDER_COST[cell.provider] * grown * bound)


def ok(cell: Cell, profile: Profile, sources: Mapping[str, str] | None = None) -> Result:
    """A timed cell with a small, exact spread."""
    return result(
        cell,
        "ok",
        measurements=tuple(
            Measurement(
                name=measure.name,
                method=measure.method,
                l2=measure.l2,
                calls_per_sample=measure.calls * measure.replays,
                warmup_s=(2 * seconds(cell, measure),) * measure.warmup,
                samples_s=tuple(seconds(cell, measure) * (1 + 0.004 * (i % 5 - 2)) for i in range(measure.min_samples)),
                busy_s=0.01,
            )
            for measure in profile.measure
        ),
        sources=sources,
    )


def result(
    cell: Cell,
    status: Status,
    reason: str | None = None,
    measurements: tuple[Measurement, ...] = (),
    sources: Mapping[str, str] | None = None,
) -> Result:
    """A result of any status, with what a worker leaves beside it."""
    ran = status in ("ok", "verified", "incorrect")
    chosen = {"smbench": "default", "smbench-tuned": "tuned-exact", **(sources or {})}.get(cell.provider, "library")
    config = {"SPLIT_K": 8, "num_warps": 4} if cell.provider.startswith("smbench") else {}
    return Result(
        cell_id=cell.cell_id,
        cell=cell,
        status=status,
        reason=reason,
        environment_id="0" if ran else None,
        check=Check(
            passed=status != "incorrect",
            rounds=2,
            relative_error=2e-4,
            relative_bound=1e-3,
            elementwise_error=0.01,
            elementwise_bound=0.1,
            reference="float64",
        )
        if ran
        else None,
        selection=Selection(source=chosen, config=config) if ran else None,
        work=work(cell) if ran else None,
        measurements=measurements,
        telemetry={"sm_clock_hz": [1.98e9]} if ran else {},
        phases_s={"inputs": 0.001, "compile": 0.002, "check": 0.003, "capture": 0.001, "total": 0.02} if ran else {},
        started_at=STARTED_AT,
    )


RECIPE = b"""\
format = 1
name = "lora"
title = "Performance testing of the bgmv/sgmv (Triton) ops"
document = "000"
protocol_version = 1
kind = "op"
stack = "kernels"
seed = 0
template = "lora.md.j2"
baseline = "torch"
headline = "cold"
published = ["lora-rtx3090"]

[values]
sizes = [128, 4096, 15360]

[providers.torch]
title = "torch (gather + bmm)"
color = "#7f7f7f"
selection = "library"

[providers.smbench]
title = "smbench, default configuration"
color = "#1f77b4"
selection = "default"
interpreted = true

[providers.smbench-tuned]
title = "smbench, tuned"
color = "#d62728"
selection = "tuned"
interpreted = true
devices = ["cuda"]

[providers.vllm]
title = "vLLM"
color = "#ff7f0e"
selection = "library"
devices = ["cuda"]

[providers.sglang]
title = "sg|lang <b>$x_1$</b> `chunked`"
color = "#2ca02c"
selection = "library"
devices = ["cuda"]

[profile.full]
device = "cuda"
providers = ["torch", "smbench", "smbench-tuned", "vllm", "sglang"]
time_limit_s = 120.0
estimate = { startup_s = 10.0, cell_s = 0.1, source = "made up" }

[[profile.full.measure]]
name = "document"
title = "the document's protocol"
method = "graph"
l2 = "warm"
calls = 100
replays = 3
warmup = 1
samples = 5
min_samples = 3
window_s = 0.03

[[profile.full.measure]]
name = "cold"
title = "cold L2"
method = "graph"
l2 = "cold"
calls = 16
warmup = 3
samples = 200
min_samples = 20
window_s = 0.03

[[profile.full.grid]]
ops = ["bgmv_shrink", "bgmv_expand"]
axes = { seq_len = [1], rank = [16], num_loras = [8], dtype = ["float16"], hidden_size = "sizes", batch = [1, 8] }

[[profile.full.grid]]
ops = ["sgmv_shrink"]
axes = { rank = [16], num_loras = [8], dtype = ["float16"], seq_len = [128], hidden_size = [128, 4096], batch = [8] }

[profile.cpu]
device = "cpu"
providers = ["torch", "smbench", "smbench-tuned", "vllm", "sglang"]
time_limit_s = 60.0
estimate = { startup_s = 5.0, cell_s = 0.5, source = "made up" }

[[profile.cpu.measure]]
name = "wall"
title = "host clock around each call"
method = "wall"
l2 = "none"
calls = 1
warmup = 3
samples = 200
min_samples = 20
window_s = 0.2

[[profile.cpu.grid]]
ops = ["bgmv_shrink"]
axes = { seq_len = [1], rank = [16], num_loras = [8], dtype = ["float16"], hidden_size = [128, 256], batch = [1, 8] }
"""
"""A small recipe of document 000 with a title that is no friend of tables."""

INTERPRETED = "checked under the Triton interpreter, which has no meaningful time"


def every_status(cell: Cell, profile: Profile) -> Result | None:
    """A GPU run in which every status occurs, with hostile reasons."""
    axes = cell.axes
    reasons: dict[tuple[str, AxisValue, AxisValue], tuple[Status, str]] = {
        ("sglang", 15360, 1): ("unsupported", "hidden sizes up to 8192, not 15360"),
        ("sglang", 15360, 8): ("unsupported", "hidden sizes up to 8192, not 15361"),
        ("vllm", 15360, 8): ("crashed", HOSTILE),
        ("vllm", 128, 1): ("oom", "CUDA out of memory"),
        ("torch", 15360, 8): ("timeout", "longer than 120 s"),
        ("smbench", 4096, 8): ("incorrect", "first inputs: relative error 0.5 exceeds 0.001"),
    }
    found = reasons.get((cell.provider, axes["hidden_size"], axes["batch"]))
    if found and cell.subject == "bgmv_shrink":
        return result(cell, *found)
    # a tuned provider that ran the default configuration: the selection guard refutes it
    silent = cell.provider == "smbench-tuned" and cell.subject == "bgmv_expand" and axes["hidden_size"] == 128
    return ok(cell, profile, {"smbench-tuned": "default"} if silent else None)


def on_a_processor(cell: Cell, profile: Profile) -> Result | None:
    """What the cpu profile leaves: torch timed, our default kernel verified, everything else unsupported."""
    if cell.provider == "torch":
        return ok(cell, profile)
    if cell.provider == "smbench":
        return result(cell, "verified", INTERPRETED)
    return result(cell, "unsupported", "needs a device of kind cuda, this profile runs on cpu")


def all_failed(cell: Cell, profile: Profile) -> Result | None:
    """Nothing worked."""
    return result(cell, "crashed", f"RuntimeError: {HOSTILE}")


def unfinished(cell: Cell, profile: Profile) -> Result | None:
    """Only the first operation was reached."""
    return ok(cell, profile) if cell.subject == "bgmv_shrink" else None
