"""Binds a Triton kernel to its arguments, with as little host work per call as possible. Owns no configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from smbench_kernels import interpreter

if interpreter.active():
    interpreter.apply()


def jit(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit` with types."""

    def decorate(function: Callable[..., None]) -> Any:
        return triton.jit(function, **options)

    return decorate


SHARED_BYTES = 96 * 1024
"""Most shared memory for tiles in flight: every supported card has it, sm86 and sm89 the least with 99 KiB."""


@dataclass(frozen=True, slots=True)
class Call:
    """Everything that a launch passes. To compile without tensors, `arguments` holds dtypes in their place."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    """All parameters of the kernel in order, the compile-time constants included."""
    options: Mapping[str, int]
    """num_warps and num_stages."""

    def binary(self) -> str:
        """What decides which compiled kernel runs: constants, options, dtypes, and what Triton bakes in of integers."""
        parts = [f"{name}={value}" for name, value in sorted(self.options.items())]
        for parameter, value in zip(self.kernel.params, self.arguments, strict=True):
            if parameter.is_constexpr:
                parts.append(f"{parameter.name}={value}")
            elif isinstance(value, int) and not parameter.do_not_specialize:
                # Triton compiles 1 and multiples of 16 apart
                parts.append(f"{parameter.name}:{'1' if value == 1 else '16' if value % 16 == 0 else 'any'}")
            elif isinstance(value, torch.dtype):
                parts.append(f"{parameter.name}:{value}")
        return " ".join(parts)


class Launcher:
    """Runs a call; the first run compiles it, later ones skip Triton's argument binding."""

    __slots__ = ("_arguments", "_call", "_compiled", "_start")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._arguments = call.arguments
        self._compiled: Any = None
        self._start: Callable[..., None] | None = None

    def __call__(self) -> None:
        if self._start is not None:
            self._start(*self._arguments)
            return
        self._compiled = self._call.kernel[self._call.grid](*self._arguments, **self._call.options)
        # the interpreter compiles nothing
        if self._compiled is not None:
            self._start = self._compiled[self._call.grid]

    def kernels(self) -> dict[str, dict[str, int]]:
        """What was compiled, by kernel name; empty before the first run and under the interpreter."""
        if self._compiled is None:
            return {}
        metadata = self._compiled.metadata
        return {
            str(metadata.name): {
                "num_warps": metadata.num_warps,
                "num_stages": metadata.num_stages,
                "shared_bytes": metadata.shared,
                "registers": self._compiled.n_regs,
                "spills": self._compiled.n_spills,
            }
        }


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial sums of a split reduction: `partials` float32, `counters` int32 that are zero between launches."""

    partials: Any
    counters: Any

    @classmethod
    def allocate(cls, partials: int, counters: int, device: torch.device) -> Workspace:
        """Tensors on a device, at least one element each."""
        return cls(
            torch.empty(max(1, partials), dtype=torch.float32, device=device),
            torch.zeros(max(1, counters), dtype=torch.int32, device=device),
        )


def next_power_of_two(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, by: int) -> int:
    """`value / by`, rounded up."""
    return -(-value // by)
