"""The GPU's clocks, power, temperature and limits while it is measured: a thread that reads NVML at a fixed period.

Owns when readings are taken and which belong to an interval. Does not own how one is taken (nvml.py), nor statistics:
readings go out as they came in.
"""

from __future__ import annotations

import bisect
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from smbench.nvml import Gpu, NvmlUnavailable, instant, open_gpu, other_processes, throttle_reasons

PERIOD_S = 0.1
PROCESSES_PERIOD_S = 1.0
"""Processes come and go slowly, and listing them costs more than the other questions together."""
COLUMNS = ("sm_clock_hz", "memory_clock_hz", "power_w", "temperature_c", "utilization_fraction", "memory_used_bytes")


class Telemetry(Protocol):
    """What the worker needs of a sampler."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def now(self) -> dict[str, Any]: ...

    def window(self, start_s: float, end_s: float) -> dict[str, Any]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_telemetry(
    index: int = 0, uuid: str | None = None, period_s: float = PERIOD_S, environ: Mapping[str, str] = os.environ
) -> Telemetry:
    """A sampler of the GPU that this process calls device `index`, or a null sampler that says why there is none."""
    try:
        return Sampler(open_gpu(index, uuid, environ), period_s)
    except NvmlUnavailable as error:
        return NullSampler(str(error))


class Sampler:
    """Reads one GPU every `period_s` seconds between start() and stop(). Times are those of time.monotonic()."""

    def __init__(self, gpu: Gpu, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._gpu = gpu
        self._period_s = period_s
        self._clock = clock
        self._readings = _Series()
        self._processes = _Series()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take a first reading and begin. RuntimeError when it already runs."""
        if self._thread is not None:
            raise RuntimeError("this sampler already runs")
        self._stopping.clear()
        self.sample()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, with a last reading. Readings stay available; a second call does nothing."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        self._thread = None
        self.sample()

    def sample(self) -> None:
        """Take one reading into the record now."""
        with self._lock:
            time_s = self._clock()
            self._readings.append(time_s, instant(self._gpu))
            if time_s - self._processes.last_s >= PROCESSES_PERIOD_S:
                self._processes.append(time_s, dict(other_processes(self._gpu)))

    def now(self) -> dict[str, Any]:
        """One reading as of now, outside the record: the fields of nvml.instant and nvml.other_processes."""
        with self._lock:
            reading = {**instant(self._gpu), **other_processes(self._gpu)}
        bits = reading.get("throttle_reason_bits")
        return reading if bits is None else {**reading, "throttle_reasons": throttle_reasons(bits)}

    def window(self, start_s: float, end_s: float) -> dict[str, Any]:
        """The readings of an interval of time.monotonic(), JSON-able.

        `time_s` (seconds after `start_s`) and every column of COLUMNS are lists of one length; a column that the card
        did not answer for each of them is absent, its reason in `missing`. Reason bits are OR-ed over the readings.
        An interval shorter than the period gets the nearest reading on each side, the later one taken now if need be.
        """
        if end_s < start_s:
            raise ValueError(f"the interval ends before it begins: {start_s} > {end_s}")
        if self._readings.last_s < start_s:
            self.sample()
        with self._lock:
            readings = self._readings.around(start_s, end_s)
            processes = self._processes.around(start_s, end_s)
            missing = dict(self._gpu.missing)
        found: dict[str, Any] = {"period_s": self._period_s, "time_s": [time_s - start_s for time_s, _ in readings]}
        for column in COLUMNS:
            if all(column in reading for _, reading in readings):
                found[column] = [reading[column] for _, reading in readings]
        flags = [reading["throttle_reason_bits"] for _, reading in readings if "throttle_reason_bits" in reading]
        if flags:
            bits = 0
            for flag in flags:
                bits |= flag
            found["throttle_reason_bits"] = bits
            found["throttle_reasons"] = throttle_reasons(bits)
        for name in ("compute_processes", "other_processes", "other_memory_bytes"):
            counts = [listing[name] for _, listing in processes if name in listing]
            if counts:
                found[name] = max(counts)
        found["missing"] = missing
        return found

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            self.sample()


class NullSampler:
    """Stands where there is no GPU to read: same questions, empty answers, and the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def now(self) -> dict[str, Any]:
        """No fields: there is nothing to read."""
        return {}

    def window(self, start_s: float, end_s: float) -> dict[str, Any]:
        """Only the reason."""
        return {"missing": {"gpu": self._reason}}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""


class _Series:
    """Values in the order of their times. Thousands of cells look into one long session: hence the bisection."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._values: list[dict[str, Any]] = []

    @property
    def last_s(self) -> float:
        """Time of the newest value, minus infinity before the first."""
        return self._times_s[-1] if self._times_s else -math.inf

    def append(self, time_s: float, value: dict[str, Any]) -> None:
        self._times_s.append(time_s)
        self._values.append(value)

    def around(self, start_s: float, end_s: float) -> list[tuple[float, dict[str, Any]]]:
        """The values within an interval; where there are none, the last one before and the first one after it."""
        first, last = bisect.bisect_left(self._times_s, start_s), bisect.bisect_right(self._times_s, end_s)
        if first == last:
            first, last = max(0, first - 1), last + 1
        return list(zip(self._times_s[first:last], self._values[first:last], strict=True))
