"""Pages of a device and chunks of a host: moves many between them at once. Owns the kernel and the choice of a way.

Pages of a step lie anywhere on the device and chunks anywhere on the host, 128 KiB a page and layer at document 003's
sizes, 2.4 µs of a PCIe 5 bus: a call for each of them, or for each chunk and a kernel that scatters it, costs the host
and the device more than the bus. So a step has one call a layer, in one of two WAYS: the copy engines take a list of
all pages, or a kernel of few programs reads and writes the host's page-locked memory itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from smbench_kernels import kv_copy_engine as engine
from smbench_kernels.kv_copy_engine import Addresses
from smbench_kernels.kv_staging import Staging
from smbench_kernels.launch import Call, Launcher, jit

WORD = 8
"""Bytes of an element as the kernel sees it."""
ALIGNMENT = 16
"""Bytes that pages are multiples of: what a thread reads at a time."""
WAYS = ("engine", "kernel")
"""`engine`: one call of the driver (`kv_copy_engine`), which takes no multiprocessor; `kernel`: `move_pages`."""
ENGINE_BYTES = 128 << 10
"""Pages from this size on go by the engines, where the driver has the call: 52 to 54 GB/s on an H200, 50 to 51 by the
kernel. The host takes 0.5 µs for each page of a call, so that for much smaller ones the bus would wait for it."""
PROGRAMS, TILE, WARPS = 8, 4096, 8
"""Programs of a launch, words of a tile, warps of a program: 128 bytes a thread are under way, 256 KiB in all. More are
not faster on an H200, a quarter reaches half of it, and each takes part of a multiprocessor from the layers."""


@jit(do_not_specialize=["first_layer", "layers"])
def move_pages(  # type: ignore[no-untyped-def]
    table,
    first_layer,
    layers,
    source_layer_bytes,
    target_layer_bytes,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Copy whole pages of PAGE words in `layers` layers from `first_layer` on.

    table int64: their number, then for each the addresses in layer 0 that it comes from and goes to, multiples of 16.
    Any number of programs shares the tiles of all pages.
    """
    count = tl.load(table)
    parts: tl.constexpr = (PAGE + TILE - 1) // TILE
    each = tl.arange(0, TILE)
    of_layer = count.to(tl.int32) * parts
    for item in range(tl.program_id(0), of_layer * layers, tl.num_programs(0)):
        layer = (first_layer + item // of_layer).to(tl.int64)
        entry = table + 1 + item % of_layer // parts * 2
        source = (tl.load(entry) + layer * source_layer_bytes).to(tl.pointer_type(tl.int64))
        target = (tl.load(entry + 1) + layer * target_layer_bytes).to(tl.pointer_type(tl.int64))
        words = item % parts * TILE + each
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
        if PAGE % TILE == 0:
            # read once: nothing is gained by keeping it in a multiprocessor's cache
            tl.store(target + words, tl.load(source + words, cache_modifier=".cg"))
        else:
            inside = words < PAGE
            tl.store(target + words, tl.load(source + words, mask=inside, cache_modifier=".cg"), mask=inside)


def move_call(
    table: torch.Tensor,
    first_layer: int,
    layers: int,
    source_layer_bytes: int,
    target_layer_bytes: int,
    page_bytes: int,
    programs: int = PROGRAMS,
) -> Call:
    """The launch that moves a table's pages in some layers."""
    page = page_bytes // WORD
    tile = min(TILE, 1 << (page - 1).bit_length())
    arguments = (table, first_layer, layers, source_layer_bytes, target_layer_bytes, page, tile)
    return Call(move_pages, (programs, 1, 1), arguments, {"num_warps": WARPS})


class Mover:
    """Moves pages of `pool` [layers, pages, …] to or from memory of the host, one set of them after another.

    A chunk of the host is [layers, chunk_pages, …], contiguous. On a device of CUDA, all is enqueued on `stream`, which
    has to be named there; elsewhere pages are copied at once. `way` is one of WAYS; None: the better one for these
    pages here.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        chunk_pages: int,
        to_host: bool,
        stream: torch.cuda.Stream | None = None,
        way: str | None = None,
    ) -> None:
        layers, pages = pool.shape[:2]
        self._page_bytes = pool[0, 0].numel() * pool.itemsize
        if self._page_bytes % ALIGNMENT:
            raise ValueError(f"pages of {self._page_bytes} bytes are no multiple of {ALIGNMENT}: nothing copies them")
        if way is None:
            way = "engine" if self._page_bytes >= ENGINE_BYTES and engine.works(pool.device) else "kernel"
        self._first_page, self._to_host, self._layers = pool.data_ptr(), to_host, layers
        host, device = chunk_pages * self._page_bytes, pages * self._page_bytes
        self._strides = (device, host) if to_host else (host, device)
        self._chunk_pages = chunk_pages
        self._in_chunk = np.arange(chunk_pages, dtype=np.int64) * self._page_bytes
        each = np.arange(layers, dtype=np.int64)[:, None]
        self._offsets = each * self._strides[0], each * self._strides[1]
        self._stream = stream
        self._lists: engine.Lists | None = None
        self._launches: list[Launcher] = []
        if way == "engine" or not pool.is_cuda:
            return
        self._staging = Staging(pool.device)
        # no set has more pages than the pool
        self._table = torch.zeros(1 + 2 * pages, dtype=torch.int64, device=pool.device)
        self._words = self._table.view(torch.int32)
        self._launches = [
            Launcher(move_call(self._table, first, count, *self._strides, self._page_bytes))
            for first, count in [*((layer, 1) for layer in range(layers)), (0, layers)]
        ]

    def take(self, chunks: npt.NDArray[np.int64], pages: npt.NDArray[np.int32]) -> None:
        """What the next moves are of: addresses of chunks, and the page of the pool for each of their pages."""
        host = (chunks[:, None] + self._in_chunk).ravel()
        if self._launches:
            slot = self._staging.take(2 + 4 * len(pages))
            table_of(*self._ways(host, pages), slot.words.view(np.int64))
            with torch.cuda.stream(self._stream):
                slot.send(self._words, 2 + 4 * len(pages))
            return
        borders = runs(pages, self._chunk_pages)
        first = borders[:-1]
        sizes = (borders[1:] - first) * self._page_bytes
        self._lists = engine.Lists(*self._ways(host[first], pages[first]), sizes, self._offsets)

    def _ways(self, host: Addresses, pages: npt.NDArray[np.int32]) -> tuple[Addresses, Addresses]:
        """Addresses in layer 0 that pages come from and go to."""
        device = np.multiply(pages, self._page_bytes, dtype=np.int64)
        device += self._first_page
        return (device, host) if self._to_host else (host, device)

    def layer(self, layer: int) -> None:
        """Move one layer of them."""
        self._move(layer, layer + 1, layer)

    def all_layers(self) -> None:
        """Move all layers of them."""
        self._move(0, self._layers, -1)

    def _move(self, first: int, end: int, launch: int) -> None:
        if self._launches:
            with torch.cuda.stream(self._stream):
                self._launches[launch]()
            return
        assert self._lists is not None, "nothing was taken"
        if self._stream is None:
            self._lists.copy(first, end)
        else:
            self._lists.enqueue(first, end, self._stream.cuda_stream)


def runs(pages: npt.NDArray[np.int32], chunk_pages: int) -> npt.NDArray[np.intp]:
    """Where runs of neighbours begin among the pages of whole chunks, and behind them the number of pages.

    A run is one copy: the host takes 0.4 µs for each, and the bus is 10 % slower by pieces of 128 KiB than by pieces of
    1 MiB (NVIDIA H200). It ends with its chunk, whose next page belongs to another layer.
    """
    begins = np.empty(len(pages) + 1, np.bool_)
    np.not_equal(pages[1:], pages[:-1] + 1, out=begins[1:-1])
    begins[::chunk_pages] = True
    return begins.nonzero()[0]


def table_of(sources: Addresses, targets: Addresses, table: Addresses) -> Addresses:
    """Write what `move_pages` reads, 1 + 2 * pages words of it."""
    table[0] = len(sources)
    table[1 : 1 + 2 * len(sources) : 2], table[2 : 2 + 2 * len(sources) : 2] = sources, targets
    return table
