"""One GPU seen through NVML: opening it, asking it, and what its answers mean. Read only: no setting is ever changed.

Owns the lazy import of nvidia-ml-py, the choice of the device, and the tolerance for what a card or driver does not
answer: such a field is absent from the answer and its reason is in `Gpu.missing`. Used by the host's doctor and by the
worker, so nothing here imports torch. Does not own sampling over time, nor any judgement.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smbench import machine

THROTTLE_REASONS: Mapping[int, str] = {
    0x001: "idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake",
    0x100: "display",
    0x200: "board_limit",
    0x400: "reliability",
}
"""Names of the bits of NVML's clock event reasons (nvml.h). Literal, since older bindings lack some constants."""


class NvmlUnavailable(Exception):
    """There is no GPU to ask, and why: no bindings, no driver, no device, or none visible."""


@dataclass(slots=True)
class Gpu:
    """One open device."""

    library: Any
    """The module `pynvml`, initialized."""
    handle: Any
    missing: dict[str, str] = field(default_factory=dict)
    """Why a field could not be read, by field, over all calls so far."""

    def ask(self, name: str, function: str, *arguments: Any, of_device: bool = True) -> Any:
        """The answer of an NVML function, or None with the reason noted under `name`."""
        call = getattr(self.library, function, None)
        if call is None:
            self.missing[name] = "these NVML bindings do not know it"
            return None
        try:
            return call(self.handle, *arguments) if of_device else call(*arguments)
        except self.library.NVMLError as error:
            self.missing[name] = str(error)
            return None


def open_gpu(index: int = 0, uuid: str | None = None, environ: Mapping[str, str] = os.environ) -> Gpu:
    """The GPU that a process with this environment calls device `index`. NvmlUnavailable says why there is none.

    NVML counts all cards in bus order and ignores CUDA_VISIBLE_DEVICES, so that variable is followed here. Where cards
    of several kinds share a machine, CUDA may count in another order: then pass the `uuid` that torch reports.
    """
    try:
        library = importlib.import_module("pynvml")
    except ImportError as error:
        raise NvmlUnavailable("the Python package nvidia-ml-py is not installed") from error
    try:
        library.nvmlInit()
        gpu = Gpu(library, _handle(library, index, uuid, environ))
    except library.NVMLError as error:
        raise NvmlUnavailable(f"NVML: {error}") from error
    return gpu


def visible_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """How many GPUs a process with this environment sees; 0 where NVML cannot be asked."""
    count = 0
    try:
        while True:
            open_gpu(count, environ=environ)
            count += 1
    except NvmlUnavailable:
        return count


def fixed_facts(gpu: Gpu) -> dict[str, Any]:
    """What stays the same during a run. Absent keys could not be read. Holds no serial number, UUID or bus address."""
    library = gpu.library
    sm, memory = getattr(library, "NVML_CLOCK_SM", 1), getattr(library, "NVML_CLOCK_MEM", 2)
    readers: dict[str, tuple[Callable[[Any], Any], str, tuple[Any, ...]]] = {
        "name": (_text, "nvmlDeviceGetName", ()),
        "compute_capability": (list, "nvmlDeviceGetCudaComputeCapability", ()),
        "memory_bytes": (lambda info: int(info.total), "nvmlDeviceGetMemoryInfo", ()),
        "ecc_enabled": (_first_flag, "nvmlDeviceGetEccMode", ()),
        "power_limit_w": (_from_milli, "nvmlDeviceGetEnforcedPowerLimit", ()),
        "power_limit_default_w": (_from_milli, "nvmlDeviceGetPowerManagementDefaultLimit", ()),
        "max_sm_clock_hz": (_from_mega, "nvmlDeviceGetMaxClockInfo", (sm,)),
        "max_memory_clock_hz": (_from_mega, "nvmlDeviceGetMaxClockInfo", (memory,)),
        "application_sm_clock_hz": (_from_mega, "nvmlDeviceGetApplicationsClock", (sm,)),
        "application_memory_clock_hz": (_from_mega, "nvmlDeviceGetApplicationsClock", (memory,)),
        "default_application_sm_clock_hz": (_from_mega, "nvmlDeviceGetDefaultApplicationsClock", (sm,)),
        "persistence_enabled": (bool, "nvmlDeviceGetPersistenceMode", ()),
        "mig_enabled": (_first_flag, "nvmlDeviceGetMigMode", ()),
        "max_pcie_generation": (int, "nvmlDeviceGetMaxPcieLinkGeneration", ()),
        "max_pcie_width": (int, "nvmlDeviceGetMaxPcieLinkWidth", ()),
    }
    facts = {name: _read(gpu, name, *reader) for name, reader in readers.items()}
    facts["driver_version"] = _read(gpu, "driver_version", _text, "nvmlSystemGetDriverVersion", of_device=False)
    facts["cuda_driver_version"] = _read(
        gpu, "cuda_driver_version", _cuda_version, "nvmlSystemGetCudaDriverVersion", of_device=False
    )
    return {name: value for name, value in facts.items() if value is not None}


