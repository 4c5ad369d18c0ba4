"""Each check's verdict, and that what is not well comes with one line of advice."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fake_nvml import FakeNvml, NVMLError, NVMLErrorNotSupported, install, process
from smbench import doctor, machine
from smbench.arch import load
from smbench.doctor import Check, TorchBuild, gpu_checks, run_checks
from smbench.nvml import open_gpu
from smbench.resources import archs_file

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(name="nvml")
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.setattr(doctor, "torch_build", lambda: TorchBuild("2.11.0+cu130", "13.0"))
    return install(monkeypatch)


def on_gpu() -> dict[str, Check]:
    return {check.name: check for check in gpu_checks(open_gpu(), load(archs_file()))}


def test_a_well_kept_card(nvml: FakeNvml) -> None:
    checks = on_gpu()
    assert {name: check.verdict for name, check in checks.items()} == dict.fromkeys(
        ["gpu", "arch", "device", "cuda", "clocks", "throttling", "persistence", "processes", "ecc"], "ok"
    )
    assert all(check.fix is None for check in checks.values())
    assert checks["gpu"].found == "NVIDIA H200, driver 580.159.04"
    assert checks["arch"].found == "sm90 (compute capability 9.0)"
    assert checks["clocks"].found == "SM 1965 MHz now, 1980 MHz at most"
    assert checks["cuda"].found == "driver: CUDA 13.0, torch 2.11.0+cu130: CUDA 13.0"


SM = 1


@pytest.mark.parametrize(
    ("answers", "name", "verdict", "found", "fix"),
    [
        ({"nvmlDeviceGetCudaComputeCapability": (7, 5)}, "arch", "fail", "7.5, which has no row", "sm80, sm86, sm89"),
        ({"nvmlDeviceGetName": "NVIDIA B9000"}, "device", "warn", "'NVIDIA B9000'", '[device."NVIDIA B9000"]'),
        ({"nvmlSystemGetCudaDriverVersion": 12020}, "cuda", "fail", "driver: CUDA 12.2", "driver 580.65.06 or newer"),
        (
            {"nvmlDeviceGetApplicationsClock": lambda handle, kind: 1200},
            "clocks",
            "warn",
            "set to 1200 MHz, below the default",
            "nvidia-smi -rac",
        ),
        (
            {"nvmlDeviceGetEnforcedPowerLimit": 450_000},
            "clocks",
            "warn",
            "power limit 450 W, below the default 700 W",
            "nvidia-smi -pl 700",
        ),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x4}, "throttling", "warn", "sw_power_cap at 33 °C", "nvidia-smi"),
        (
            {"nvmlDeviceGetCurrentClocksEventReasons": 0x48},
            "throttling",
            "fail",
            "hw_slowdown, hw_thermal_slowdown",
            "cooling",
        ),
        ({"nvmlDeviceGetPersistenceMode": 0}, "persistence", "warn", "off", "nvidia-smi -pm 1"),
        (
            {"nvmlDeviceGetComputeRunningProcesses": [process(1, 1), process(1 << 23, 1)]},
            "processes",
            "fail",
            "2 on the GPU",
            "CUDA_VISIBLE_DEVICES",
        ),
        ({"nvmlDeviceGetEccMode": [1, 0]}, "ecc", "warn", "waits for the next reboot", "reboot"),
        ({"nvmlDeviceGetTotalEccErrors": 3}, "ecc", "fail", "3 uncorrected errors", "cannot be trusted"),
        ({"nvmlDeviceGetMigMode": [1, 1]}, "mig", "warn", "MIG is on", "whole cards"),
    ],
)
def test_what_is_wrong_with_a_card(
    nvml: FakeNvml, answers: Mapping[str, Any], name: str, verdict: str, found: str, fix: str
) -> None:
    nvml.answers |= answers
    check = on_gpu()[name]
    assert check.verdict == verdict
    assert found in check.found
    assert fix in (check.fix or "")


def test_memory_held_by_nobody_visible(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetMemoryInfo"].used = 30 * GIB
    check = on_gpu()["processes"]
    assert (check.verdict, check.found) == ("warn", "none visible, yet 30.0 GiB of its memory in use")


@pytest.mark.parametrize(
    ("function", "name", "verdict"),
    [
        ("nvmlDeviceGetCudaComputeCapability", "arch", "unknown"),
        ("nvmlDeviceGetName", "device", "unknown"),
        ("nvmlSystemGetCudaDriverVersion", "cuda", "unknown"),
        ("nvmlDeviceGetClockInfo", "clocks", "unknown"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "throttling", "unknown"),
        ("nvmlDeviceGetPersistenceMode", "persistence", "unknown"),
        ("nvmlDeviceGetComputeRunningProcesses", "processes", "unknown"),
        ("nvmlDeviceGetEccMode", "ecc", "ok"),
        ("nvmlDeviceGetTotalEccErrors", "ecc", "ok"),
        ("nvmlDeviceGetMemoryInfo", "processes", "ok"),
    ],
)
def test_a_card_that_does_not_tell_is_unknown_not_broken(
    nvml: FakeNvml, function: str, name: str, verdict: str
) -> None:
    nvml.answers[function] = NVMLErrorNotSupported()
    assert on_gpu()[name].verdict == verdict


@pytest.mark.parametrize(
    ("driver", "torch", "verdict", "said"),
    [
        ("13.0", TorchBuild("2.11.0+cu130", "13.0"), "ok", "CUDA 13.0"),
        ("13.0", TorchBuild("2.9.0+cu126", "12.6"), "ok", "CUDA 12.6"),
        # a driver runs every release of its major version
        ("12.2", TorchBuild("2.9.0+cu128", "12.8"), "ok", "CUDA 12.8"),
        ("12.8", TorchBuild("2.11.0+cu130", "13.0"), "fail", "CUDA 13.0"),
        ("13.0", TorchBuild("2.13.0+cpu", None), "fail", "CPU-only build"),
        ("13.0", None, "fail", "not installed"),
    ],
)
def test_driver_against_torch(driver: str, torch: TorchBuild | None, verdict: str, said: str) -> None:
    check = doctor.cuda(driver, torch)
    assert check.verdict == verdict
    assert said in check.found
    assert (check.fix is None) == (verdict == "ok")


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: str = '6'\n", TorchBuild("2.13.0+cpu", None)),
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n", TorchBuild("2.11.0+cu130", "13.0")),
        ("__version__ = '1.0'\ncuda = '12.1'\n", TorchBuild("1.0", "12.1")),
    ],
)
def test_torch_is_read_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, build: TorchBuild
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (tmp_path / "torch" / "version.py").write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.torch_build() == build


def test_no_gpu_is_a_warning_with_a_way_on(tmp_path: Path) -> None:
    check = doctor.no_gpu("NVML: Driver Not Loaded", dev=tmp_path)
    assert (check.verdict, check.found) == ("warn", "none: NVML: Driver Not Loaded")
    assert "PROFILE=cpu" in (check.fix or "")


def test_a_card_that_cannot_be_reached_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert doctor.no_gpu("NVML: RM has detected an NVML/RM version mismatch.", dev=tmp_path).verdict == "fail"


@pytest.mark.parametrize(
    ("free", "verdict"), [(100 * GIB, "ok"), (2 * GIB, "warn"), (GIB // 10, "fail")], ids=["ok", "warn", "fail"]
)
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, verdict: str) -> None:
    monkeypatch.setattr(machine, "disk_free_bytes", lambda path: free)
    check = doctor.disk(tmp_path)
    assert check.verdict == verdict
    assert ("OUT=" in (check.fix or "")) == (verdict != "ok")


@pytest.mark.parametrize(
    ("available", "verdict"), [(None, "unknown"), (8 * GIB, "ok"), (2 * GIB, "warn"), (GIB // 2, "fail")]
)
def test_memory(monkeypatch: pytest.MonkeyPatch, available: int | None, verdict: str) -> None:
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: available)
    assert doctor.memory().verdict == verdict


@pytest.mark.parametrize(
    ("free", "has_gpu", "verdict"), [(GIB // 16, True, "warn"), (GIB // 16, False, "ok"), (8 * GIB, True, "ok")]
)
def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, has_gpu: bool, verdict: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    check = doctor.shared_memory(has_gpu, tmp_path)
    assert check.verdict == verdict
    assert ("--shm-size" in (check.fix or "")) == (verdict == "warn")


def test_no_shared_memory_folder(tmp_path: Path) -> None:
    assert doctor.shared_memory(True, tmp_path / "shm").verdict == "unknown"


@pytest.mark.parametrize(("version", "verdict"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 14), "ok")])
def test_python(version: tuple[int, int], verdict: str) -> None:
    assert doctor.python_version(version).verdict == verdict


def test_triton_on_a_gpu_needs_a_c_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    check = doctor.triton(has_gpu=True)
    assert (check.verdict, check.found) == ("fail", "installed, but there is no C compiler")
    assert "gcc" in (check.fix or "")
    assert doctor.triton(has_gpu=False).verdict == "ok"


def test_triton_on_a_gpu_needs_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/usr/bin/gcc")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    check = doctor.triton(has_gpu=True)
    assert (check.verdict, check.found) == ("fail", "installed, but Python.h is missing")
    (tmp_path / "Python.h").touch()
    assert doctor.triton(has_gpu=True) == Check("triton", "ok", "installed, launchers are compiled with gcc")


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.triton(has_gpu=False).verdict == "fail"


def ended(code: int, out: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, out, "")

    return run


def hangs(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    raise subprocess.TimeoutExpired(command, 10)


@pytest.mark.parametrize(
    ("run", "verdict", "said"),
    [
        (ended(0, '{"nvidia":{},"runc":{}}'), "ok", "running, with the NVIDIA runtime"),
        (ended(0, '{"runc":{}}'), "ok", "running, without the NVIDIA runtime"),
        (ended(1, ""), "warn", "its daemon does not answer"),
        (hangs, "warn", "no answer within 10 s"),
    ],
)
def test_docker_on_a_host(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], verdict: str, said: str) -> None:
    monkeypatch.setattr(machine, "container", lambda environ: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    check = doctor.docker()
    assert check.verdict == verdict
    assert said in check.found


def test_no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "container", lambda environ: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.docker()
    assert (check.verdict, check.found) == ("warn", "not installed")


def test_inside_a_container_docker_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", hangs)
    check = doctor.docker({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (check.verdict, check.found) == ("ok", "already inside a container (kubernetes): runs take place here")


def test_all_checks_without_a_gpu(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.answers["nvmlInit"] = NVMLError("NVML Shared Library Not Found")
    checks = run_checks(tmp_path / "runs" / "lora")
    assert [check.name for check in checks] == ["gpu", "python", "triton", "disk", "memory", "shm", "docker"]
    assert checks[0].verdict == "warn"


def test_all_checks_on_a_gpu(nvml: FakeNvml, tmp_path: Path) -> None:
    names = [check.name for check in run_checks(tmp_path)]
    assert names[:2] == ["gpu", "arch"]
    assert len(names) == len(set(names)) == 15


def test_whatever_is_not_well_has_a_one_line_fix(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.answers |= {
        "nvmlDeviceGetCudaComputeCapability": (7, 5),
        "nvmlDeviceGetName": "NVIDIA B9000",
        "nvmlSystemGetCudaDriverVersion": 11040,
        "nvmlDeviceGetCurrentClocksEventReasons": 0xFF,
        "nvmlDeviceGetPersistenceMode": 0,
        "nvmlDeviceGetComputeRunningProcesses": [process(os.getppid(), 1)],
        "nvmlDeviceGetEccMode": [0, 1],
        "nvmlDeviceGetMigMode": [1, 1],
    }
    bad = [check for check in run_checks(tmp_path) if check.verdict in ("warn", "fail")]
    assert len(bad) >= 8
    for check in bad:
        assert check.fix, check.name
        assert "\n" not in check.fix


def test_no_setting_is_ever_changed(nvml: FakeNvml, tmp_path: Path) -> None:
    run_checks(tmp_path)
    assert nvml.calls
    assert {name for name in nvml.calls if not name.startswith(("nvmlInit", "nvmlDeviceGet", "nvmlSystemGet"))} == set()
