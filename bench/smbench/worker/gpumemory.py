"""GPU memory that others hold, before a server starts and after it has ended. Owns the wait; imports NVML when asked.

Only for processes that fork no user of the GPU any more: NVML stays open.
"""

from __future__ import annotations

import sys
import time

from smbench.nvml import Gpu, NvmlUnavailable, instant, open_gpu

SLACK_BYTES = 256 << 20
"""A GPU counts as free again with this much more in use than before."""
LIMIT_S = 30.0
POLL_S = 0.1


class Idle:
    """How much of the GPU was in use when this was made."""

    def __init__(self, device: str) -> None:
        self._gpu: Gpu | None = None
        if device == "cuda":
            try:
                self._gpu = open_gpu()
            except NvmlUnavailable as error:
                sys.stderr.write(f"{error}\n")
        self._bytes = self._used()

    def wait(self) -> None:
        """Return once no more is in use than then; say so where that does not come about."""
        deadline = time.monotonic() + LIMIT_S
        while self._bytes is not None and (used := self._used()) is not None and used > self._bytes + SLACK_BYTES:
            if time.monotonic() > deadline:
                sys.stderr.write(f"{used} bytes of the GPU stay in use, {self._bytes} were before the first server\n")
                return
            # the driver takes back a dead process's memory a while after its end
            time.sleep(POLL_S)

    def _used(self) -> int | None:
        return None if self._gpu is None else instant(self._gpu).get("memory_used_bytes")
