"""Managed (unified) memory for PyTorch tensors through a pluggable allocator. Owns who gets it, and how much at most.

Memory comes from `cuMemAllocManaged` behind `torch.cuda.memory.CUDAPluggableAllocator` and a `torch.cuda.MemPool`, so
that tensors in it are ordinary tensors. The allocator is 40 lines of C, compiled on first use by the C compiler that
Triton needs anyway. No more managed memory is given out than is free on the card: a kernel that faults on pages that do
not fit can hang the GPU for everybody who uses it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from smbench_kernels.op import UnsupportedPoint

KINDS = ("managed", "managed-prefetch", "managed-advise", "managed-host", "managed-oversubscribed")
"""What the axis `memory` knows besides `device`. The last two are there to be refused, with the reason."""

REFUSED = {
    "managed-host": "pages that stay in host memory cross the bus at every call, and a kernel that faults on them can "
    "hang the GPU for all of its users: the time would be the bus's, not the kernel's",
    "managed-oversubscribed": "more managed memory than the card has free makes the driver move pages in and out in "
    "the middle of a call, which can hang the GPU for all of its users",
}
SHARE = 0.5
"""Of the free memory that managed allocations may take at most: the allocator of other tensors needs room to grow."""

SOURCE = """\
#include <stddef.h>
#include <sys/types.h>

/* from libcuda.so.1, which this process has loaded; declared here so that no CUDA header is needed */
typedef unsigned long long CUdeviceptr;
extern int cuMemAllocManaged(CUdeviceptr *, size_t, unsigned int);
extern int cuMemFree_v2(CUdeviceptr);

enum { ATTACH_GLOBAL = 1 };
static size_t held_bytes;

size_t smbench_held_bytes(void) { return __atomic_load_n(&held_bytes, __ATOMIC_SEQ_CST); }

void *smbench_alloc(ssize_t bytes, int device, void *stream)
{
    CUdeviceptr memory = 0;
    (void)device;
    (void)stream;
    if (bytes <= 0 || cuMemAllocManaged(&memory, (size_t)bytes, ATTACH_GLOBAL) != 0)
        return NULL;
    __atomic_fetch_add(&held_bytes, (size_t)bytes, __ATOMIC_SEQ_CST);
    return (void *)memory;
}

void smbench_free(void *memory, ssize_t bytes, int device, void *stream)
{
    (void)device;
    (void)stream;
    if (memory != NULL && cuMemFree_v2((CUdeviceptr)memory) == 0)
        __atomic_fetch_sub(&held_bytes, (size_t)bytes, __ATOMIC_SEQ_CST);
}
"""

PREFERRED_LOCATION, ACCESSED_BY = 3, 5
"""CU_MEM_ADVISE_SET_PREFERRED_LOCATION and CU_MEM_ADVISE_SET_ACCESSED_BY of cuda.h."""


def copies(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of CUDA tensors in managed memory that is resident on their card.

    `managed` leaves the placement to the first touch, which is the copy on the card; `managed-advise` first advises the
    driver to keep the pages there; `managed-prefetch` moves them there after the copy, which has nothing left to move.
    UnsupportedPoint for a refused kind, without a GPU or a C compiler, and where the memory is not free.
    """
    if kind in REFUSED:
        raise UnsupportedPoint(f"memory {kind!r} is not measured: {REFUSED[kind]}")
    devices = {tensor.device for tensor in tensors.values()}
    device = devices.pop()
    if device.type != "cuda" or devices:
        raise UnsupportedPoint("managed memory needs tensors of one CUDA device")
    properties = torch.cuda.get_device_properties(device)
    if properties.is_integrated:
        raise UnsupportedPoint(f"{properties.name} shares its memory with the processor: there is nothing to manage")
    bytes_needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    refuse_unless_free(bytes_needed, torch.cuda.mem_get_info(device)[0])
    driver = ctypes.CDLL("libcuda.so.1")
    found = {}
    with torch.cuda.use_mem_pool(_pool(), device=device):
        for name, tensor in tensors.items():
            found[name] = torch.empty_like(tensor)
    for name, tensor in tensors.items():
        place, size = ctypes.c_uint64(found[name].data_ptr()), ctypes.c_size_t(tensor.numel() * tensor.element_size())
        if kind == "managed-advise":
            for advice in (PREFERRED_LOCATION, ACCESSED_BY):
                _checked("cuMemAdvise", driver.cuMemAdvise(place, size, advice, device.index))
        found[name].copy_(tensor)
        if kind == "managed-prefetch":
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            _checked("cuMemPrefetchAsync", driver.cuMemPrefetchAsync(place, size, device.index, stream))
    return found


def refuse_unless_free(bytes_needed: int, bytes_free: int) -> None:
    """UnsupportedPoint, with the arithmetic, where an allocation would take more than SHARE of what is free."""
    limit = int(SHARE * bytes_free)
    if bytes_needed > limit:
        raise UnsupportedPoint(
            f"managed memory for the cache: {bytes_needed / 2**20:.0f} MiB wanted, {bytes_free / 2**20:.0f} MiB free "
            f"on the card, of which {SHARE:.0%} = {limit / 2**20:.0f} MiB may be managed"
        )


def held_bytes() -> int:
    """Managed memory that the allocator has given out and not got back."""
    library = ctypes.CDLL(str(_library()))
    library.smbench_held_bytes.restype = ctypes.c_size_t
    return int(library.smbench_held_bytes())


@cache
def _pool() -> torch.cuda.MemPool:
    """The pool of managed memory, for the life of the process: its memory comes back as its tensors go."""
    # torch keeps a pointer into the allocator, which therefore must live as long
    _pool.allocator = torch.cuda.memory.CUDAPluggableAllocator(  # type: ignore[attr-defined]
        str(_library()), "smbench_alloc", "smbench_free"
    )
    return torch.cuda.MemPool(_pool.allocator.allocator())  # type: ignore[attr-defined]


@cache
def _library() -> Path:
    """The compiled allocator, in a temporary folder of this process. UnsupportedPoint where it cannot be compiled."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnsupportedPoint("managed memory needs a C compiler for its allocator: install gcc or clang, or set CC")
    folder = Path(tempfile.mkdtemp(prefix="smbench-managed-"))
    source, library = folder / "allocator.c", folder / "allocator.so"
    source.write_text(SOURCE, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise UnsupportedPoint(f"the allocator of managed memory does not compile: {detail.strip()}") from error
    # loaded before torch loads it, so that the names of the driver, which is loaded globally, are found
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    return library


def _checked(call: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed with CUDA error {status}")
