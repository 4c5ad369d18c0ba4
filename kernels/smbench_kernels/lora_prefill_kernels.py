"""Sources, macros and shared memory of the Hopper prefill kernels by their parameters. Launches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from smbench_kernels import hardware, lora_prefill_expand_source, lora_prefill_shrink_source, lora_prefill_source
from smbench_kernels.launch import ceil_div
from smbench_kernels.sm90_primitives import product

CAPABILITY, FEATURES = 90, "a"
"""wgmma is sm_90a's alone."""
TOKENS = (64, 128)
"""Rows of a tile: one group of four warps multiplies 64."""
COLUMNS = 64
"""Columns of a copy: 128 bytes, the widest that a swizzle goes over."""
BOX, FEW = 16, 4
"""Rows that come as one box where they are neighbours; a warp stores as many as the first."""
COPY_WARPS = 4
WIDEST = 192
"""Most columns of shrink's sums: they have to fit into registers, and into shared memory where blocks exchange them."""
MOST_SLICES, MOST_STAGES = 3, 12
ROOM = hardware.TYPICAL[CAPABILITY].shared_bytes_per_program
RESERVED = hardware.KIB
"""Shared memory that every resident block costs beside its own; also what aligning tiles may cost."""
REGISTERS = 65536
"""Of a multiprocessor."""
BARRIER_BYTES = 8
WARP = 32


class DoesNotFit(ValueError):
    """No ring of two buffers fits the shared memory that a block may have, or no thread's values its registers."""


def _stages(stage_bytes: int, other_bytes: int, per_sm: int, threads: int, registers: int) -> int:
    """As many buffers as there is room for, each with two barriers; where a thread can have so many registers."""
    if registers > REGISTERS // (per_sm * threads):
        raise DoesNotFit(f"{per_sm} blocks of {threads} threads have no {registers} registers for each thread")
    room = (ROOM + RESERVED) // per_sm - RESERVED - other_bytes - RESERVED - 2 * BARRIER_BYTES
    found = min(MOST_STAGES, room // (stage_bytes + 2 * BARRIER_BYTES))
    if found < 2:
        raise DoesNotFit(f"a buffer of {stage_bytes} bytes beside {other_bytes} is too large for {per_sm} blocks")
    return found


@dataclass(frozen=True)
class Shrink:
    """Parameters of the shrink kernel, all of which are compiled in."""

    tokens: int
    """Rows of a tile."""
    rank: int
    slices: int
    cluster: int
    """Thread blocks that share a tile's columns."""
    chunks: int
    """Times 64 columns that are copied together."""
    per_sm: int
    """Thread blocks that a multiprocessor should hold."""
    accumulate: bool
    planned: bool
    """Tiles come from a plan, else from sequences."""
    dtype: torch.dtype
    split: int = 1
    """Shares of a slice's ranks, each of them a block's: more blocks, each of which reads x."""

    name = "lora_prefill_shrink"

    @property
    def ranks(self) -> int:
        """Ranks of a slice that a block takes at once: equal shares, multiples of 8."""
        most = WIDEST // self.slices // 8 * 8
        return ceil_div(ceil_div(self.rank, max(self.split, ceil_div(self.rank, most))), 8) * 8

    @property
    def rank_tiles(self) -> int:
        return ceil_div(self.rank, self.ranks)

    def places(self, sms: int) -> int:
        """Clusters that so many multiprocessors hold at once, as far as can be told without asking the driver."""
        # those of more than two blocks need neighbours, of which every unit of the chip leaves some over
        return max(1, self.per_sm * sms // self.cluster * (8 if self.cluster > 2 else 9) // 9)

    @property
    def threads(self) -> int:
        return 2 * self.tokens + COPY_WARPS * WARP

    @property
    def _part_bytes(self) -> int:
        return 4 * self.tokens * (self.slices * self.ranks + 8) if self.cluster > 1 else 0

    @property
    def stage_bytes(self) -> int:
        return 2 * COLUMNS * self.chunks * (self.tokens + self.slices * self.ranks)

    @cached_property
    def stages(self) -> int:
        # a row's sums, later four parts of every block of the cluster, and addresses
        registers = max(self.slices * self.ranks // 2, 4 * self.cluster) + 48
        return _stages(self.stage_bytes, self._part_bytes, self.per_sm, self.threads, registers)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.stage_bytes + 2 * BARRIER_BYTES) + self._part_bytes + RESERVED + 2 * BARRIER_BYTES

    @property
    def products(self) -> str:
        return product("multiply_add", self.slices * self.ranks, first_in_registers=False, add=True)

    @property
    def kernel(self) -> str:
        return lora_prefill_shrink_source.KERNEL

    @property
    def macros(self) -> dict[str, int]:
        return {
            **{"TOKENS": self.tokens, "RANKS": self.ranks, "SLICES": self.slices, "CLUSTER": self.cluster},
            **{
                "ABREAST": self.chunks,
                "STAGES": self.stages,
                "PER_SM": self.per_sm,
                "ACCUMULATE": int(self.accumulate),
            },
            **{"PLANNED": int(self.planned), "BFLOAT16": int(self.dtype == torch.bfloat16)},
        }


@dataclass(frozen=True)
class Expand:
    """Parameters of the expand kernel, all of which are compiled in."""

    tokens: int
    rank: int
    slices: int
    chunks: int
    per_sm: int
    dependent: bool
    """x comes from the kernel before, which may still run."""
    planned: bool
    dtype: torch.dtype

    name = "lora_prefill_expand"

    @property
    def inner(self) -> int:
        """The rank as products and copies take it."""
        for least in (16, 32):
            if self.rank <= least:
                return least
        return ceil_div(self.rank, COLUMNS) * COLUMNS

    @property
    def threads(self) -> int:
        return 2 * self.tokens + COPY_WARPS * WARP

    @property
    def _x_bytes(self) -> int:
        return 2 * COLUMNS * self.tokens * ceil_div(self.inner, COLUMNS)

    @property
    def stage_bytes(self) -> int:
        return 2 * COLUMNS * self.chunks * (self.tokens + self.inner)

    @cached_property
    def stages(self) -> int:
        # 64 outputs and y of a row, addresses, and x of the next run as far as it is loaded ahead
        registers = 80 + (self.inner // 2 if self.inner <= 128 else 32)
        return _stages(self.stage_bytes, self._x_bytes, self.per_sm, self.threads, registers)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.stage_bytes + 2 * BARRIER_BYTES) + self._x_bytes + RESERVED

    @property
    def products(self) -> str:
        return "".join(
            product(name, COLUMNS, first_in_registers=False, add=add)
            for name, add in (("multiply", False), ("multiply_add", True))
        )

    @property
    def kernel(self) -> str:
        return lora_prefill_expand_source.KERNEL

    @property
    def macros(self) -> dict[str, int]:
        return {
            **{"TOKENS": self.tokens, "INNER": self.inner, "SLICES": self.slices, "STAGES": self.stages},
            **{"ABREAST": self.chunks, "PER_SM": self.per_sm, "DEPENDENT": int(self.dependent)},
            **{"PLANNED": int(self.planned), "BFLOAT16": int(self.dtype == torch.bfloat16)},
        }


def source(kernel: Shrink | Expand) -> str:
    """The whole CUDA C++ of a kernel."""
    return lora_prefill_source.source(kernel.products, kernel.kernel)
