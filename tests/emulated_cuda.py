"""Kernels in CUDA C++ on a processor: compiled by a C++ compiler against `cuda_emulation.hpp`, run by fibers.

The emulation itself is compiled once for all kernels of a session, and well, since it is where the time of a run goes.
"""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from smbench_kernels import cuda_primitives, lora_primitives

HEADER = Path(__file__).with_name("cuda_emulation.hpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")
EMULATION = HEADER.with_suffix(".cpp")
# fibers change stacks by longjmp, which fortified libraries take for a fault
OPTIONS = ("-std=c++17", "-fPIC", "-w", "-fvisibility=hidden", "-U_FORTIFY_SOURCE")


@cache
def library(source: str, names: tuple[str, ...], macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The kernels of a source with emulated primitives; AssertionError where it uses PTX of its own."""
    assert COMPILER
    own = source.removeprefix(cuda_primitives.SOURCE)
    assert own != source
    own = own.removeprefix(lora_primitives.OWN)
    assert "asm" not in own, "a kernel's PTX belongs into cuda_primitives, where it is emulated"
    own = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];", r"\1 *\2 = (\1 *)dynamic_shared;", own
    )
    defined = "".join(f"#define {name} {value}\n" for name, value in macros)
    text = defined + f'#include "{HEADER}"\n' + own + "".join(f"\nEMULATED({name})" for name in names)
    return compiled(text, EMULATION)


@cache
def emulation(source: Path) -> bytes:
    """A part of the emulation as an object file."""
    assert COMPILER
    with tempfile.TemporaryDirectory(prefix="smbench-emulated-") as folder:
        built = Path(folder) / "emulation.o"
        subprocess.run([COMPILER, *OPTIONS, "-O2", "-c", "-o", str(built), str(source)], check=True)
        return built.read_bytes()


def compiled(text: str, *parts: Path) -> ctypes.CDLL:
    """C++ with these parts of the emulation as a loaded library, whose state is its own."""
    assert COMPILER
    with tempfile.TemporaryDirectory(prefix="smbench-emulated-") as folder:
        code, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        code.write_text(text, encoding="utf-8")
        objects = [code.with_name(f"{part.stem}.o") for part in parts]
        for path, part in zip(objects, parts, strict=True):
            path.write_bytes(emulation(part))
        linked = ["-shared", "-Wl,-z,noexecstack", "-o", str(built), str(code), *map(str, objects)]
        subprocess.run([COMPILER, *OPTIONS, "-O1", *linked], check=True)
        return ctypes.CDLL(str(built))


def launch(
    source: str,
    name: str,
    macros: Mapping[str, int],
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Any],
    names: Sequence[str] = (),
    cluster: int = 1,
) -> None:
    """Run all blocks of a kernel, clusters in random order. Arguments as of `nvrtc.Kernel.launcher`, on the CPU."""
    found = library(source, tuple(names) or (name,), tuple(sorted(macros.items())))
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous()
            values.append(ctypes.c_uint64(argument.data_ptr()))
        else:
            values.append(ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_float(argument))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    count = grid[0] * grid[1] * grid[2] // cluster
    order = (ctypes.c_uint32 * count)(*random.sample(range(count), count))
    getattr(found, f"emulate_{name}")(*grid, threads, shared_bytes, cluster, order, pointers)
