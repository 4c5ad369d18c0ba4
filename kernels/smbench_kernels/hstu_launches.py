"""Launches of our CUDA C++ kernels in the HSTU layer, kept by what they are made of. Owns no kernel.

Making a launch (encoding maps, binding arguments) takes the host longer than the launch itself, and a step after a step
gives the same addresses, since PyTorch's allocator hands out the same memory again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

from smbench_kernels import nvrtc

Launch = Callable[[], None]
MOST = 2048
_KEPT: dict[Hashable, Launch] = {}


def place(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    """All that a launch knows of a matrix or vector of a known dtype: address, sizes, stride of the first dimension."""
    return None if tensor is None else (tensor.data_ptr(), *tensor.shape, tensor.stride(0))


def run(key: Hashable, make: Callable[[], Launch]) -> None:
    """Launch what `make` makes, or made for an equal key before: it must hold addresses, not tensors."""
    found = _KEPT.get(key)
    if found is None:
        if len(_KEPT) >= MOST:
            _KEPT.clear()
        found = _KEPT[key] = make()
    found()


@lru_cache(maxsize=64)
def missing(device: torch.device) -> str | None:
    """Why a device runs no kernel of compute capability 9.0 here; None where it does."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (Hopper)"
    return None if nvrtc.available() else "needs NVRTC"
