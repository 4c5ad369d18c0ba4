"""Many copies between host and device by copy engines: lists of them, and whether the driver takes such lists.

Owns what a list is. Does not own the driver's call (`kv_driver`) nor what is copied when.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels import kv_driver as driver

Addresses = npt.NDArray[np.int64]


class Lists:
    """Copies of the same pieces in every layer, as the driver wants them: addresses from and to, and bytes."""

    __slots__ = ("_address", "_lists", "count")

    def __init__(
        self, sources: Addresses, targets: Addresses, sizes: Addresses, offsets: tuple[Addresses, Addresses]
    ) -> None:
        """Addresses in layer 0 and bytes of each piece; `offsets` [layers, 1]: of each layer's memory on both sides."""
        self.count = len(sizes)
        """Copies of a layer."""
        # [source, target, size; layer; piece]
        self._lists = np.empty((3, len(offsets[0]), self.count), np.int64)
        np.add(sources, offsets[0], out=self._lists[0])
        np.add(targets, offsets[1], out=self._lists[1])
        self._lists[2] = sizes
        self._address: int = self._lists.ctypes.data

    def enqueue(self, first: int, end: int, stream: int) -> None:
        """Copy layers `first` … `end` - 1 on a stream by its handle. RuntimeError with the driver's error."""
        begin, step = self._address + 8 * first * self.count, self._lists.strides[0]
        driver.copy_all(begin, begin + step, begin + 2 * step, (end - first) * self.count, stream)

    def copy(self, first: int, end: int) -> None:
        """The same at once, where both sides are memory of the host."""
        for source, target, size in self._lists[:, first:end].reshape(3, -1).T.tolist():
            ctypes.memmove(target, source, size)


@cache
def works(device: torch.device) -> bool:
    """Whether this driver copies so, both ways: tried once with a few bytes, since a driver may have it and refuse."""
    if not driver.has_batches(device):
        return False
    host = torch.arange(64, dtype=torch.int32).pin_memory()
    there = torch.zeros(64, dtype=torch.int32, device=device)
    back = torch.zeros(64, dtype=torch.int32, pin_memory=True)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # each half to the other's place
    halves, swapped, sizes = (np.array(pair, np.int64) for pair in ((0, 128), (128, 0), (128, 128)))
    once = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
    try:
        Lists(host.data_ptr() + halves, there.data_ptr() + swapped, sizes, once).enqueue(0, 1, stream.cuda_stream)
        Lists(there.data_ptr() + halves, back.data_ptr() + halves, sizes, once).enqueue(0, 1, stream.cuda_stream)
    except RuntimeError:
        return False
    stream.synchronize()
    return torch.equal(back, host.roll(32))
