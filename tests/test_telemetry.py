"""Which readings belong to a cell, and what a card that tells little leaves out."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from fake_nvml import FakeNvml, NVMLErrorNotSupported, install, process
from smbench.nvml import open_gpu
from smbench.worker.telemetry import NullSampler, Sampler, open_telemetry


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture(name="nvml")
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return install(monkeypatch)


@pytest.fixture(name="clock")
def stopped_clock() -> Clock:
    return Clock()


def sampled(nvml: FakeNvml, clock: Clock, times_s: list[float]) -> Sampler:
    """A sampler with a reading at each time, whose power is that time in watts."""
    sampler = Sampler(open_gpu(), clock=clock)
    for time_s in times_s:
        clock.time_s = time_s
        nvml.answers["nvmlDeviceGetPowerUsage"] = time_s * 1000
        sampler.sample()
    return sampler


def test_window_holds_the_readings_within(nvml: FakeNvml, clock: Clock) -> None:
    window = sampled(nvml, clock, [10.0, 10.5, 11.0, 11.5, 12.0]).window(10.5, 11.5)
    assert window == {
        "period_s": 0.1,
        "time_s": [0.0, 0.5, 1.0],
        "sm_clock_hz": [1965e6] * 3,
        "memory_clock_hz": [3201e6] * 3,
        "power_w": [10.5, 11.0, 11.5],
        "temperature_c": [33] * 3,
        "utilization_fraction": [0.28] * 3,
        "memory_used_bytes": [2 << 20] * 3,
        "throttle_reason_bits": 1,
        "throttle_reasons": ["idle"],
        "compute_processes": 0,
        "other_processes": 0,
        "other_memory_bytes": 0,
        "missing": {},
    }


def test_a_window_between_readings_has_one_on_each_side(nvml: FakeNvml, clock: Clock) -> None:
    window = sampled(nvml, clock, [1.0, 2.0, 3.0, 4.0]).window(2.25, 2.75)
    assert (window["time_s"], window["power_w"]) == ([-0.25, 0.75], [2.0, 3.0])


def test_a_window_after_the_last_reading_takes_one_now(nvml: FakeNvml, clock: Clock) -> None:
    sampler = sampled(nvml, clock, [1.0, 2.0])
    clock.time_s = 5.5
    assert sampler.window(5.0, 5.25)["time_s"] == [-3.0, 0.5]


def test_a_window_before_the_first_reading_has_the_first(nvml: FakeNvml, clock: Clock) -> None:
    assert sampled(nvml, clock, [3.0, 4.0]).window(1.0, 2.0)["time_s"] == [2.0]


def test_a_sampler_that_was_never_started_reads_once(nvml: FakeNvml, clock: Clock) -> None:
    assert Sampler(open_gpu(), clock=clock).window(0.0, 0.0)["time_s"] == [0.0]


def test_a_window_that_ends_before_it_begins_is_an_error(nvml: FakeNvml, clock: Clock) -> None:
    with pytest.raises(ValueError, match="ends before it begins"):
        Sampler(open_gpu(), clock=clock).window(2.0, 1.0)


def test_throttle_bits_are_ored_over_the_window_only(nvml: FakeNvml, clock: Clock) -> None:
    sampler = Sampler(open_gpu(), clock=clock)
    for time_s, bits in [(1.0, 0x80), (2.0, 0x4), (3.0, 0x0), (4.0, 0x40), (5.0, 0x8)]:
        clock.time_s = time_s
        nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"] = bits
        sampler.sample()
    window = sampler.window(2.0, 4.0)
    assert window["throttle_reason_bits"] == 0x44
    assert window["throttle_reasons"] == ["sw_power_cap", "hw_thermal_slowdown"]


def test_fields_that_the_card_lacks_are_absent_with_the_reason(nvml: FakeNvml, clock: Clock) -> None:
    nvml.answers |= {
        "nvmlDeviceGetTemperature": NVMLErrorNotSupported(),
        "nvmlDeviceGetCurrentClocksEventReasons": NVMLErrorNotSupported(),
        "nvmlDeviceGetComputeRunningProcesses": NVMLErrorNotSupported(),
    }
    window = sampled(nvml, clock, [1.0, 2.0]).window(1.0, 2.0)
    assert window["power_w"] == [1.0, 2.0]
    assert not {"temperature_c", "throttle_reasons", "throttle_reason_bits", "other_processes"} & set(window)
    assert window["missing"] == dict.fromkeys(
        ["temperature_c", "throttle_reason_bits", "compute_processes"], "Not Supported"
    )


def test_a_field_that_failed_once_is_absent_from_that_window_only(nvml: FakeNvml, clock: Clock) -> None:
    sampler = sampled(nvml, clock, [1.0, 2.0])
    working = nvml.answers["nvmlDeviceGetClockInfo"]
    clock.time_s, nvml.answers["nvmlDeviceGetClockInfo"] = 3.0, NVMLErrorNotSupported()
    sampler.sample()
    clock.time_s, nvml.answers["nvmlDeviceGetClockInfo"] = 4.0, working
    sampler.sample()
    assert "sm_clock_hz" not in sampler.window(2.0, 4.0)
    assert sampler.window(1.0, 2.0)["sm_clock_hz"] == [1965e6] * 2


def test_the_largest_number_of_other_processes_counts(nvml: FakeNvml, clock: Clock) -> None:
    sampler = sampled(nvml, clock, [1.0])
    clock.time_s = 2.0
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [process(1, 1 << 30)]
    sampler.sample()
    window = sampler.window(1.0, 2.0)
    assert (window["other_processes"], window["other_memory_bytes"]) == (1, 1 << 30)


def test_processes_are_listed_once_a_second(nvml: FakeNvml, clock: Clock) -> None:
    sampled(nvml, clock, [0.0, 0.25, 0.5, 0.75, 1.0, 1.25])
    assert nvml.calls.count("nvmlDeviceGetComputeRunningProcesses") == 2


def test_now_is_one_reading_outside_the_record(nvml: FakeNvml, clock: Clock) -> None:
    sampler = sampled(nvml, clock, [1.0])
    nvml.answers["nvmlDeviceGetUtilizationRates"] = SimpleNamespace(gpu=100, memory=0)
    now = sampler.now()
    assert (now["utilization_fraction"], now["throttle_reasons"], now["other_processes"]) == (1.0, ["idle"], 0)
    assert sampler.window(0.0, 2.0)["utilization_fraction"] == [0.28]


def test_the_thread_samples_between_start_and_stop(nvml: FakeNvml) -> None:
    began_s = time.monotonic()
    with Sampler(open_gpu(), period_s=0.005) as sampler:
        time.sleep(0.1)
    count = len(sampler.window(began_s, time.monotonic())["time_s"])
    assert count >= 3
    time.sleep(0.02)
    assert len(sampler.window(began_s, time.monotonic())["time_s"]) == count


def test_starting_twice_is_an_error_and_stopping_twice_is_not(nvml: FakeNvml) -> None:
    sampler = Sampler(open_gpu())
    sampler.start()
    with pytest.raises(RuntimeError, match="already runs"):
        sampler.start()
    sampler.stop()
    sampler.stop()


def test_a_machine_without_a_gpu_has_a_null_sampler_with_the_reason(nvml: FakeNvml) -> None:
    with open_telemetry(environ={"CUDA_VISIBLE_DEVICES": ""}) as sampler:
        assert isinstance(sampler, NullSampler)
        assert sampler.now() == {}
        assert sampler.window(0.0, 1.0) == {"missing": {"gpu": "CUDA_VISIBLE_DEVICES leaves no GPU 0 visible"}}


@pytest.mark.gpu
def test_a_loaded_gpu_shows_its_clock_and_no_other_process() -> None:
    import torch

    values = torch.ones(4096, 4096, device="cuda", dtype=torch.float16)
    with open_telemetry() as sampler:
        began_s = time.monotonic()
        while time.monotonic() < began_s + 0.5:
            torch.mm(values, values)
            torch.cuda.synchronize()
        window = sampler.window(began_s, time.monotonic())
    assert len(window["time_s"]) >= 3
    assert max(window["sm_clock_hz"]) > 500e6
    assert window.get("other_processes", 0) == 0
