"""Requests to a worker that serves engines, and what it answers. Owns no assertion."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smbench.cell import Cell
from smbench.result import Result
from smbench.workerprocess import WorkerProcess
from smbench.workloads import measures_of

MEASURES = ("e2e_latency", "ttft", "tpot")
VOCABULARY = 2048
SEED = 7
WARMUP, SAMPLES = 1, 4
AXES: Mapping[str, int | str] = {
    "model": "synthetic:tiny",
    "dtype": "float16",
    "input_len": 24,
    "output_len": 5,
    "scheduling": "chunked",
    "chunk_tokens": 16,
    "attention": "default",
    "graphs": "eager",
}


def job(engine: str = "fake", folder: Path = Path("nowhere"), compare: bool = False, **changes: Any) -> dict[str, Any]:
    """One cell. `changes` are axes, and settings of the engine where no axis has the name."""
    axes = {name: changes.pop(name, value) for name, value in AXES.items()}
    # the settings stand for providers, so that each cell is another
    words = "-".join(str(value) for value in changes.values())
    provider = f"{engine}-{words}" if words else engine
    cell = Cell(kind="engine", subject="generate", provider=provider, axes=axes, seed=SEED)
    return {
        "cell_id": cell.cell_id,
        "subject": cell.subject,
        "provider": provider,
        "axes": axes,
        "seed": SEED,
        "untimed_reason": None,
        "engine": {
            "engine": engine,
            "device": "cpu",
            "settings": changes,
            "limits": {"max_model_len": 2048, "max_num_seqs": 4, "memory_fraction": 0.3, "kv_cache_bytes": 64 << 20},
            "model": {"name": axes["model"], "path": str(folder), "vocabulary": VOCABULARY},
            "requests": {"warmup": WARMUP, "samples": SAMPLES},
            "measures": list(MEASURES),
            "expected_kernel": None,
            "work": {name: {"bytes": 1000 + i, "flops": 2000 + i} for i, name in enumerate(MEASURES)},
            "compare": compare,
            "is_reference": False,
        },
    }


BATCH: Mapping[str, Mapping[str, int | str]] = {
    "static_batch": {"batch": 3, "input_len": 24, "output_len": 5},
    "offline": {"dataset": "random", "num_prompts": 6, "input_len": 24, "output_len": 5},
}
"""Axes of a workload of batches beside those that all have."""


def batch_job(
    subject: str,
    engine: str = "fake",
    folder: Path = Path("nowhere"),
    compare: bool = False,
    sharegpt: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """One cell of a batch. `changes` are axes, and settings of the engine where no axis has the name."""
    wanted = {"model": "synthetic:tiny", "dtype": "float16", "graphs": "eager", "tensor_parallel": 1, **BATCH[subject]}
    axes = {name: changes.pop(name, value) for name, value in wanted.items()}
    made = job(engine, folder, compare, **changes)
    cell = Cell(kind="engine", subject=subject, provider=made["provider"], axes=axes, seed=SEED)
    names = measures_of(subject, axes)
    work = {name: {"bytes": 1000 + i, "flops": 2000 + i} for i, name in enumerate(names)}
    asked = {"measures": list(names), "work": work, "sharegpt": None if sharegpt is None else str(sharegpt)}
    told = {"cell_id": cell.cell_id, "subject": subject, "axes": axes}
    return {**made, **told, "engine": {**made["engine"], **asked}}


def request(jobs: Sequence[Mapping[str, Any]], folder: Path, trace: str | None = None) -> dict[str, Any]:
    """What a host writes for a worker."""
    places = {"logs": str((folder / "logs").resolve()), "folder": str(folder.resolve())}
    asked = {"protocol": 1, "kind": "engine", "device": "cpu", "measures": [], "jobs": list(jobs)}
    return {**asked, **places, "time_limit_s": 60.0, "trace": trace}


@dataclass(slots=True)
class Answer:
    """Everything that a worker said."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, asked: Mapping[str, Any], event: str) -> list[dict[str, Any]]:
        """The events of one kind about one cell."""
        return [e for e in self.events if e["event"] == event and e.get("cell_id") == asked["cell_id"]]

    def result(self, asked: Mapping[str, Any]) -> Result:
        """A cell's result as the host stores it; fails where the host would not take it."""
        (event,) = self.of(asked, "result")
        cell = Cell(**{"kind": "engine", **{key: asked[key] for key in ("subject", "provider", "axes", "seed")}})
        fields = {key: value for key, value in event.items() if key not in ("event", "cell_id")}
        return Result(cell_id=cell.cell_id, cell=cell, environment_id="0", **fields)


def command(program: str = "") -> list[str]:
    """A worker that runs `program` before it reads the request, whose file follows.

    It knows its environment without asking for it, which would import torch.
    """
    start = f"""
import sys
from smbench.worker import serving
from smbench.worker.__main__ import main
serving._environment = lambda device, logs: ({{"python": {{}}}}, True)
{program}
sys.exit(main([sys.argv[1]]))
"""
    return [sys.executable, "-c", start]


def through_the_host(
    jobs: Sequence[Mapping[str, Any]],
    folder: Path,
    limit_s: float = 60.0,
    worker: Sequence[str] | None = None,
    trace: str | None = None,
) -> Answer:
    """What the host's end of a worker hears of a request until the worker is done. WorkerStopped passes through."""
    answer = Answer()
    with WorkerProcess(folder, request(jobs, folder, trace), interpreted=False, command=worker or command()) as process:
        for event in process.events(limit_s):
            answer.events.append(event)
    return answer
