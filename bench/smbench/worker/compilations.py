"""Counts and times kernel compilations of this process. Owns the listeners that Triton and `nvrtc` call."""

from __future__ import annotations

import importlib.util
from typing import Any


class Compilations:
    """How many kernels this process compiled, and for how long; a cache hit is not a compilation."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        if importlib.util.find_spec("triton") is not None:
            from triton import knobs

            from smbench_kernels import nvrtc

            knobs.compilation.listener = self._listen
            nvrtc.LISTENERS[:] = [self._count]

    def _listen(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            # Triton reports microseconds
            self._count(times.total * 1e-6)

    def _count(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds
