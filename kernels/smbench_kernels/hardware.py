"""Facts of devices that the models of the default configurations start from. Owns no measurement and no roofline."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a model needs to know of a device."""

    capability: int
    """Compute capability, 90 for sm_90."""
    sm_count: int
    memory_bytes_per_s: float
    l2_bytes: int
    threads_per_sm: int
    """Most resident threads of one multiprocessor."""
    shared_bytes_per_program: int
    """Most shared memory that one thread block may ask for."""

    def facts(self) -> dict[str, float]:
        """The keys that `Tunable.predict` reads."""
        return {
            "capability": float(self.capability),
            "sm_count": float(self.sm_count),
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "l2_bytes": float(self.l2_bytes),
            "threads_per_sm": float(self.threads_per_sm),
            # a program may use all of a multiprocessor's shared memory but 1 KiB
            "shared_bytes_per_sm": float(self.shared_bytes_per_program + KIB),
        }


# limits: CUDA programming guide, compute capabilities; SM count, bandwidth and L2: NVIDIA's data sheets of the named
# card, which stands for its capability where no device is present
TYPICAL = {
    80: Hardware(80, 108, 2.039e12, 40 * MIB, 2048, 163 * KIB),  # A100 SXM 80 GB
    86: Hardware(86, 82, 0.936e12, 6 * MIB, 1536, 99 * KIB),  # GeForce RTX 3090
    89: Hardware(89, 142, 0.864e12, 96 * MIB, 1536, 99 * KIB),  # L40
    90: Hardware(90, 132, 4.8e12, 50 * MIB, 2048, 227 * KIB),  # H200 SXM
}


def typical(capability: int) -> Hardware:
    """The row of a capability, or of the next lower one that has a row: its limits hold there too."""
    known = [row for row in sorted(TYPICAL) if row <= capability]
    if not known:
        raise ValueError(f"compute capability {capability} is below the lowest supported, {min(TYPICAL)}")
    return TYPICAL[known[-1]]


def of(device: torch.device) -> Hardware:
    """A CUDA device's own counts with its capability's bandwidth; for any other device the row of sm_90."""
    if device.type != "cuda":
        return TYPICAL[90]
    properties = torch.cuda.get_device_properties(device)
    return replace(
        typical(properties.major * 10 + properties.minor),
        capability=properties.major * 10 + properties.minor,
        sm_count=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        threads_per_sm=properties.max_threads_per_multi_processor,
    )
