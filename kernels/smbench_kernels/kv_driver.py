"""Calls of the CUDA driver that every step makes, without what PyTorch does around them. Owns the bindings, no policy.

Filling a step's page table took an H200's host 27 µs with PyTorch's copy (two views of tensors, the current stream as
an object, the copy, its event) and takes 11 so. Streams and events are handles, as integers.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

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


def present(device: torch.device) -> bool:
    """Whether the device's driver is CUDA's and can be called."""
    return device.type == "cuda" and _driver() is not None


def has_batches(device: torch.device) -> bool:
    """Whether the driver names a call for many copies, which it has from CUDA 12.8 on."""
    return present(device) and hasattr(_driver(), "cuMemcpyBatchAsync")


def current_stream(device: torch.device) -> int:
    """The handle of the stream that PyTorch enqueues on."""
    stream: int = _stream_of()(torch.cuda.current_device() if device.index is None else device.index)
    return stream


def copy_in(source: int, target: int, size: int, stream: int) -> None:
    """Enqueue a copy of `size` bytes from page-locked memory to a device. RuntimeError with the driver's error."""
    _check("cuMemcpyHtoDAsync", _copy_in()(target, source, size, stream))


def record(event: torch.cuda.Event, stream: int) -> None:
    """Record an event, which was recorded before, on a stream. RuntimeError with the driver's error."""
    _check("cuEventRecord", _record()(event.cuda_event, stream))


def copy_all(sources: int, targets: int, sizes: int, count: int, stream: int) -> None:
    """Enqueue `count` copies in any order among each other, in one call. RuntimeError with the driver's error.

    `sources`, `targets`, `sizes` are addresses of contiguous lists of int64: addresses, and bytes. They are read before
    this returns.
    """
    status = _copy_all()(targets, sources, sizes, count, _ORDERED, _FIRST, 1, _FAILED, stream)
    _check("cuMemcpyBatchAsync", status)


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


_ORDER, _INDEX, _FAULT = _Attributes(order=IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
# one set of attributes, for all copies from the first one on; which copy failed is not asked for
_ORDERED, _FIRST, _FAILED = (ctypes.addressof(value) for value in (_ORDER, _INDEX, _FAULT))
_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t


@cache
def _driver() -> Any:
    if torch.version.hip is not None:
        return None
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@cache
def _stream_of() -> Any:
    # as Triton asks for it
    return torch._C._cuda_getCurrentRawStream


@cache
def _copy_in() -> Any:
    return _bound("cuMemcpyHtoDAsync_v2", ctypes.c_uint64, _ADDRESS, _SIZE, _ADDRESS)


@cache
def _record() -> Any:
    return _bound("cuEventRecord", _ADDRESS, _ADDRESS)


@cache
def _copy_all() -> Any:
    # the first form of the call, which later drivers keep under this name
    return _bound(
        *("cuMemcpyBatchAsync", _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS)
    )


def _bound(name: str, *arguments: Any) -> Any:
    call = getattr(_driver(), name)
    call.argtypes, call.restype = arguments, ctypes.c_int
    return call
