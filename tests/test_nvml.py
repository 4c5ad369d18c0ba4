"""One GPU through NVML: which one, what it says, and what happens where it says nothing."""

from __future__ import annotations

import os
import sys

import pytest

from fake_nvml import FIXED_FACTS, UUID, FakeNvml, NVMLError, NVMLErrorNotSupported, install, process
from smbench.nvml import (
    NvmlUnavailable,
    fixed_facts,
    instant,
    open_gpu,
    other_processes,
    throttle_reasons,
    visible_gpus,
)


@pytest.fixture(name="nvml")
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return install(monkeypatch)


def test_fixed_facts_are_in_base_units(nvml: FakeNvml) -> None:
    assert fixed_facts(open_gpu()) == FIXED_FACTS


def test_instant_is_in_base_units(nvml: FakeNvml) -> None:
    assert instant(open_gpu()) == {
        "sm_clock_hz": 1965e6,
        "memory_clock_hz": 3201e6,
        "power_w": 84.49,
        "temperature_c": 33,
        "throttle_reason_bits": 1,
        "utilization_fraction": 0.28,
        "memory_used_bytes": 2 << 20,
    }


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetUtilizationRates", "utilization_fraction"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "throttle_reason_bits"),
    ],
)
def test_a_field_that_is_not_supported_costs_only_itself(nvml: FakeNvml, function: str, field: str) -> None:
    whole = instant(open_gpu())
    nvml.answers[function] = NVMLErrorNotSupported()
    gpu = open_gpu()
    assert instant(gpu) == {name: value for name, value in whole.items() if name != field}
    assert gpu.missing == {field: "Not Supported"}


def test_zero_is_an_answer(nvml: FakeNvml) -> None:
    nvml.answers |= {"nvmlDeviceGetPersistenceMode": 0, "nvmlDeviceGetEccMode": [0, 1]}
    facts = fixed_facts(open_gpu())
    assert (facts["persistence_enabled"], facts["ecc_enabled"]) == (False, False)


def test_older_bindings_have_the_older_name_of_the_reasons(nvml: FakeNvml) -> None:
    del nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"]
    nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 4
    assert instant(open_gpu())["throttle_reason_bits"] == 4


def test_bindings_without_a_function_are_tolerated(nvml: FakeNvml) -> None:
    del nvml.answers["nvmlDeviceGetMigMode"]
    gpu = open_gpu()
    assert "mig_enabled" not in fixed_facts(gpu)
    assert gpu.missing == {"mig_enabled": "these NVML bindings do not know it"}


def test_other_errors_are_not_swallowed(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetPowerUsage"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        instant(open_gpu())


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0, []),
        (0x1, ["idle"]),
        (0x4 | 0x20, ["sw_power_cap", "sw_thermal_slowdown"]),
        (
            0x1FF,
            [
                "idle",
                "applications_clocks_setting",
                "sw_power_cap",
                "hw_slowdown",
                "sync_boost",
                "sw_thermal_slowdown",
                "hw_thermal_slowdown",
                "hw_power_brake",
                "display",
            ],
        ),
        (0x8001, ["idle", "unknown_0x8000"]),
    ],
)
def test_throttle_reasons(bits: int, names: list[str]) -> None:
    assert throttle_reasons(bits) == names


@pytest.mark.parametrize(
    ("visible", "index", "handle"),
    [
        (None, 0, "card0"),
        (None, 1, "card1"),
        ("1", 0, "card1"),
        ("1,0", 1, "card0"),
        (UUID[:12], 0, "card1"),
        ("MIG-abc", 0, "card of MIG-abc"),
    ],
)
def test_visible_devices_choose_the_card(nvml: FakeNvml, visible: str | None, index: int, handle: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert open_gpu(index, environ=environ).handle == handle


def test_a_uuid_chooses_the_card_before_all(nvml: FakeNvml) -> None:
    assert open_gpu(uuid=UUID, environ={"CUDA_VISIBLE_DEVICES": "0"}).handle == f"card of {UUID}"


@pytest.mark.parametrize("visible", ["", "-1", "0,-1,1", "GPU-77"])
def test_hidden_devices_are_said_to_be_hidden(nvml: FakeNvml, visible: str) -> None:
    with pytest.raises(NvmlUnavailable, match="CUDA_VISIBLE_DEVICES leaves no GPU 1 visible"):
        open_gpu(1, environ={"CUDA_VISIBLE_DEVICES": visible})


def test_a_machine_with_too_few_cards(nvml: FakeNvml) -> None:
    with pytest.raises(NvmlUnavailable, match="there is no GPU 2"):
        open_gpu(2)


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("1", 1), ("1,0", 2), ("", 0), ("0,-1,1", 1)])
def test_visible_cards_are_counted_as_cuda_counts_them(nvml: FakeNvml, visible: str | None, count: int) -> None:
    assert visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_no_driver(nvml: FakeNvml) -> None:
    nvml.answers["nvmlInit"] = NVMLError("Driver Not Loaded")
    assert visible_gpus({}) == 0
    with pytest.raises(NvmlUnavailable, match="NVML: Driver Not Loaded"):
        open_gpu()


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match="nvidia-ml-py is not installed"):
        open_gpu()


def test_other_processes_leave_out_this_one_and_its_children(nvml: FakeNvml) -> None:
    own, parent = os.getpid(), os.getppid()
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [process(own, 5), process(parent, 7)]
    assert other_processes(open_gpu()) == {"compute_processes": 2, "other_processes": 1, "other_memory_bytes": 7}
    # seen from the parent, this process is a child of its own
    assert other_processes(open_gpu(), own_pid=parent)["other_processes"] == 0


def test_memory_of_others_is_absent_where_the_driver_does_not_tell(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [process(os.getppid(), None)]
    gpu = open_gpu()
    assert other_processes(gpu) == {"compute_processes": 1, "other_processes": 1}
    assert "other_memory_bytes" in gpu.missing


def test_process_numbers_of_another_namespace_are_not_guessed_at(nvml: FakeNvml) -> None:
    # beyond the largest process number that Linux gives
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [process(1 << 23, 5)]
    gpu = open_gpu()
    assert other_processes(gpu) == {"compute_processes": 1}
    assert "another pid namespace" in gpu.missing["other_processes"]


def test_process_list_not_supported(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = NVMLErrorNotSupported()
    assert other_processes(open_gpu()) == {}
