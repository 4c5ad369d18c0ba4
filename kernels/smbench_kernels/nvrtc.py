"""Compiles CUDA C++ with NVRTC and launches it on PyTorch's current stream. Owns no kernel.

For kernels whose point is how they load, which Triton decides for itself. Needs what a CUDA build of PyTorch brings
along: libnvrtc, which PyTorch itself uses, and the driver. No header and no C compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

SHARED_WITHOUT_ASKING = 48 * 1024
"""Dynamic shared memory above this has to be asked for once per kernel."""
MAX_DYNAMIC_SHARED, REGISTERS, LOCAL_BYTES, SHARED_BYTES, NON_PORTABLE_CLUSTER_ALLOWED = 8, 4, 3, 1, 14
"""CU_FUNC_ATTRIBUTE_* of cuda.h."""
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
"""CU_LAUNCH_ATTRIBUTE_* of cuda.h."""
SHIPPED: list[Path] = []
"""Folders of compiled kernels that are looked at first and never written."""
LISTENERS: list[Callable[[float], None]] = []
"""Called with the seconds of each compilation."""
PORTABLE_CLUSTER = 8
"""Larger clusters have to be allowed once per kernel; a card may refuse them."""


class CompileError(RuntimeError):
    """NVRTC refused a source. The message is its log."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel of one device."""

    name: str
    _function: ctypes.c_void_p

    def facts(self) -> dict[str, int]:
        """Registers and spilled bytes of a thread, static shared bytes of a block."""
        found = {}
        for key, attribute in (("registers", REGISTERS), ("local_bytes", LOCAL_BYTES), ("shared_bytes", SHARED_BYTES)):
            value = ctypes.c_int()
            _driver_call("cuFuncGetAttribute", ctypes.byref(value), attribute, self._function)
            found[key] = value.value
        return found

    def launcher(
        self,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        *,
        cluster: int = 1,
        dependent: bool = False,
    ) -> Any:
        """A function that launches on the stream that is current when it is called.

        Arguments are tensors (their address is passed, and they are kept alive), integers (32 bits), floats (32) and
        values of ctypes, which are passed as they are. `cluster` neighbouring blocks in x form a cluster. A `dependent`
        kernel may start before the one in front of it has ended, and has to wait for it by `griddepcontrol.wait`
        (programmatic dependent launch). Both need compute capability 9.0.
        """
        self._allow(shared_bytes)
        if cluster > PORTABLE_CLUSTER:
            _driver_call("cuFuncSetAttribute", self._function, NON_PORTABLE_CLUSTER_ALLOWED, 1)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function = self._function
        if cluster == 1 and not dependent:
            launch, sizes = _driver().cuLaunchKernel, (*grid, threads, 1, 1, shared_bytes)

            def run() -> None:
                stream = ctypes.c_void_p(_current_stream())
                status = launch(function, *sizes, stream, pointers, None)
                if status:
                    raise RuntimeError(f"cuLaunchKernel of {self.name} failed with CUDA error {status}")

        else:
            launch = _driver().cuLaunchKernelEx
            attributes = _attributes(cluster, dependent)
            config = _LaunchConfig(*grid, threads, 1, 1, shared_bytes, None, attributes, len(attributes))
            reference = ctypes.byref(config)

            def run() -> None:
                config.stream = _current_stream()
                status = launch(reference, function, pointers, None)
                if status:
                    raise RuntimeError(f"cuLaunchKernelEx of {self.name} failed with CUDA error {status}")

        # what the pointers point to must live as long as the function
        run.kept = (values, arguments)  # type: ignore[attr-defined]
        return run

    def _allow(self, shared_bytes: int) -> None:
        """Ask for dynamic shared memory that, with the static, is more than a kernel gets without asking."""
        if shared_bytes + self.facts()["shared_bytes"] > SHARED_WITHOUT_ASKING:
            _driver_call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED, shared_bytes)

    def resident_clusters(self, threads: int, shared_bytes: int, cluster: int) -> int:
        """Clusters of so many blocks that the current device holds at once: its units have unequal numbers of SMs."""
        self._allow(shared_bytes)
        attributes = _attributes(cluster, dependent=False)
        config = _LaunchConfig(cluster, 1, 1, threads, 1, 1, shared_bytes, None, attributes, len(attributes))
        found = ctypes.c_int()
        _driver_call("cuOccupancyMaxActiveClusters", ctypes.byref(found), self._function, ctypes.byref(config))
        return found.value


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: a number and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


