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
    tokens, heads, head_dim = tensor.shape
    token, head, _ = tensor.stride()
    return _encoded(tensor.data_ptr(), tensor.dtype, (head_dim, heads, tokens), (head, token), (CHUNK, 1, rows))


def page_map(cache: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
    """The same for `rows` tokens within a page of [pages, 2, page_size, heads, head_dim], contiguous.

    Coordinates are (column, head, token of the page, twice the page, and one more for values). Tokens below 0 and from
    `page_size` on read as 0.
    """
    pages, halves, page_size, heads, head_dim = cache.shape
    _, half, token, head, _ = cache.stride()
    sizes = (head_dim, heads, page_size, pages * halves)
    return _encoded(cache.data_ptr(), cache.dtype, sizes, (head, token, half), (CHUNK, 1, rows, 1))


@lru_cache(maxsize=1024)
def _encoded(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], box: tuple[int, ...]
) -> ctypes.Array[ctypes.c_char]:
    """`shape` and `box` from the dimension of adjacent elements on, `stride` of the others, in elements."""
    rank = len(shape)
    sizes = (ctypes.c_uint64 * rank)(*shape)
    strides = (ctypes.c_uint64 * (rank - 1))(*(elements * dtype.itemsize for elements in stride))
    boxes = (ctypes.c_uint32 * rank)(*box)
    steps = (ctypes.c_uint32 * rank)(*(1 for _ in shape))
    room = (ctypes.c_char * (MAP_BYTES + MAP_ALIGNMENT))()
    kind = BFLOAT16 if dtype == torch.bfloat16 else FLOAT16
    encoded = (ctypes.c_char * MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % MAP_ALIGNMENT)
    nvrtc._driver_call(
        "cuTensorMapEncodeTiled",
        *(ctypes.byref(encoded), kind, rank, ctypes.c_void_p(address), sizes, strides, boxes, steps),
        *(0, SWIZZLE_128_BYTES, PROMOTE_TO_256_BYTES, 0),
    )
    return encoded
