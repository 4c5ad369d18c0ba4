"""Facts of machines laid out in folders: bare, limited by control groups of both versions, in containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from smbench import machine

GIB = 1 << 30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       33554432 kB\nMemFree:  1 kB\nMemAvailable:   16777216 kB\n"}
VERSION_2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/a/memory.current": f"{6 * GIB}\n",
    "sys/fs/cgroup/a/memory.stat": f"anon {3 * GIB}\ninactive_file {2 * GIB}\n",
    "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/a/cpu.max": "max 100000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_inactive_file {GIB}\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


def test_memory_of_a_bare_machine(tmp_path: Path) -> None:
    root = lay_out(tmp_path, MEMINFO)
    assert machine.memory_total_bytes(root) == 32 * GIB
    assert machine.memory_available_bytes(root) == 16 * GIB


@pytest.mark.parametrize(
    ("groups", "total", "available", "quota"),
    [(VERSION_2, 8 * GIB, 4 * GIB, 1.5), (VERSION_1, 4 * GIB, 2 * GIB, 4.0)],
    ids=["version 2", "version 1"],
)
def test_control_groups_limit_memory_and_cores(
    tmp_path: Path, groups: dict[str, str], total: int, available: int, quota: float
) -> None:
    root = lay_out(tmp_path, {**MEMINFO, **groups})
    assert machine.memory_total_bytes(root) == total
    assert machine.memory_available_bytes(root) == available
    assert machine.cpu_quota_cores(root) == quota
    assert 1 <= machine.cores_usable(root) <= quota


def test_a_control_group_without_limits_changes_nothing(tmp_path: Path) -> None:
    unlimited = {
        **VERSION_1,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    }
    root = lay_out(tmp_path, {**MEMINFO, **unlimited})
    assert machine.memory_available_bytes(root) == 16 * GIB
    assert machine.cpu_quota_cores(root) is None


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert machine.memory_available_bytes(tmp_path) is None
    assert machine.cpu_quota_cores(tmp_path) is None
    assert machine.parent_process(1, tmp_path) is None
    assert machine.cores_usable(tmp_path) >= 1


def test_cpu_model(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: A Processor 9000\n"})
    assert machine.cpu_model(root) == "A Processor 9000"


@pytest.mark.parametrize(
    ("files", "environ", "kind"),
    [
        ({}, {}, None),
        ({".dockerenv": ""}, {}, "docker"),
        ({"run/.containerenv": ""}, {}, "podman"),
        ({"proc/1/cgroup": "0::/system.slice/docker-0123.scope\n"}, {}, "docker"),
        ({"proc/1/cgroup": "0::/lxc/box\n"}, {}, "lxc"),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
    ],
)
def test_containers_by_their_traces(
    tmp_path: Path, files: dict[str, str], environ: dict[str, str], kind: str | None
) -> None:
    assert machine.container(lay_out(tmp_path, files), environ) == kind


def test_parent_of_a_process_with_an_awkward_name(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/7/stat": "7 (a) b (c)) S 3 7 7 0\n"})
    assert machine.parent_process(7, root) == 3


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert machine.disk_free_bytes(tmp_path / "runs" / "lora") > 0
