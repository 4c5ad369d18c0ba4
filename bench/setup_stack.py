"""Makes `.stacks/<stack>/` beside the checkout: an engine's locked packages, torch, and smbench as an editable install.

Owns which stack and build it is to be. Does not own how the packages get there (stack_packages.py, locked_venv.py) nor
their versions (docker/archs.toml and its locks). Runs under `.venv`, which has the build backend for smbench's wheel.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import platform
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locked_venv import ROOT, LockedVenv, fail, has_gpu, install_command, wheelhouse_of
from stack_packages import install_cpu_torch, install_locked

TABLE = ROOT / "docker" / "archs.toml"
LOCKS = ROOT / "docker" / "locks"
STACKS = ROOT / ".stacks"
PYTHONS = ((3, 11), (3, 13))
"""First and last Python that the locks are resolved for."""


def known(what: str, name: str, rows: Mapping[str, Any]) -> None:
    """End the set-up where there is no row of that name."""
    if name not in rows:
        hint = difflib.get_close_matches(name, rows, n=1)
        did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
        fail(f"{what}: unknown {what.lower()} {name!r}; known: {', '.join(rows)}{did_you_mean}", 2)


def build_of(stack: str, arch: str | None) -> tuple[str, Mapping[str, Any]]:
    """`cuda` or `cpu`, and the `[stack.<stack>.build]` row of that name. Without an arch the machine decides."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    stacks = table["stack"]
    known("STACK", stack, stacks)
    if arch is not None:
        known("ARCH", arch, table["arch"])
    on_gpu = has_gpu() if arch is None else "compute_capability" in table["arch"][arch]
    variant = "cuda" if on_gpu else "cpu"
    if variant not in stacks[stack]["build"]:
        able = [name for name, row in stacks.items() if variant in row["build"]]
        where = f"ARCH={arch}" if arch else f"this machine, which has {'a' if on_gpu else 'no'} GPU"
        fail(f"STACK: {stack!r} has no packages for {where}; stacks that have some: {', '.join(able)}", 2)
    return variant, stacks[stack]["build"][variant]


def inputs_digest(build: Mapping[str, Any]) -> str:
    """A digest of all that decides what belongs into the stack, the machine's options aside."""
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    digest = hashlib.sha256(json.dumps([dict(build), hatch]).encode())
    digest.update((LOCKS / build["lock"]).read_bytes())
    return digest.hexdigest()


def refuse_other_machines() -> None:
    """End the set-up on a machine that the locks are not resolved for."""
    first, last = PYTHONS
    if not first <= sys.version_info[:2] <= last:
        fail(
            f"stacks are locked for Python {first[0]}.{first[1]} to {last[0]}.{last[1]}, this is "
            f"{platform.python_version()}; make .venv anew with another: rm -r .venv && make setup PYTHON=python3.13",
            2,
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        fail(f"stacks are locked for Linux on x86_64, this is {sys.platform} on {platform.machine()}", 2)


def editable_wheel(venv: LockedVenv, folder: Path) -> Path:
    """A wheel that points at this checkout: the stack needs no build backend of its own. `.venv` has one."""
    builder = [sys.executable, "-m", "hatchling", "build", "--target", "wheel:editable", "--directory", str(folder)]
    venv.call("building smbench's editable wheel", builder)
    return next(folder.glob("smbench-*.whl"))


def install(venv: LockedVenv, build: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Everything into an empty environment."""
    wheelhouse = wheelhouse_of(options)
    pip = install_command(venv.create(wheelhouse), wheelhouse)
    install_locked(venv, pip, LOCKS / build["lock"])
    if "torch" in build.get("without", []):
        install_cpu_torch(venv, pip, build["torch"], options["TORCH_INDEX_URL"], wheelhouse)
    with tempfile.TemporaryDirectory() as folder:
        wheel = editable_wheel(venv, Path(folder))
        venv.call("installing smbench", [*pip, "--quiet", "--no-deps", "--no-index", str(wheel)])


def main() -> None:
    import fcntl

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack")
    parser.add_argument("--arch", help="row of docker/archs.toml; default: whether there is an NVIDIA GPU decides")
    arguments = parser.parse_args()
    refuse_other_machines()
    variant, build = build_of(arguments.stack, arguments.arch)
    inputs = inputs_digest(build)
    venv = LockedVenv(STACKS / arguments.stack, f"stack {arguments.stack} ({variant})")
    # two makes at once: the second waits, then finds the work done
    with (LOCKS / build["lock"]).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if venv.is_fresh(inputs, given=("TORCH_INDEX_URL", "WHEELHOUSE")):
            return
        venv.refuse_foreign()
        options = venv.remembered()
        venv.begin(options)
        install(venv, build, options)
        venv.finish(options, inputs)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("set-up interrupted; the stack is unfinished and the next call makes it anew", 130)
