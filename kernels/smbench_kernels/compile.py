"""Compiles a launch for a compute capability without a GPU, and reads what the result needs. Owns no configuration.

The launch goes through `JITFunction.warmup`, the same path and specialization as a real launch, with a stand-in for
the driver: the compiled kernel lands in Triton's cache under the key that a run on such a device looks up.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from smbench_kernels import interpreter
from smbench_kernels.launch import Call

WARP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Resources:
    """What one thread block of a compiled kernel takes."""

    shared_bytes: int
    registers: int
    """Of one thread."""
    stack_bytes: int
    """Of one thread, in local memory: registers that were spilled, and arrays."""
    key: str
    """Cache key of the compiled kernel."""


class _Device:
    """Stands in for Triton's driver: a device of one capability, of which only the target is ever asked."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, WARP_SIZE)

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels per device: no key of a real one, and one for each capability
        return f"sm{self._capability}, not present"

    def get_current_stream(self, _device: str) -> int:
        return 0


def compile_for(call: Call, capability: int) -> Any:
    """Triton's CompiledKernel of a call for a capability (80, 86, 89, 90 or another that Triton knows).

    RuntimeError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if interpreter.active():
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted in this process, not compiled")
    with _standing_in(_Device(capability)):
        return call.kernel.warmup(*call.arguments, grid=call.grid, **call.options)


def resources(compiled: Any) -> Resources:
    """Shared memory, registers and stack of a compiled kernel. CalledProcessError where its cubin cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return Resources(
        shared_bytes=compiled.metadata.shared,
        registers=_usage(dump, "REG"),
        stack_bytes=_usage(dump, "STACK"),
        key=compiled.hash,
    )


def _usage(dump: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", dump)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage names no {name}: {dump.strip()!r}")
    return int(found[1])


@contextmanager
def _standing_in(device: _Device) -> Iterator[None]:
    """Make a stand-in Triton's active driver, and a real one active again afterwards."""
    driver.set_active(device)
    try:
        yield
    finally:
        # without a GPU there is no real driver to go back to
        if torch.cuda.is_available():
            driver.reset_active()
