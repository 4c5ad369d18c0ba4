"""A kernel of known length, to check the timer itself. Owns that kernel and nothing else."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from smbench.worker.timing import Spec, measure
from smbench_kernels.launch import jit

SHORT_NS = 50_000
LONG_NS = 450_000
"""The difference of the two is compared, so that launch cost and the start of the spin cancel."""


@jit()
def _spin(out: tl.tensor, nanoseconds: tl.tensor) -> None:
    """Busy-wait until the GPU's own nanosecond clock has advanced by `nanoseconds`."""
    start = globaltimer()
    now = start
    while now - start < nanoseconds:
        now = globaltimer()
    tl.store(out, now - start)


def check_timer(device: torch.device, stream: torch.cuda.Stream) -> list[dict[str, Any]]:
    """Time a spin of 400 µs by each method; a trusted timer measures what it expects within 2 %."""
    out = torch.zeros(1, dtype=torch.int64, device=device)
    checks = []
    for method in ("graph", "event"):
        medians = []
        for nanoseconds in (SHORT_NS, LONG_NS):

            def spin(nanoseconds: int = nanoseconds) -> None:
                _spin[(1,)](out, nanoseconds)

            with torch.cuda.stream(stream):
                spin()
            spec = Spec("timer", method, "warm", 1, 1, warmup=2, samples=9, min_samples=9, window_s=1.0)
            samples = sorted(measure(spec, [spin], stream, None).samples_s)
            medians.append(samples[len(samples) // 2])
        checks.append(
            {"method": method, "expected_s": (LONG_NS - SHORT_NS) * 1e-9, "measured_s": medians[1] - medians[0]}
        )
    return checks
