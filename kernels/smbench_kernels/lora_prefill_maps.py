"""Tensor maps of the prefill kernels, encoded by the driver: boxes of rows of a matrix, tiles of each LoRA's weights.

Owns no kernel. A map is 128 bytes that a kernel gets by value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from smbench_kernels import nvrtc
from smbench_kernels.lora_prefill_kernels import BOX, COLUMNS, FEW, Expand, Shrink

MAP_BYTES, MAP_ALIGNMENT = 128, 64
FLOAT16, BFLOAT16, PROMOTE_TO_256_BYTES = 6, 9, 3
SWIZZLES = {32: 1, 64: 2, 128: 3}
"""CU_TENSOR_MAP_* of cuda.h."""

Encode = Callable[[torch.Tensor, Sequence[int], Sequence[int], Sequence[int], int], bytes]
"""Of a tensor: sizes from the fastest dimension on, strides in bytes from the second on, a box, the swizzle's bytes."""


def encoded(
    tensor: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> bytes:
    """The map by which the copy engine moves `box` at a time; what lies outside reads as 0 and is not written.

    RuntimeError with the driver's error where the address or a stride is no multiple of 16 bytes.
    """
    room = (ctypes.c_char * (MAP_BYTES + MAP_ALIGNMENT))()
    found = (ctypes.c_char * MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % MAP_ALIGNMENT)
    rank = len(sizes)
    nvrtc._driver_call(
        "cuTensorMapEncodeTiled",
        *(ctypes.byref(found), BFLOAT16 if tensor.dtype == torch.bfloat16 else FLOAT16, rank),
        *(ctypes.c_void_p(tensor.data_ptr()), (ctypes.c_uint64 * rank)(*sizes)),
        *((ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box)),
        *((ctypes.c_uint32 * rank)(*[1] * rank), 0, SWIZZLES[swizzle], PROMOTE_TO_256_BYTES, 0),
    )
    return bytes(found)


def of_shrink(
    kernel: Shrink, x: torch.Tensor, a: Sequence[torch.Tensor], encode: Encode = encoded
) -> ctypes.Array[ctypes.c_char]:
    """What the shrink kernel calls Maps: rows of x, then A of each slice."""
    found = _rows(x, kernel.tokens, encode)
    for weights in a:
        loras, rank, hidden = weights.shape
        strides = [2 * hidden, 2 * rank * hidden]
        found += encode(weights, [hidden, rank, loras], strides, [COLUMNS, kernel.ranks, 1], 2 * COLUMNS)
    return _argument(found)


def of_expand(
    kernel: Expand, y: torch.Tensor, b: Sequence[torch.Tensor], encode: Encode = encoded
) -> ctypes.Array[ctypes.c_char]:
    """What the expand kernel calls Maps: rows of y, slice by slice, then B of each slice."""
    rows, weights, begin = b"", b"", 0
    columns = min(COLUMNS, kernel.inner)
    for slice_b in b:
        loras, outputs, rank = slice_b.shape
        rows += _rows(y[:, begin : begin + outputs], kernel.tokens, encode)
        strides = [2 * rank, 2 * rank * outputs]
        weights += encode(slice_b, [rank, outputs, loras], strides, [columns, kernel.chunks * COLUMNS, 1], 2 * columns)
        begin += outputs
    return _argument(rows + weights)


def _rows(matrix: torch.Tensor, tokens: int, encode: Encode) -> bytes:
    """Maps of 64 columns of so many rows of a matrix, of 16 rows, of 4 and of one."""
    count, width = matrix.shape
    strides = [2 * matrix.stride(0)]
    return b"".join(
        encode(matrix, [width, count], strides, [COLUMNS, box], 2 * COLUMNS) for box in (tokens, BOX, FEW, 1)
    )


def _argument(maps: bytes) -> ctypes.Array[ctypes.c_char]:
    """Bytes as a kernel's argument, aligned as the structure is that they fill."""
    room = (ctypes.c_char * (len(maps) + MAP_ALIGNMENT))()
    found = (ctypes.c_char * len(maps)).from_buffer(room, -ctypes.addressof(room) % MAP_ALIGNMENT)
    found.raw = maps
    return found
