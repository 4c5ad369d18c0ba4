"""Tensor maps for Hopper's copy engine, encoded by the driver. Owns no kernel."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from smbench_kernels import nvrtc

MAP_BYTES, MAP_ALIGNMENT = 128, 64
CHUNK = 64
"""Columns that one copy takes: 128 bytes, the widest that a swizzle goes over."""
FLOAT16, BFLOAT16, SWIZZLE_128_BYTES, PROMOTE_TO_256_BYTES = 6, 9, 3, 3
"""CU_TENSOR_MAP_* of cuda.h."""


def tensor_map(tensor: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
    """The map by which `rows` rows of 64 columns of one head of [tokens, heads, head_dim] are copied at a time.

    Coordinates are (column, head, token); what lies past the last token reads as 0. RuntimeError with the driver's
    error where the tensor's strides or address do not fit.
    """
    return _encoded(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, rows)


@lru_cache(maxsize=1024)
def _encoded(
    address: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, rows: int
) -> ctypes.Array[ctypes.c_char]:
    tokens, heads, head_dim = shape
    sizes = (ctypes.c_uint64 * 3)(head_dim, heads, tokens)
    strides = (ctypes.c_uint64 * 2)(stride[1] * dtype.itemsize, stride[0] * dtype.itemsize)
    box = (ctypes.c_uint32 * 3)(CHUNK, 1, rows)
    steps = (ctypes.c_uint32 * 3)(1, 1, 1)
    room = (ctypes.c_char * (MAP_BYTES + MAP_ALIGNMENT))()
    kind = BFLOAT16 if dtype == torch.bfloat16 else FLOAT16
    encoded = (ctypes.c_char * MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % MAP_ALIGNMENT)
    nvrtc._driver_call(
        "cuTensorMapEncodeTiled",
        *(ctypes.byref(encoded), kind, 3, ctypes.c_void_p(address), sizes, strides, box, steps),
        *(0, SWIZZLE_128_BYTES, PROMOTE_TO_256_BYTES, 0),
    )
    return encoded