def _attributes(cluster: int, dependent: bool) -> Any:
    wanted = [(CLUSTER_DIMENSION, (cluster, 1, 1))] if cluster > 1 else []
    if dependent:
        wanted.append((PROGRAMMATIC_STREAM_SERIALIZATION, (1, 0, 0)))
    attributes = (_LaunchAttribute * len(wanted))()
    for attribute, (number, values) in zip(attributes, wanted, strict=True):
        attribute.id = number
        attribute.value[:3] = values
    return attributes


def kernel(source: str, name: str, macros: Mapping[str, int], device: torch.device, features: str = "") -> Kernel:
    """A kernel of a source, compiled once per process for a device's own architecture.

    `features` goes behind the architecture's number: "a" for instructions that no other one has, as wgmma.
    CompileError with NVRTC's log; OSError where there is no libnvrtc.
    """
    major, minor = torch.cuda.get_device_capability(device)
    _make_context_current(device)
    return _loaded(source, name, tuple(sorted(macros.items())), f"{major}{minor}{features}")


def compiled(source: str, macros: Mapping[str, int], capability: int | str) -> bytes:
    """The cubin of a source for a compute capability, from SHIPPED or Triton's cache folder where it lies there."""
    version = (ctypes.c_int * 2)()
    nvrtc = _nvrtc()
    _nvrtc_call(nvrtc.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, ctypes.sizeof(ctypes.c_int))))
    what = repr((source, sorted(macros.items()), str(capability), list(version)))
    name = f"nvrtc-{hashlib.sha256(what.encode()).hexdigest()}.cubin"
    path = Path(triton.knobs.cache.dir) / name
    for known in (*(folder / name for folder in SHIPPED), path):
        if known.is_file():
            return known.read_bytes()
    began = time.perf_counter()
    cubin = compile_source(source, macros, capability)
    for listener in LISTENERS:
        listener(time.perf_counter() - began)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in one step, since processes that compile ahead share the folder
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(cubin)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return cubin


def compile_source(source: str, macros: Mapping[str, int], capability: int | str) -> bytes:
    """The cubin of a source for a compute capability; needs no GPU. CompileError, OSError as `kernel`."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _nvrtc_call(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture=sm_{capability}", "--std=c++17"]
        options += [f"-D{name}={value}" for name, value in macros.items()]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            raise CompileError(_text(nvrtc, "ProgramLog", program))
        size = ctypes.c_size_t()
        _nvrtc_call(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _nvrtc_call(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _make_context_current(device: torch.device) -> None:
    """A process that has not yet touched the device through PyTorch has no context, and a module needs one."""
    _driver_call("cuInit", 0)
    context, number = ctypes.c_void_p(), ctypes.c_int()
    _driver_call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        index = torch.cuda.current_device() if device.index is None else device.index
        _driver_call("cuDeviceGet", ctypes.byref(number), index)
        _driver_call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        _driver_call("cuCtxSetCurrent", context)


@cache
def _loaded(source: str, name: str, macros: tuple[tuple[str, int], ...], capability: int | str) -> Kernel:
    cubin = compiled(source, dict(macros), capability)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _driver_call("cuModuleLoadData", ctypes.byref(module), cubin)
    _driver_call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return Kernel(name, function)


def _current_stream() -> int:
    """The handle alone, as Triton asks for it: PyTorch's object of the stream takes the host longer than a launch."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return stream


def _value(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_uint64(argument.data_ptr())
    if isinstance(argument, ctypes._SimpleCData | ctypes.Array):
        return argument
    return ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_float(argument)


@cache
def available() -> bool:
    """Whether there is a libnvrtc to compile with."""
    try:
        _nvrtc()
    except OSError:
        return False
    return True


@cache
def _nvrtc() -> ctypes.CDLL:
    """libnvrtc of the CUDA version that PyTorch was built with: the loader's, or the one in PyTorch's own packages."""
    major = (torch.version.cuda or "").partition(".")[0]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    found = [path for path in packages.glob("*/lib/libnvrtc.so.*") if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]
    fitting = [path for path in found if path.name.endswith(f".{major}")] or found
    if not fitting:
        return ctypes.CDLL(f"libnvrtc.so.{major}")
    # it opens its builtins by name alone, which finds them only where something has loaded them before
    for builtins in fitting[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(fitting[0]))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver_call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


def _nvrtc_call(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC failed with error {status}")


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode(errors="replace").strip()
