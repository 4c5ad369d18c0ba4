"""Is this machine fit to measure on? Checks as values: a verdict and, where all is not well, a fix in one line.

Owns the checks and their limits. Changes no setting, imports no torch, and does not own how checks are shown.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smbench import machine
from smbench.arch import ArchTable
from smbench.arch import load as load_archs
from smbench.nvml import Gpu, NvmlUnavailable, fixed_facts, instant, open_gpu, other_processes, throttle_reasons
from smbench.resources import archs_file

Verdict = Literal["ok", "warn", "fail", "unknown"]

MIN_PYTHON = (3, 11)
GIB = 1 << 30
DISK_FAIL_BYTES, DISK_WARN_BYTES = GIB // 4, 5 * GIB
MEMORY_FAIL_BYTES, MEMORY_WARN_BYTES = GIB, 4 * GIB
SHM_WARN_BYTES = GIB
"""Docker's default is 64 MiB; engines pass tensors between their processes through it."""
MEMORY_IN_USE_BYTES = GIB
"""Device memory in use above this without a visible process belongs to somebody that this machine cannot see."""
DOCKER_TIMEOUT_S = 10.0
MIN_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""First Linux driver for any release of a CUDA major version (CUDA release notes, minor version compatibility)."""
SLOWDOWNS = frozenset({"hw_slowdown", "hw_thermal_slowdown", "hw_power_brake", "sw_thermal_slowdown"})
BENIGN = frozenset({"idle"})


@dataclass(frozen=True, slots=True)
class Check:
    """One question about the machine and its answer."""

    name: str
    verdict: Verdict
    found: str
    fix: str | None = None
    """What to do about it, in one line; None where nothing need be done."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The torch of this Python environment, without importing it."""

    version: str
    cuda: str | None
    """The CUDA version that it was built for, None for a CPU-only build."""


def torch_build() -> TorchBuild | None:
    """Read from torch's version.py, since importing torch would take seconds. None when it is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    return torch_build_in(Path(next(iter(spec.submodule_search_locations))))


def torch_build_in(package: Path) -> TorchBuild:
    """The torch whose package lies in a folder, of this Python or of another."""
    text = (package / "version.py").read_text(encoding="utf-8")
    version, cuda = (
        re.search(rf"""^{name}\b[^=\n]*=\s*["']([^"']+)["']""", text, re.MULTILINE) for name in ("__version__", "cuda")
    )
    return TorchBuild(version.group(1) if version else "unknown", cuda.group(1) if cuda else None)


def run_checks(run_dir: Path, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """All checks, the GPU's first. `run_dir` is where runs will be written; it need not exist yet."""
    archs = load_archs(archs_file())
    try:
        gpu = open_gpu(environ=environ)
    except NvmlUnavailable as error:
        checks = [no_gpu(str(error))]
        has_gpu = False
    else:
        checks = list(gpu_checks(gpu, archs))
        has_gpu = True
    checks += [
        python_version(sys.version_info[:2]),
        triton(has_gpu),
        disk(run_dir),
        memory(),
        shared_memory(has_gpu),
        docker(environ),
    ]
    return checks


def gpu_checks(gpu: Gpu, archs: ArchTable) -> Iterator[Check]:
    """Everything about one open GPU."""
    facts, now = fixed_facts(gpu), instant(gpu)
    yield Check("gpu", "ok", f"{facts.get('name', 'unnamed')}, driver {facts.get('driver_version', 'unknown')}")
    yield arch(facts, archs)
    yield device(facts, archs)
    yield cuda(facts.get("cuda_driver_version"), torch_build())
    yield clocks(facts, now)
    yield throttling(now)
    yield persistence(facts)
    yield processes(other_processes(gpu), now)
    yield ecc(gpu)
    if facts.get("mig_enabled"):
        fix = "measure whole cards: ask the provider for one with MIG off; rooflines and published figures are of those"
        yield Check("mig", "warn", "MIG is on: this is a slice of a card", fix)


def no_gpu(reason: str, dev: Path = Path("/dev")) -> Check:
    """Whether a missing GPU is a machine without one, or a card that this process cannot reach."""
    if not (dev / "nvidiactl").exists():
        fix = (
            "use PROFILE=cpu (torch is timed, kernels are verified), or a machine or container with a GPU (--gpus all)"
        )
        return Check("gpu", "warn", f"none: {reason}", fix)
    fix = "a card is there: reinstall the environment (make setup), or reboot if the driver was updated"
    return Check("gpu", "fail", f"not reachable: {reason}", fix)


def arch(facts: Mapping[str, Any], archs: ArchTable) -> Check:
    """Whether the compute capability has images and kernels."""
    capability = facts.get("compute_capability")
    if capability is None:
        return Check("arch", "unknown", "the driver does not tell the compute capability")
    row = archs.arch_of_capability((capability[0], capability[1]))
    shown = f"compute capability {capability[0]}.{capability[1]}"
    if row is None:
        known = ", ".join(name for name, each in archs.arch.items() if each.compute_capability)
        return Check(
            "arch", "fail", f"{shown}, which has no row", f"use one of {known}, or add it to docker/archs.toml"
        )
    return Check("arch", "ok", f"{row.name} ({shown})")


