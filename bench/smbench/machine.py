"""Facts of the computer that a run is on: processor, memory, control groups, container, disk. Standard library only.

Owns reading them from Linux's /proc and /sys, where a container's limits are smaller than the machine; on other systems
most are None. Does not own the GPU (nvml.py), and reads nothing that names the machine or its user. Every function
takes the root of the file tree, so that tests can lay out any machine.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path("/")
UNLIMITED_BYTES = 1 << 60
"""Version 1 control groups state "no limit" as a number near 2^63; nothing real is beyond this."""


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's model name, None where the system does not tell."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or None


def cores_usable(root: Path = ROOT) -> int:
    """Cores that this process may use: the affinity mask, capped by the control group's quota, at least one."""
    getaffinity = getattr(os, "sched_getaffinity", None)
    allowed = len(getaffinity(0)) if getaffinity else os.cpu_count() or 1
    quota = cpu_quota_cores(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota_cores(root: Path = ROOT) -> float | None:
    """The control group's processor quota in cores, None without one. The tightest of the enclosing groups counts."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        words = " ".join(_lines(folder / "cpu.max")).split()
        if not words:
            quota, period = _integer(folder / "cpu.cfs_quota_us"), _integer(folder / "cpu.cfs_period_us")
            words = [] if quota is None or period is None or quota < 0 else [str(quota), str(period)]
        if len(words) == 2 and words[0] != "max" and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_total_bytes(root: Path = ROOT) -> int | None:
    """Main memory that this process can have: the machine's, or less where a control group limits it."""
    limits = [limit for limit, _ in _memory_groups(root)]
    machine = _meminfo_bytes(root, "MemTotal")
    if machine is None and root == ROOT and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([*limits, *([] if machine is None else [machine])], default=None)


def memory_available_bytes(root: Path = ROOT) -> int | None:
    """Main memory free for new use now, control groups included; file cache that can be dropped counts as free."""
    rooms = [max(0, limit - used) for limit, used in _memory_groups(root)]
    machine = _meminfo_bytes(root, "MemAvailable")
    return min([*rooms, *([] if machine is None else [machine])], default=None)


def container(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> str | None:
    """The kind of container that this process is in, by its traces; None when there are none."""
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    groups = " ".join(_lines(root / "proc/1/cgroup"))
    for token, kind in (("kubepods", "kubernetes"), ("docker", "docker"), ("containerd", "containerd"), ("lxc", "lxc")):
        if token in groups:
            return kind
    return None


def disk_free_bytes(path: Path) -> int:
    """Free space for an ordinary user where `path` is or will be: at its nearest existing parent."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def parent_process(pid: int, root: Path = ROOT) -> int | None:
    """The parent of a process, None when no such process is visible here."""
    # the second field is the command in brackets and may itself hold spaces and brackets
    fields = " ".join(_lines(root / f"proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, use without droppable file cache) of every enclosing control group that has a limit, in bytes."""
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, use_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, use = _integer(folder / limit_name), _integer(folder / use_name)
            if limit is not None and limit < UNLIMITED_BYTES:
                statistics = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
                yield limit, max(0, (use or 0) - int(statistics.get(cache_name, 0)))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and its parents: version 2's, then version 1's of `controller`."""
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        # inside a container the path may be the host's and not exist here, the base then holds the limits
        group = base / path.strip("/")
        while group != base and base in group.parents:
            yield group
            group = group.parent
        yield base


def _meminfo_bytes(root: Path, key: str) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _integer(path: Path) -> int | None:
    """The number in a file; None when there is no such file, or it says `max`."""
    text = " ".join(_lines(path))
    return int(text) if text.lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    """The lines of a file, none when it cannot be read: which of these files exist differs between machines."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
