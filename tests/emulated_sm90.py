"""Hopper's CUDA C++ on a processor: compiled by a C++ compiler against `cuda_emulation_sm90.hpp`, run by fibers."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import emulated_cuda

HEADER = Path(__file__).with_name("cuda_emulation_sm90.hpp")
MAP_WORDS = 16


@cache
def library(source: str, name: str, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """A kernel by its source without the primitives; AssertionError where it uses PTX of its own."""
    assert "asm" not in source, "a kernel's PTX belongs into the primitives, which are emulated"
    own = re.sub(r"extern __shared__ unsigned char (\w+)\[\];", r"unsigned char *\1 = block_memory();", source)
    defined = "".join(f"#define {key} {value}\n" for key, value in macros)
    text = f'{defined}#include "{HEADER}"\n{own}\nEMULATED_CLUSTERS({name})'
    return emulated_cuda.compiled(text, emulated_cuda.EMULATION, HEADER.with_suffix(".cpp"))


def tensor_map(
    tensor: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> bytes:
    """What the copy engine's emulation reads, in place of what the driver encodes. `strides` are in bytes."""
    three = [*sizes, 1][:3], [*strides, 0][:2], [*box, 1][:3]
    words = [tensor.data_ptr(), len(sizes), *three[0], *three[1], *three[2], swizzle]
    return bytes((ctypes.c_uint64 * MAP_WORDS)(*words))


def launch(
    source: str,
    name: str,
    macros: Mapping[str, int],
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Any],
    cluster: int = 1,
) -> None:
    """Run all clusters of a kernel, in random order. Arguments as of `nvrtc.Kernel.launcher`, tensors on the CPU."""
    found = library(source, name, tuple(sorted(macros.items())))
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous()
            values.append(ctypes.c_uint64(argument.data_ptr()))
        elif isinstance(argument, ctypes.Array | ctypes._SimpleCData):
            values.append(argument)
        else:
            values.append(ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_float(argument))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    clusters = grid[0] // cluster * grid[1]
    order = (ctypes.c_uint32 * clusters)(*random.sample(range(clusters), clusters))
    seed = random.randrange(2**31)
    getattr(found, f"emulate_{name}")(grid[0], grid[1], cluster, threads, shared_bytes, seed, order, pointers)
