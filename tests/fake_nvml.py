"""A stand-in for the module pynvml with exact answers. Owns one idle H200; tests change `answers` to what they need."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FIXED_FACTS = {
    "name": "NVIDIA H200",
    "compute_capability": [9, 0],
    "memory_bytes": 150754820096,
    "ecc_enabled": True,
    "power_limit_w": 700.0,
    "power_limit_default_w": 700.0,
    "max_sm_clock_hz": 1980e6,
    "max_memory_clock_hz": 3201e6,
    "application_sm_clock_hz": 1980e6,
    "application_memory_clock_hz": 3201e6,
    "default_application_sm_clock_hz": 1980e6,
    "persistence_enabled": True,
    "mig_enabled": False,
    "max_pcie_generation": 5,
    "max_pcie_width": 16,
    "driver_version": "580.159.04",
    "cuda_driver_version": "13.0",
}
"""What `nvml.fixed_facts` makes of this card's answers."""
UUID = "GPU-11111111-2222-3333-4444-555555555555"


class NVMLError(Exception):
    """As in the bindings: str() is the driver's wording."""


class NVMLErrorNotSupported(NVMLError):
    def __init__(self) -> None:
        super().__init__("Not Supported")


class FakeNvml(ModuleType):
    """Functions answer from `answers`: a value, an exception to raise, or a function of the arguments."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    nvmlMemory_v2 = 0x02000028

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.calls: list[str] = []
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": lambda index: f"card{index}",
            "nvmlDeviceGetHandleByUUID": lambda uuid: f"card of {uuid}",
            "nvmlDeviceGetUUID": lambda handle: UUID if handle == "card1" else "GPU-99999999-0000",
            "nvmlSystemGetDriverVersion": "580.159.04",
            "nvmlSystemGetCudaDriverVersion": 13000,
            "nvmlDeviceGetName": "NVIDIA H200",
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=150754820096, used=2 << 20),
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetApplicationsClock": lambda handle, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetDefaultApplicationsClock": lambda handle, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetMigMode": [0, 0],
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1965, 2: 3201}[kind],
            "nvmlDeviceGetPowerUsage": 84_490,
            "nvmlDeviceGetTemperature": 33,
            "nvmlDeviceGetCurrentClocksEventReasons": 1,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=28, memory=3),
            "nvmlDeviceGetComputeRunningProcesses": [],
        }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers = self.__dict__.get("answers", {})
        if name not in answers:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            answer = answers[name]
            if isinstance(answer, Exception):
                raise answer
            if not callable(answer):
                return answer
            return answer(*arguments)

        return call


def process(pid: int, used: int | None) -> SimpleNamespace:
    """One compute process as the driver lists it."""
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Put the fake in the place of the real bindings, with no CUDA_VISIBLE_DEVICES."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake
