"""Small tables on their way from the host to a device: a ring of page-locked buffers. Owns the host's side of them.

A copy from pageable memory makes the host wait for the device. From page-locked memory it does not, but the buffer must
stay as it is until the copy is done: each copy leaves an event, and a buffer is written again after its own. What order
the device's side of a copy has is the stream's business.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

DEPTH = 8
"""Buffers of a ring: so many copies may be under way before the host waits for the oldest."""
WORDS = 4096
"""int32 words of a buffer to begin with."""


class Slot:
    """One buffer of a ring."""

    __slots__ = ("_copied", "_cuda", "_pending", "_tensor", "words")

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._pending = False
        self._allocate(WORDS)
        self._copied = torch.cuda.Event() if cuda else None

    def _allocate(self, words: int) -> None:
        self._tensor = torch.empty(words, dtype=torch.int32, pin_memory=self._cuda)
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

    def send(self, target: torch.Tensor) -> None:
        """Enqueue the copy of the first words to an int32 tensor of as many, on the current stream of its device."""
        target.copy_(self._tensor[: target.numel()], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(target.device))
            self._pending = True


class Staging:
    """A ring of buffers for copies to one device. Not for several threads."""

    def __init__(self, device: torch.device, depth: int = DEPTH) -> None:
        self._slots = [Slot(device.type == "cuda") for _ in range(depth)]
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