def device(facts: Mapping[str, Any], archs: ArchTable) -> Check:
    """Whether the physical peaks of this product are known."""
    name = facts.get("name")
    if name is None:
        return Check("device", "unknown", "the driver does not tell the product's name")
    if archs.device_named(name) is None:
        fix = f'add [device."{name}"] with a source to docker/archs.toml; until then no time is held against a bound'
        return Check("device", "warn", f"no peaks known for {name!r}", fix)
    return Check("device", "ok", "peaks known")


def cuda(driver_cuda: str | None, torch: TorchBuild | None) -> Check:
    """Whether the driver runs the CUDA that torch was built for."""
    if torch is None:
        return Check("cuda", "fail", "torch is not installed", "make setup")
    if torch.cuda is None:
        fix = "make setup TORCH_INDEX_URL=<an index that has CUDA builds of torch>"
        return Check("cuda", "fail", f"torch {torch.version} is a CPU-only build beside a GPU", fix)
    if driver_cuda is None:
        return Check("cuda", "unknown", f"torch needs CUDA {torch.cuda}; the driver does not tell its version")
    found = f"driver: CUDA {driver_cuda}, torch {torch.version}: CUDA {torch.cuda}"
    driver_major, torch_major = int(driver_cuda.split(".")[0]), int(torch.cuda.split(".")[0])
    if driver_major < torch_major:
        oldest = MIN_DRIVER.get(torch_major)
        newer = f"driver {oldest} or newer" if oldest else "a newer driver"
        fix = f"{newer}, or make setup TORCH_INDEX_URL=<an index of torch for CUDA {driver_major}>"
        return Check("cuda", "fail", found, fix)
    return Check("cuda", "ok", found)


def clocks(facts: Mapping[str, Any], now: Mapping[str, Any]) -> Check:
    """Whether application clocks hold the card below its default."""
    current, highest = now.get("sm_clock_hz"), facts.get("max_sm_clock_hz")
    if current is None or highest is None:
        return Check("clocks", "unknown", "the driver does not tell the SM clock")
    found = f"SM {current / 1e6:.0f} MHz now, {highest / 1e6:.0f} MHz at most"
    limit, default = facts.get("power_limit_w"), facts.get("power_limit_default_w")
    set_clock, default_clock = facts.get("application_sm_clock_hz"), facts.get("default_application_sm_clock_hz")
    if set_clock and default_clock and set_clock < default_clock:
        fix = "sudo nvidia-smi -rac resets the application clocks"
        return Check("clocks", "warn", f"{found}; set to {set_clock / 1e6:.0f} MHz, below the default", fix)
    if limit and default and limit < default:
        fix = f"sudo nvidia-smi -pl {default:.0f} restores the default power limit, where the host allows it"
        return Check("clocks", "warn", f"{found}; power limit {limit:.0f} W, below the default {default:.0f} W", fix)
    return Check("clocks", "ok", found)


def throttling(now: Mapping[str, Any]) -> Check:
    """Whether something holds the clocks down at this moment."""
    if "throttle_reason_bits" not in now:
        return Check("throttling", "unknown", "the driver does not tell what limits the clocks")
    reasons = [reason for reason in throttle_reasons(now["throttle_reason_bits"]) if reason not in BENIGN]
    if not reasons:
        return Check("throttling", "ok", "nothing limits the clocks")
    found = ", ".join(reasons) + (f" at {now['temperature_c']} °C" if "temperature_c" in now else "")
    if SLOWDOWNS.intersection(reasons):
        fix = "the card protects itself from heat or lack of power: better cooling, or another card from the provider"
        return Check("throttling", "fail", found, fix)
    fix = "nvidia-smi -q -d PERFORMANCE,POWER,CLOCK shows the limit; stop what loads the card or restore its defaults"
    return Check("throttling", "warn", found, fix)


def persistence(facts: Mapping[str, Any]) -> Check:
    """Whether the driver stays loaded between processes."""
    enabled = facts.get("persistence_enabled")
    if enabled is None:
        return Check("persistence", "unknown", "the driver does not tell")
    if not enabled:
        fix = "sudo nvidia-smi -pm 1 (on the host): without it each process start reloads the driver"
        return Check("persistence", "warn", "off", fix)
    return Check("persistence", "ok", "on")


def processes(found: Mapping[str, int], now: Mapping[str, Any]) -> Check:
    """Whether anybody else computes on the card. The doctor itself holds no context, so each process is another's."""
    count = found.get("compute_processes")
    used = now.get("memory_used_bytes", 0)
    in_use = f"{used / GIB:.1f} GiB of its memory in use"
    if count is None:
        return Check("processes", "unknown", f"the driver does not list them; {in_use}")
    if count:
        fix = "stop them (nvidia-smi lists them), or choose another card with CUDA_VISIBLE_DEVICES"
        return Check("processes", "fail", f"{count} on the GPU, {in_use}", fix)
    if used > MEMORY_IN_USE_BYTES:
        fix = "somebody outside this container uses the card: look with nvidia-smi on the host, or take another card"
        return Check("processes", "warn", f"none visible, yet {in_use}", fix)
    return Check("processes", "ok", f"none, {in_use}")


