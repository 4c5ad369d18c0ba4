"""`python -m smbench.worker.bake LIST [--output FOLDER]`: compile our kernels ahead, for an image. Needs no GPU.

LIST is what `python -m smbench.baking` prints: an arch, its cards and the points of all recipes. Every operation of the
list is asked for the configuration that it would choose for each point on each card (its default, and the shipped tuned
one), and what these need is compiled into FOLDER, from which a worker takes it (`smbench.worker.baked`). Owns that; the
operations own their configurations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from smbench.errors import CorruptError, UsageError
from smbench.worker import baked
from smbench.worker.precompile import Task, on_all_cores
from smbench_kernels import configs, hardware
from smbench_kernels.hardware import Hardware
from smbench_kernels.op import UnsupportedPoint
from smbench_kernels.registry import op as find_op

LIST_FORMAT = 1
FORMAT = 1
"""Version of baked.json. History: 1 = first."""


def wanted(request: Mapping[str, Any], configs_root: Path | None = None) -> list[Task]:
    """The distinct kernels that the points of a list need on the cards of its arch, in order.

    UsageError for an operation that does not say what it chooses by default.
    """
    typical = hardware.typical(request["capability"])
    cards = [_facts(typical, row) for row in request["devices"]]
    found: dict[str, Task] = {}
    for name, points in request["points"].items():
        if find_op(name).tunable is None:
            # nobody says which kernels its points take: they are compiled where they first run
            continue
        tunable = find_op(name).tuning()
        if tunable.default is None:
            raise UsageError(f"op {name!r}: its Tunable has no `default`, so that it cannot be compiled ahead")
        tuned = [
            configs.load(path)
            for row in request["devices"]
            if (path := configs.path_of(row["name"], name, configs_root or configs.ROOT)).exists()
        ]
        for point in points:
            chosen = [tunable.default(point, card) for card in dict.fromkeys([typical, *cards])]
            for table in tuned:
                # a point that the table has nothing for is refused when measured, and needs no kernel
                with contextlib.suppress(UnsupportedPoint):
                    chosen.append(configs.lookup(table, point)[0])
            for config in chosen:
                found.setdefault(tunable.binary(point, config), Task(name, None, point, config))
    return list(found.values())


def _facts(typical: Hardware, row: Mapping[str, Any]) -> Hardware:
    """A card of the arch table as the worker sees it when it runs there; what is not known is the typical card's."""
    known = {name: row[name] for name in ("sm_count", "l2_bytes") if row[name] is not None}
    return replace(typical, **known)


def compile_all(binaries: Sequence[Task], capability: int, output: Path) -> list[str]:
    """Compile kernels into a folder, on all cores, each process without a GPU; the key of each."""
    output.mkdir(parents=True, exist_ok=True)
    with _environment(CUDA_VISIBLE_DEVICES="", TRITON_CACHE_DIR=str(output), TRITON_STORE_BINARY_ONLY="1"):
        return list(on_all_cores(Task.compile, binaries, capability))


def compile_driver_module(output: Path) -> None:
    """Compile the C module by which Triton calls the CUDA driver, which it otherwise does at its first launch.

    It is linked against a driver library, of which a build has none: an empty one of that name takes its place, and
    the module finds the real one where it runs. RuntimeError or CalledProcessError where there is no C compiler.
    """
    program = (
        "from triton.backends.nvidia.driver import CudaUtils\n"
        "try:\n    CudaUtils()\n"
        # it was compiled and kept; only loading it needs the driver
        "except ImportError:\n    pass\n"
    )
    with tempfile.TemporaryDirectory() as stand_in:
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("no C compiler: Triton needs one at its first launch; install gcc, or set CC")
        library = Path(stand_in) / "libcuda.so.1"
        subprocess.run(
            [compiler, "-shared", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", str(library)],
            check=True,
        )
        with _environment(TRITON_LIBCUDA_PATH=stand_in, TRITON_CACHE_DIR=str(output)):
            subprocess.run([sys.executable, "-c", program], check=True)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read_list(text: str) -> dict[str, Any]:
    """The list of a bake. CorruptError where it is none of this format."""
    try:
        request = json.loads(text)
    except ValueError as error:
        raise CorruptError(f"the list is not JSON: {error}; `python -m smbench.baking` prints one") from error
    if not isinstance(request, dict) or request.get("format") != LIST_FORMAT:
        raise CorruptError(f"the list is not of format {LIST_FORMAT}; `python -m smbench.baking` prints one")
    return request


def bake(request: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Compile what a list needs into a folder that is made anew; what was done, which is also the folder's baked.json.

    UsageError where the folder holds something else.
    """
    import triton

    if output.exists() and any(output.iterdir()) and not (output / baked.FACTS).is_file():
        raise UsageError(f"{output}: holds something else than baked kernels; name an empty folder with --output")
    began = time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    binaries = wanted(request)
    keys = set(compile_all(binaries, request["capability"], output))
    compile_driver_module(output)
    if len(keys) != len(binaries):
        raise CorruptError(f"{len(binaries)} kernels were wanted and {len(keys)} compiled: two of them share a key")
    facts = {
        "format": FORMAT,
        "arch": request["arch"],
        "capability": request["capability"],
        "stack": request["stack"],
        "triton": triton.__version__,
        "ptxas": str(triton.knobs.nvidia.ptxas.version),
        "points": sum(len(points) for points in request["points"].values()),
        "devices": [row["name"] for row in request["devices"]],
        # what one key stands for may be several kernels of CUDA C++, of which others have some too
        "kernels": sum(1 for _ in output.rglob("*.cubin")),
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }
    (output / baked.FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    seconds = time.monotonic() - began
    sys.stdout.write(
        f"{facts['kernels']} kernels for {facts['arch']}, {facts['points']} points on {len(facts['devices'])} cards: "
        f"{facts['bytes'] / 2**20:.1f} MiB in {seconds:.1f} s\n"
    )
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for a mistake of the caller, 3 for a list that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m smbench.worker.bake", description="Compile our kernels ahead.")
    parser.add_argument("list", help="file that `python -m smbench.baking` wrote, or - for standard input")
    parser.add_argument("--output", type=Path, default=baked.folder(), help="default: where a worker looks")
    options = parser.parse_args(arguments)
    try:
        text = sys.stdin.read() if options.list == "-" else Path(options.list).read_text(encoding="utf-8")
        bake(read_list(text), options.output)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return UsageError.exit_code
    except (UsageError, CorruptError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
