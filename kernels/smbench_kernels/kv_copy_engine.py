"""Many copies between host and device by one call of the driver, on copy engines. Owns the call and whether it works.

`cuMemcpyBatchAsync`, which drivers have from CUDA 12.8 on, in its first form, which later ones keep under that name.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IN_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM of cuda.h."""


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h: when sources are read, two hints of places, which managed memory alone heeds."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", ctypes.c_int * 2),
        ("target", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def copy_all(
    sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], stream: int
) -> None:
    """Enqueue copies of `sizes` bytes between addresses, in any order among each other, on a stream by its handle.

    The arrays are contiguous and read before this returns. RuntimeError with the driver's error.
    """
    attributes, first, failed = _Attributes(order=IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
    status = _call()(
        *(ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
        ctypes.c_size_t(len(sizes)),
        *(ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1), ctypes.byref(failed)),
        ctypes.c_void_p(stream),
    )
    if status:
        raise RuntimeError(f"cuMemcpyBatchAsync failed with CUDA error {status}")


@cache
def works(device: torch.device) -> bool:
    """Whether this driver copies so, both ways: tried once with a few bytes, since a driver may have it and refuse."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        _call()
    except (OSError, AttributeError):
        return False
    host = torch.arange(64, dtype=torch.int32).pin_memory()
    there = torch.zeros(64, dtype=torch.int32, device=device)
    back = torch.zeros(64, dtype=torch.int32, pin_memory=True)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    sizes = np.full(2, 128, np.int64)
    # each half to the other's place
    halves, swapped = np.array([0, 128], np.int64), np.array([128, 0], np.int64)
    try:
        copy_all(host.data_ptr() + halves, there.data_ptr() + swapped, sizes, stream.cuda_stream)
        copy_all(there.data_ptr() + halves, back.data_ptr() + halves, sizes, stream.cuda_stream)
    except RuntimeError:
        return False
    stream.synchronize()
    return torch.equal(back, host.roll(32))


@cache
def _call() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync
