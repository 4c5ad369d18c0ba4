"""Installs a lock, and torch where the lock leaves it out, into an environment: in place and in images alike.

Owns these two steps, so that a stack beside a checkout and one in an image hold the same files. Does not own which lock
it is (setup_stack.py, or the Dockerfile that calls this file) nor smbench, which comes last. Standard library alone.
"""

from __future__ import annotations

import argparse
import compileall
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from py_compile import PycInvalidationMode

from locked_venv import LockedVenv, fail, install_command, torch_commands, wheelhouse_of

WRONG_HASH = "DO NOT MATCH THE HASHES"
"""How pip says that a file is not the locked one."""
NO_CUDA = """
import importlib.util, pathlib, runpy, sys
# read, not imported: a CUDA build without its libraries cannot be
version = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")
sys.exit(runpy.run_path(str(version))["cuda"] is not None)
"""
"""A program that fails where the installed torch is a CUDA build."""


def install_locked(venv: LockedVenv, install: Sequence[str], lock: Path) -> None:
    """The packages of a lock. It is the whole resolution, so nothing is asked about what a package needs."""
    locked = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(lock)]
    what = f"installing the packages of {lock.name}"
    print(f"smbench set-up: {what}", flush=True)
    with subprocess.Popen([*install, *locked], stderr=subprocess.PIPE, text=True) as pip:
        assert pip.stderr is not None
        # passed on as it comes, and kept to tell a wrong hash from other failures
        said = [line for line in pip.stderr if sys.stderr.write(line)]
    if pip.returncode == 0:
        return
    if any(WRONG_HASH in line for line in said):
        fail(
            f"{lock.name}: a package is not the one that was locked (its name and both hashes are above): restore the "
            "lock with `git checkout docker/locks`, or see where it comes from (`pip config list`, WHEELHOUSE=)",
            3,
        )
    fail(f"set-up failed: {what}. The cause is above; {venv.name} is unfinished and the next call makes it anew", 1)


def install_cpu_torch(venv: LockedVenv, install: list[str], version: str, index: str, wheelhouse: Path | None) -> None:
    """torch alone, in a CPU build: from the wheelhouse, from its own index, or from where pip is configured to look."""
    commands = torch_commands(install, version, index, wheelhouse)
    default = {f"installing torch=={version}": [*install, "--no-deps", f"torch=={version}"]}
    for what, command in (commands or default).items():
        venv.call(what, [*command, "--quiet", "--only-binary", ":all:"])
    if subprocess.run([str(venv.python), "-I", "-B", "-c", NO_CUDA], check=False).returncode != 0:
        fail(
            f"torch {version} came as a CUDA build, and this stack is for machines without a GPU: name PyTorch's CPU "
            "wheel index with TORCH_INDEX_URL= (see the selector on pytorch.org), or a folder with a CPU wheel with "
            "WHEELHOUSE=",
            2,
        )


def compile_reproducibly(folder: Path) -> None:
    """Bytecode that depends on the sources alone: pip's own would carry the time of its installation."""
    compileall.compile_dir(folder, force=True, quiet=2, workers=0, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)


def main() -> None:
    """For images: an environment without pip in it, the same files in every build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the environment to make")
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--cpu-torch", metavar="VERSION", help="install torch beside the lock, as a CPU build")
    arguments = parser.parse_args()
    wheelhouse = wheelhouse_of({"WHEELHOUSE": os.environ.get("WHEELHOUSE", "")})
    venv = LockedVenv(arguments.folder, str(arguments.folder))
    install = [*install_command(venv.create(wheelhouse, bare=True), wheelhouse), "--no-compile"]
    install_locked(venv, install, arguments.lock)
    if arguments.cpu_torch:
        install_cpu_torch(venv, install, arguments.cpu_torch, os.environ.get("TORCH_INDEX_URL", ""), wheelhouse)
    compile_reproducibly(arguments.folder / "lib")


if __name__ == "__main__":
    main()
