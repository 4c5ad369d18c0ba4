"""Compile kernels on all cores before they are needed, each by a process without a GPU.

Owns which kernels the cells of a request will launch, as far as their operations say, and the pool. Owns neither the
cache, which is Triton's folder, nor what a configuration means. A kernel that fails here fails again where it is
launched, and is told there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from smbench.worker import baked
from smbench_kernels import configs, hardware
from smbench_kernels.op import Config, Op, Point, UnsupportedPoint
from smbench_kernels.registry import op as find_op

Result = TypeVar("Result")
DEFAULT, TUNED = "smbench", "smbench-tuned"
"""Providers over our own kernel, with the configuration that its model prefers and with the tuned one."""
FEWEST = 24
"""Fewer kernels are compiled sooner than processes for it have started."""
REPORT_S = 5.0
"""A host takes a worker that says nothing for dead."""


class Cell(Protocol):
    """What of a job decides its kernels."""

    @property
    def subject(self) -> str:
        """The operation."""

    @property
    def provider(self) -> str:
        """Whose implementation."""

    @property
    def axes(self) -> Point:
        """The point."""


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel, or those of one call, as one of the points that share it names it."""

    op: str
    provider: str | None
    """The provider over a library's kernel; None for our own."""
    point: Point
    config: Config

    def compile(self, capability: int) -> str:
        """Compile it for a capability into Triton's cache, without a GPU; its key there."""
        return find_op(self.op).tuning(self.provider).precompile(self.point, self.config, capability)


def ahead(cells: Sequence[Cell], device: torch.device) -> Iterator[dict[str, Any]]:
    """Compile what cells will launch on a GPU; how far it is, again and again: `done`, `of`, `seconds` since it began.

    Nothing happens, and nothing is told, where there are few kernels or this very list was compiled before. Whatever
    goes wrong is in the log, and no reason not to measure.
    """
    try:
        yield from _ahead(cells, device)
    except Exception:  # noqa: BLE001
        traceback.print_exc()


def _ahead(cells: Sequence[Cell], device: torch.device) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    tasks = of_cells(cells, device)
    major, minor = torch.cuda.get_device_capability(device)
    mark = _cache() / f"smbench-compiled-{_digest(tasks, 10 * major + minor)}"
    if len(tasks) < FEWEST or mark.exists():
        return
    yield {"done": 0, "of": len(tasks), "seconds": 0.0}
    told = began
    for done in compile_all(list(tasks.values()), 10 * major + minor):
        now = time.perf_counter()
        if now - told >= REPORT_S or done == len(tasks):
            yield {"done": done, "of": len(tasks), "seconds": now - began}
            told = now
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def of_cells(cells: Sequence[Cell], device: torch.device) -> dict[str, Task]:
    """The distinct kernels of cells by what distinguishes them, without those that an image ships compiled.

    A cell that cannot run is no concern of this: it will say so itself.
    """
    card = hardware.of(device)
    shipped = (baked.folder() / baked.FACTS).is_file()
    found: dict[str, Task] = {}
    for cell in cells:
        op = find_op(cell.subject)
        ours = cell.provider in (DEFAULT, TUNED)
        if (shipped or op.tunable is None) if ours else cell.provider not in op.peer_tunables:
            continue
        # ValueError: the nearest point's configuration, which does not fit this one
        with contextlib.suppress(UnsupportedPoint, ValueError):
            task = Task(op.name, None if ours else cell.provider, cell.axes, _config(op, cell, card, device))
            found.setdefault(f"{task.provider} {op.tuning(task.provider).binary(task.point, task.config)}", task)
    return found


def _config(op: Op, cell: Cell, card: hardware.Hardware, device: torch.device) -> Config:
    """What the provider of a cell will launch. UnsupportedPoint where nothing is tuned."""
    if cell.provider == DEFAULT:
        default = op.tuning().default
        if default is None:
            raise UnsupportedPoint("the operation does not say what it chooses")
        return default(cell.axes, card)
    library = None if cell.provider == TUNED else op.tuning(cell.provider).library
    return configs.tuned_config(op.name, cell.axes, device, library=library() if library else None)[0]


def compile_all(tasks: Sequence[Task], capability: int) -> Iterator[int]:
    """Fill Triton's cache; after each task, how many are done. What fails is in the log alone."""
    for done, _ in enumerate(on_all_cores(_compile_one, tasks, capability), 1):
        yield done


def on_all_cores(work: Callable[[Task, int], Result], tasks: Sequence[Task], capability: int) -> Iterator[Result]:
    """What `work` gives for each task, in their order, by processes without a GPU, one a core."""
    if not tasks:
        return
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks, [capability] * len(tasks), chunksize=1)


def _compile_one(task: Task, capability: int) -> None:
    try:
        task.compile(capability)
    # whatever a compiler raises, the cell or the search that launches the kernel meets it again
    except Exception as error:  # noqa: BLE001
        sys.stderr.write(f"{task.op} {task.provider} {dict(task.config)}: {type(error).__name__}: {error}\n")


def _cache() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


def _digest(tasks: Mapping[str, Task], capability: int) -> str:
    """What the kernels of a list depend on: their names, sources, compilers and the card."""
    import triton

    from smbench.worker.environment import package_sha256

    versions = [package_sha256("smbench_kernels"), triton.__version__, torch.__version__, capability]
    return hashlib.sha256(json.dumps([versions, sorted(tasks)]).encode()).hexdigest()[:16]
