"""The HSTU layer's linear maps on Hopper in CUDA C++: tiles, launches, what they take. Device code is elsewhere.

`hstu_linear_sm90_source` has it. A launch starts before the kernel in front has ended and waits for that itself, after
it has fetched weights: these must not be what that kernel writes. It waits for nothing else, so that it can be captured
in a CUDA graph. Same tensors, same tiles, same bits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from smbench_kernels import hardware, hstu_launches, nvrtc
from smbench_kernels.hstu_linear_sm90_source import source
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_prefill_maps import MAP_ALIGNMENT, MAP_BYTES, Encode, encoded

CAPABILITY, FEATURES = 90, "a"
"""wgmma is sm_90a's alone."""
CHUNK = 64
"""Columns of a copy: 128 bytes, the widest that a swizzle goes over."""
GROUP_ROWS, DEPTH, STORED_ROWS = 64, 64, 16
"""Rows of a group of four warps; of a buffer's columns of x; that a warp stores at a time."""
ELEMENT_BYTES, BARRIER_BYTES, ALIGNMENT, WARP = 2, 8, 1024, 32
ROOM = hardware.TYPICAL[CAPABILITY].shared_bytes_per_program
MOST_STAGES, WAITING_STORES = 12, 2
NAME = "hstu_linear"


@dataclass(frozen=True, slots=True)
class Tiles:
    """How an output is cut."""

    groups: int
    """Times 64 rows of a tile."""
    columns: int
    """Of a tile: 64, 128, 192 or 256."""


KNOWN: tuple[tuple[Tiles, float], ...] = (
    (Tiles(2, 256), 12.3),
    (Tiles(3, 128), 9.5),
    (Tiles(2, 128), 6.7),
    (Tiles(1, 192), 6.6),
    (Tiles(1, 64), 3.3),
)
"""Tiles to choose from, and the microseconds that a multiprocessor of an H200 takes for one at a depth of 1024."""


@lru_cache(maxsize=1024)
def soonest(rows: int, columns: int, sm_count: int) -> Tiles:
    """Of KNOWN the tiles that take an output [rows, columns] through the multiprocessors soonest."""

    def microseconds(entry: tuple[Tiles, float]) -> float:
        tiles, each = entry
        count = ceil_div(rows, GROUP_ROWS * tiles.groups) * ceil_div(columns, tiles.columns)
        return ceil_div(count, sm_count) * each

    return min(KNOWN, key=microseconds)[0]


