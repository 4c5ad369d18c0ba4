"""Whether this machine can build TensorRT-LLM: memory, disk, cores. Owns the arithmetic and its words."""

from __future__ import annotations

from dataclasses import dataclass

from smbench.errors import UsageError
from smbench.kvcache.table import Needs

GB = 1e9


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is."""

    cores: int
    memory_bytes: int
    disk_free_bytes: int
    """Where docker keeps its images."""


def jobs(machine: Machine, needs: Needs, asked: str) -> int:
    """Compiler processes at once: as asked, else as many as cores and memory carry.

    UsageError for what is no number from 1 to the number of cores, or needs more memory than there is.
    """
    carried = (machine.memory_bytes - needs.memory_bytes_base) // needs.memory_bytes_per_job
    if not asked:
        return max(1, min(machine.cores, carried))
    if not asked.isdecimal() or not 1 <= int(asked) <= machine.cores:
        raise UsageError(f"MAX_JOBS: {asked!r} is not from 1 to {machine.cores}, the cores of this machine")
    if int(asked) > max(1, carried):
        raise UsageError(
            f"MAX_JOBS: {asked} compilers need about {_memory(needs, int(asked)) / GB:.0f} GB of memory, and there are "
            f"{machine.memory_bytes / GB:.0f}: MAX_JOBS={max(1, carried)}"
        )
    return int(asked)


def report(machine: Machine, needs: Needs, count: int) -> list[str]:
    """What the build takes and what there is, in words."""
    return [
        f"memory: about {_memory(needs, count) / GB:.0f} GB with {count} compilers; there are "
        f"{machine.memory_bytes / GB:.0f}",
        f"disk: about {needs.disk_bytes / GB:.0f} GB; free are {machine.disk_free_bytes / GB:.0f}",
        f"time: {needs.seconds_on_a_large_machine / 3600:.1f} hours on a large machine for all archs; expect hours "
        f"here, with {count} of {machine.cores} cores",
    ]


def shortages(machine: Machine, needs: Needs, count: int) -> list[str]:
    """What is missing, with the fix; nothing where all is there."""
    found = []
    if machine.memory_bytes < _memory(needs, count):
        found.append(
            f"memory: {machine.memory_bytes / GB:.0f} GB are too little for {count} compilers, which take about "
            f"{_memory(needs, count) / GB:.0f}: build on a larger machine (no GPU is needed), or add swap"
        )
    if machine.disk_free_bytes < needs.disk_bytes:
        found.append(
            f"disk: {machine.disk_free_bytes / GB:.0f} GB are free where docker keeps images, and about "
            f"{needs.disk_bytes / GB:.0f} are needed: `docker system prune`, or docker's data-root on a larger disk"
        )
    return found


def _memory(needs: Needs, count: int) -> int:
    return needs.memory_bytes_base + count * needs.memory_bytes_per_job