def instant(gpu: Gpu) -> dict[str, Any]:
    """What changes, as of now. Absent keys could not be read.

    `power_w` is the driver's own reading, on most cards an average over about the last second: an H200 shows a new load
    in full only after 1.1 s. `utilization_fraction` is the share of the driver's last sampling period in which some
    kernel ran, not how busy that kernel kept the GPU.
    """
    library = gpu.library
    sm, memory = getattr(library, "NVML_CLOCK_SM", 1), getattr(library, "NVML_CLOCK_MEM", 2)
    celsius = getattr(library, "NVML_TEMPERATURE_GPU", 0)
    # version 1 counts what the driver keeps for itself as used: 0.6 GiB on an idle H200
    memory_version = (library.nvmlMemory_v2,) if hasattr(library, "nvmlMemory_v2") else ()
    # the function was renamed; older drivers and bindings have only the first name
    reasons = "nvmlDeviceGetCurrentClocksEventReasons"
    if not hasattr(library, reasons):
        reasons = "nvmlDeviceGetCurrentClocksThrottleReasons"
    readers: dict[str, tuple[Callable[[Any], Any], str, tuple[Any, ...]]] = {
        "sm_clock_hz": (_from_mega, "nvmlDeviceGetClockInfo", (sm,)),
        "memory_clock_hz": (_from_mega, "nvmlDeviceGetClockInfo", (memory,)),
        "power_w": (_from_milli, "nvmlDeviceGetPowerUsage", ()),
        "temperature_c": (int, "nvmlDeviceGetTemperature", (celsius,)),
        "throttle_reason_bits": (int, reasons, ()),
        "utilization_fraction": (lambda rates: rates.gpu / 100, "nvmlDeviceGetUtilizationRates", ()),
        "memory_used_bytes": (lambda info: int(info.used), "nvmlDeviceGetMemoryInfo", memory_version),
    }
    values = {name: _read(gpu, name, *reader) for name, reader in readers.items()}
    return {name: value for name, value in values.items() if value is not None}


def other_processes(gpu: Gpu, own_pid: int | None = None) -> dict[str, int]:
    """How many compute processes hold the GPU beside `own_pid` (default: this one) and its children, and their memory.

    Keys: `compute_processes` (all), `other_processes`, `other_memory_bytes`. In a container the driver names processes
    by numbers that mean nothing inside: `other_processes` is then absent, since nobody can say which of them is ours.
    """
    processes = gpu.ask("compute_processes", "nvmlDeviceGetComputeRunningProcesses")
    if processes is None:
        return {}
    pid = os.getpid() if own_pid is None else own_pid
    found = {"compute_processes": len(processes)}
    if any(machine.parent_process(process.pid) is None for process in processes):
        gpu.missing["other_processes"] = "process numbers of another pid namespace: ours cannot be told from others"
        return found
    others = [process for process in processes if not _descends_from(process.pid, pid)]
    used = [process.usedGpuMemory for process in others]
    found["other_processes"] = len(others)
    if all(bytes_used is not None for bytes_used in used):
        found["other_memory_bytes"] = sum(used)
    else:
        gpu.missing["other_memory_bytes"] = "the driver does not tell the memory of each process"
    return found


def throttle_reasons(bits: int) -> list[str]:
    """Names of the set bits of clock event reasons, in bit order; a bit without a name is given by its value."""
    set_bits = (1 << position for position in range(bits.bit_length()) if bits >> position & 1)
    return [THROTTLE_REASONS.get(bit, f"unknown_{bit:#x}") for bit in set_bits]


def _read(
    gpu: Gpu,
    name: str,
    convert: Callable[[Any], Any],
    function: str,
    arguments: tuple[Any, ...] = (),
    *,
    of_device: bool = True,
) -> Any:
    answer = gpu.ask(name, function, *arguments, of_device=of_device)
    return None if answer is None else convert(answer)


def _handle(library: Any, index: int, uuid: str | None, environ: Mapping[str, str]) -> Any:
    if uuid is not None:
        return library.nvmlDeviceGetHandleByUUID(uuid)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        if index >= library.nvmlDeviceGetCount():
            raise NvmlUnavailable(f"there is no GPU {index}")
        return library.nvmlDeviceGetHandleByIndex(index)
    entries = [entry.strip() for entry in visible.split(",")]
    # CUDA stops at the first entry that is no device
    entry = entries[index] if index < len(entries) else ""
    if entry.isdigit():
        return library.nvmlDeviceGetHandleByIndex(int(entry))
    if entry.startswith("MIG-"):
        return library.nvmlDeviceGetHandleByUUID(entry)
    if entry.startswith("GPU-"):
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        # CUDA accepts any unambiguous beginning of a UUID
        for handle in handles:
            if _text(library.nvmlDeviceGetUUID(handle)).startswith(entry):
                return handle
    raise NvmlUnavailable(f"CUDA_VISIBLE_DEVICES leaves no GPU {index} visible")


def _descends_from(pid: int, ancestor: int) -> bool:
    current: int | None = pid
    while current and current != ancestor:
        current = machine.parent_process(current)
    return current == ancestor


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def _first_flag(modes: list[int]) -> bool:
    """NVML answers such questions with the present and the pending mode."""
    return bool(modes[0])


def _from_milli(value: int) -> float:
    return value / 1000


def _from_mega(value: int) -> float:
    return value * 1e6


def _cuda_version(value: int) -> str:
    """13000 means 13.0 and 12080 means 12.8."""
    return f"{value // 1000}.{value % 1000 // 10}"