def ecc(gpu: Gpu) -> Check:
    """Whether memory errors are corrected, will stay as they are, and have not become too many."""
    modes = gpu.ask("ecc", "nvmlDeviceGetEccMode")
    if modes is None:
        return Check("ecc", "ok", f"not available ({gpu.missing['ecc']})")
    current, pending = (bool(mode) for mode in modes)
    if current != pending:
        return Check(
            "ecc", "warn", "a change waits for the next reboot", "reboot, so that the card is what it says it is"
        )
    if not current:
        return Check("ecc", "ok", "off (published figures of this kind of card may be with it on)")
    uncorrected = gpu.ask(
        "ecc_errors",
        "nvmlDeviceGetTotalEccErrors",
        getattr(gpu.library, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1),
        getattr(gpu.library, "NVML_VOLATILE_ECC", 0),
    )
    if uncorrected:
        fix = "results of this card cannot be trusted: reset it (its host can), or take another"
        return Check("ecc", "fail", f"on, {uncorrected} uncorrected errors since the driver was loaded", fix)
    return Check("ecc", "ok", "on")


def python_version(version: tuple[int, int]) -> Check:
    """Whether this Python is new enough."""
    found = ".".join(map(str, version))
    if version < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Check(
            "python", "fail", found, f"install Python {wanted} or newer, then make setup PYTHON=python{wanted}"
        )
    return Check("python", "ok", found)


def triton(has_gpu: bool) -> Check:
    """Whether kernels can be compiled: Triton builds a small launcher with the system's C compiler at run time."""
    if importlib.util.find_spec("triton") is None:
        return Check("triton", "fail", "not installed", "make setup (Triton has wheels for Linux only)")
    compiler = os.environ.get("CC") or next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not has_gpu:
        return Check("triton", "ok", "installed; without a GPU its kernels run in the interpreter")
    if compiler is None:
        return Check("triton", "fail", "installed, but there is no C compiler", "install gcc (apt install gcc)")
    if not headers.exists():
        fix = "install Python's headers (apt install python3-dev)"
        return Check("triton", "fail", "installed, but Python.h is missing", fix)
    return Check("triton", "ok", f"installed, launchers are compiled with {Path(compiler).name}")


def disk(run_dir: Path) -> Check:
    """Whether results and caches have room."""
    free = machine.disk_free_bytes(run_dir)
    fix = "free some space, or write elsewhere: OUT=<folder on a larger disk>"
    return _enough("disk", free, DISK_FAIL_BYTES, DISK_WARN_BYTES, fix)


def memory() -> Check:
    """Whether main memory has room, a container's limit included."""
    available = machine.memory_available_bytes()
    if available is None:
        return Check("memory", "unknown", "this system does not tell its free memory")
    fix = "stop other programs, or give the container more memory"
    return _enough("memory", available, MEMORY_FAIL_BYTES, MEMORY_WARN_BYTES, fix)


def shared_memory(has_gpu: bool, folder: Path = Path("/dev/shm")) -> Check:
    """Whether processes can hand tensors to each other."""
    if not folder.exists():
        return Check("shm", "unknown", "this system has no /dev/shm")
    free = shutil.disk_usage(folder).free
    fix = "start the container with --ipc=host or --shm-size=8g"
    return _enough("shm", free, 0, SHM_WARN_BYTES if has_gpu else 0, fix)


def docker(environ: Mapping[str, str] = os.environ) -> Check:
    """Whether images can be built and run here; without docker a run takes place in this environment."""
    inside = machine.container(environ=environ)
    if inside is not None:
        return Check("docker", "ok", f"already inside a container ({inside}): runs take place here")
    fix = "runs take place in this environment; for images install docker and, for GPUs, nvidia-container-toolkit"
    if shutil.which("docker") is None:
        return Check("docker", "warn", "not installed", fix)
    command = ["docker", "info", "--format", "{{json .Runtimes}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("docker", "warn", f"no answer within {DOCKER_TIMEOUT_S:.0f} s", "restart the docker daemon")
    if done.returncode != 0:
        fix = "start the daemon (sudo systemctl start docker) and join its group (sudo usermod -aG docker $USER)"
        return Check("docker", "warn", "installed, but its daemon does not answer", fix)
    runtime = "with" if "nvidia" in done.stdout else "without"
    return Check("docker", "ok", f"running, {runtime} the NVIDIA runtime")


def _enough(name: str, free: int, fail_below: int, warn_below: int, fix: str) -> Check:
    found = f"{free / GIB:.1f} GiB free"
    if free < fail_below:
        return Check(name, "fail", f"{found}, at least {fail_below / GIB:.2g} GiB are needed", fix)
    if free < warn_below:
        return Check(name, "warn", f"{found}, {warn_below / GIB:.2g} GiB are advised", fix)
    return Check(name, "ok", found)
