"""Small tables on their way from the host to a device: a ring of page-locked buffers. Owns the host's side of them.

A copy from pageable memory makes the host wait for the device. From page-locked memory it does not, but the buffer must
stay as it is until the copy is done: each copy leaves an event, and a buffer is written again after its own. What order
the device's side of a copy has is the stream's business.

Beside large copies from the host a table comes by a kernel that reads the host's memory. A copy engine takes its copies
as they were enqueued, whatever their streams and priorities: behind those of a step's layers a table of 4 KiB arrived
when all of them had, and the first layer waited for it (NVIDIA H200; copies below about 1 KiB go another way).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from smbench_kernels import kv_driver as driver
from smbench_kernels.launch import jit

DEPTH = 8
"""Buffers of a ring: so many copies may be under way before the host waits for the oldest."""
WORDS = 4096
"""int32 words of a buffer to begin with."""
PROGRAMS, TILE = 4, 1024
"""Programs of the kernel that reads the host's memory, words that each has under way."""


@jit(do_not_specialize=["source", "target", "words"])
def fetch_words(source, target, words, TILE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Copy int32 words between two addresses, of page-locked memory of the host and of the device.

    Any number of programs shares them.
    """
    each = tl.arange(0, TILE)
    source, target = source.to(tl.pointer_type(tl.int32)), target.to(tl.pointer_type(tl.int32))
    for begin in range(tl.program_id(0) * TILE, words, tl.num_programs(0) * TILE):
        inside = begin + each < words
        found = tl.load(source + begin + each, mask=inside, cache_modifier=".cg")
        tl.store(target + begin + each, found, mask=inside)


@cache
def _fetch(_device: torch.device) -> Callable[[int, int, int, int], None]:
    """The compiled kernel as a call that binds nothing anew: its first launch, of nothing, compiles it."""
    at = torch.zeros(1, dtype=torch.int32, device=_device)
    start: Callable[[int, int, int, int], None] = fetch_words[(1, 1, 1)](
        at.data_ptr(), at.data_ptr(), 0, TILE, num_warps=4
    )[(PROGRAMS, 1, 1)]
    return start


class Slot:
    """One buffer of a ring."""

    __slots__ = ("_address", "_copied", "_device", "_driven", "_pending", "_tensor", "words")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driven = driver.present(device)
        self._pending = False
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        if self._copied is not None:
            # makes it: the driver records what exists
            self._copied.record(torch.cuda.current_stream(device))
        self._allocate(WORDS)

    def _allocate(self, words: int) -> None:
        self._tensor = torch.empty(words, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._address = self._tensor.data_ptr()
        self.words: npt.NDArray[np.int32] = self._tensor.numpy()
        """What the host writes, at a multiple of 16 bytes."""

    def settle(self, words: int) -> None:
        """Wait until the last copy is done, and have at least so many words."""
        if self._pending and self._copied is not None:
            if not self._copied.query():
                self._copied.synchronize()
            self._pending = False
        if words > len(self.words):
            self._allocate(1 << (words - 1).bit_length())

    def send(self, target: torch.Tensor, words: int, beside_copies: bool = False) -> None:
        """Enqueue the copy of the first words to where an int32 tensor begins, on the current stream of its device.

        Its memory, of which the tensor itself may be a part, has room for them. `beside_copies` says that copy engines
        are busy with what the stream will wait for.
        """
        if self._driven and self._copied is not None:
            stream = driver.current_stream(self._device)
            if beside_copies:
                _fetch(self._device)(self._address, target.data_ptr(), words, TILE)
            else:
                driver.copy_in(self._address, target.data_ptr(), 4 * words, stream)
            driver.record(self._copied, stream)
            self._pending = True
            return
        target.as_strided((words,), (1,)).copy_(self._tensor[:words], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
            self._pending = True


class Staging:
    """A ring of buffers for copies to one device. Not for several threads."""

    def __init__(self, device: torch.device, depth: int = DEPTH) -> None:
        self._slots = [Slot(device) for _ in range(depth)]
        self._next = 0

    def take(self, words: int) -> Slot:
        """The buffer whose turn it is, with room for so many int32 words, free to be written."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.settle(words)
        return slot


@cache
def staging(device: torch.device) -> Staging:
    """The ring of a device for whoever has none of its own."""
    return Staging(device)