@dataclass(frozen=True)
class Product:
    """Parameters of the kernel, all of which are compiled in."""

    tiles: Tiles
    bias: bool
    silu: bool
    residual: bool
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Of a tile."""
        return GROUP_ROWS * self.tiles.groups

    @property
    def threads(self) -> int:
        """Four warps a group, and one that copies."""
        return (4 * self.tiles.groups + 1) * WARP

    @property
    def slots(self) -> int:
        """Parts of 64 columns that lie in shared memory before they are stored; a residual fills all of a tile's."""
        chunks = self.tiles.columns // CHUNK
        return chunks if self.residual else min(chunks, WAITING_STORES)

    @property
    def stage_bytes(self) -> int:
        """Of one buffer."""
        return ELEMENT_BYTES * DEPTH * (self.rows + self.tiles.columns)

    @property
    def _other_bytes(self) -> int:
        return self.slots * self.rows * CHUNK * ELEMENT_BYTES + 2 * BARRIER_BYTES + ALIGNMENT

    @cached_property
    def stages(self) -> int:
        """As many buffers as there is room for."""
        return min(MOST_STAGES, (ROOM - self._other_bytes) // (self.stage_bytes + 2 * BARRIER_BYTES))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block."""
        return self.stages * (self.stage_bytes + 2 * BARRIER_BYTES) + self._other_bytes

    @property
    def macros(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {
            **{"GROUPS": self.tiles.groups, "COLUMNS": self.tiles.columns, "STAGES": self.stages, "SLOTS": self.slots},
            **{"BIAS": int(self.bias), "SILU": int(self.silu), "RESIDUAL": int(self.residual)},
            "BFLOAT16": int(self.dtype == torch.bfloat16),
        }

    def count(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles of one column of an output, and of all of it."""
        along = ceil_div(rows, self.rows)
        return along, along * ceil_div(columns, self.tiles.columns)


def unsupported(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, first: int = 0
) -> str | None:
    """Why the kernel does not take x [T, in] by weight [in, out], SiLU from column `first` on; None where it does."""
    return hstu_launches.missing(x.device) or misfit(x, weight, bias, residual, first)


def misfit(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, first: int = 0
) -> str | None:
    """What of `unsupported` does not depend on the machine."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {x.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "takes no empty matrix"
    if weight.shape[1] % CHUNK or first % CHUNK:
        return f"takes multiples of {CHUNK} columns, not {weight.shape[1]}, SiLU from {first} on"
    for name, matrix in (("x", x), ("weight", weight), ("residual", residual)):
        if matrix is not None and (
            matrix.stride(1) != 1 or matrix.stride(0) * ELEMENT_BYTES % 16 or matrix.data_ptr() % 16
        ):
            return f"{name} needs rows of adjacent elements at multiples of 16 bytes, not strides {matrix.stride()}"
    if bias is not None and (bias.stride(0) != 1 or bias.data_ptr() % 4):
        return f"bias needs adjacent elements at multiples of 4 bytes, not stride {bias.stride(0)}"
    return None


def partly_activated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, first: int) -> torch.Tensor:
    """`x @ weight + bias`, SiLU applied to the columns from `first` on: tensors that `unsupported` does not refuse."""
    y = x.new_empty((x.shape[0], weight.shape[1]))
    tiles = soonest(*y.shape, _sm_count(x.device))
    multiply(x, weight, bias, None, y, Product(tiles, True, True, False, x.dtype), first)
    return y


def added(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`x @ weight + residual`: tensors that `unsupported` does not refuse."""
    y = x.new_empty((x.shape[0], weight.shape[1]))
    tiles = soonest(*y.shape, _sm_count(x.device))
    multiply(x, weight, None, residual, y, Product(tiles, False, False, True, x.dtype))
    return y


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    product: Product,
    first: int = 0,
) -> None:
    """y = x @ weight [+ bias] [+ residual], or of that SiLU from column `first` on: all of what `product` says.

    x [T, in], weight [in, out], bias [out], residual and y [T, out], none of which `unsupported` refuses.
    """

    def make() -> hstu_launches.Launch:
        grid, arguments = bound(product, x, weight, bias, residual, y, first, _sm_count(x.device))
        run: hstu_launches.Launch = _loaded(product, x.device).launcher(
            grid, product.threads, product.shared_bytes, arguments, dependent=True
        )
        return run

    hstu_launches.run((product, first, *map(hstu_launches.place, (x, weight, bias, residual, y))), make)


def bound(
    product: Product,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    first: int,
    blocks: int,
    encode: Encode = encoded,
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """Grid and arguments of a launch of at most `blocks` thread blocks: addresses, which keep no tensor alive."""
    (rows, depth), columns = x.shape, weight.shape[1]
    along, tiles = product.count(rows, columns)
    maps = encode(x, [depth, rows], [_row_bytes(x)], [CHUNK, product.rows], CHUNK * ELEMENT_BYTES)
    maps += _by_chunks(weight, DEPTH, product.tiles.columns, encode)
    maps += encode(y, [columns, rows], [_row_bytes(y)], [CHUNK, STORED_ROWS], CHUNK * ELEMENT_BYTES)
    maps += bytes(MAP_BYTES) if residual is None else _by_chunks(residual, product.rows, product.tiles.columns, encode)
    address = ctypes.c_uint64(0 if bias is None else bias.data_ptr())
    sizes = (along, tiles, ceil_div(depth, DEPTH), columns, first)
    return (min(tiles, blocks), 1, 1), (_argument(maps), address, *sizes)


def _by_chunks(matrix: torch.Tensor, rows: int, columns: int, encode: Encode) -> bytes:
    """The map by which `rows` rows of `columns` columns are copied at once, 64 columns behind 64 columns."""
    sizes = [CHUNK, matrix.shape[0], matrix.shape[1] // CHUNK]
    strides = [_row_bytes(matrix), CHUNK * ELEMENT_BYTES]
    return encode(matrix, sizes, strides, [CHUNK, rows, columns // CHUNK], CHUNK * ELEMENT_BYTES)


def _row_bytes(matrix: torch.Tensor) -> int:
    return matrix.stride(0) * ELEMENT_BYTES


def _argument(maps: bytes) -> ctypes.Array[ctypes.c_char]:
    """Bytes as a kernel's argument, aligned as the structure is that they fill."""
    room = (ctypes.c_char * (len(maps) + MAP_ALIGNMENT))()
    found = (ctypes.c_char * len(maps)).from_buffer(room, -ctypes.addressof(room) % MAP_ALIGNMENT)
    found.raw = maps
    return found


@lru_cache(maxsize=64)
def _sm_count(device: torch.device) -> int:
    return hardware.of(device).sm_count


@lru_cache(maxsize=64)
def _loaded(product: Product, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.kernel(source(product.tiles.columns), NAME, product.macros, device, FEATURES)
