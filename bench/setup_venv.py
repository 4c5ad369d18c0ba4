"""Makes `.venv`: the locked packages, torch, and smbench itself as an editable install.

Owns what belongs into `.venv`. Does not own how an environment is made (locked_venv.py), nor the versions: those are in
pyproject.toml and requirements.lock. Runs before anything is installed, so it needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tomllib
from pathlib import Path

from locked_venv import ROOT, LockedVenv, fail, has_gpu, install_command, torch_commands, wheelhouse_of

LOCK = ROOT / "requirements.lock"
VENV = LockedVenv(ROOT / ".venv", ".venv")


def project() -> dict[str, object]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def inputs_digest() -> str:
    """A digest of all that decides what belongs into `.venv`, the machine's options aside."""
    table = project()
    tools = table["tool"]
    assert isinstance(tools, dict)
    decisive = [table["build-system"], table["project"], table["dependency-groups"], tools["smbench"], tools["hatch"]]
    digest = hashlib.sha256(json.dumps(decisive).encode())
    digest.update(LOCK.read_bytes())
    return digest.hexdigest()


def is_fresh() -> bool:
    """Whether `.venv`, whose Python runs this, is what the inputs and the given options ask for."""
    return VENV.is_fresh(inputs_digest(), given=("PYTHON", "TORCH_INDEX_URL", "WHEELHOUSE"))


def constraints() -> Path:
    """The locked versions as a constraints file. Without their hashes: with them, pip asks for torch's hashes too."""
    versions = [
        line.removesuffix("\\").strip() for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line
    ]
    path = VENV.folder / "constraints.txt"
    path.write_text("\n".join(versions) + "\n", encoding="utf-8")
    return path


def install_torch(install: list[str], index: str, wheelhouse: Path | None) -> None:
    """torch of the pinned version: from the wheelhouse, else from its own index, else wherever pip looks."""
    tools = project()["tool"]
    assert isinstance(tools, dict)
    version = tools["smbench"]["setup"]["torch"]
    for what, command in torch_commands(install, version, index, wheelhouse).items():
        VENV.call(what, command)
    requirement = f"torch=={version}"
    VENV.call(
        f"installing {requirement} with what it needs", [*install, "--constraint", str(constraints()), requirement]
    )


def advise_on_cuda(options: dict[str, str]) -> None:
    """Where nothing says otherwise, Linux gets the CUDA build of torch, useless on a machine without a GPU."""
    if sys.platform == "linux" and not has_gpu() and not options["TORCH_INDEX_URL"] and not options["WHEELHOUSE"]:
        print(
            "smbench: no NVIDIA GPU here. Unless pip is configured otherwise, torch brings gigabytes of CUDA; "
            "TORCH_INDEX_URL=<PyTorch's CPU wheel index, see the selector on pytorch.org> avoids them.",
            flush=True,
        )


def make(options: dict[str, str]) -> None:
    """`.venv` from nothing."""
    wheelhouse = wheelhouse_of(options)
    advise_on_cuda(options)
    VENV.begin(options)
    install = install_command(VENV.create(wheelhouse), wheelhouse)
    locked = ["--quiet", "--require-hashes", "--requirement", str(LOCK)]
    VENV.call("installing the packages of requirements.lock", [*install, *locked])
    install_torch(install, options["TORCH_INDEX_URL"], wheelhouse)
    editable = ["--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    VENV.call("installing smbench", [*install, *editable])
    VENV.finish(options, inputs_digest())


def main() -> None:
    import fcntl
    import subprocess

    # two makes at once: the second waits, then finds the work done
    with LOCK.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if VENV.python.exists():
            check = [str(VENV.python), "-E", "-s", "-S", "-B", __file__, "--fresh"]
            if subprocess.run(check, check=False).returncode == 0:
                return
        VENV.refuse_foreign()
        make({"PYTHON": os.environ.get("PYTHON", ""), **VENV.remembered()})


if __name__ == "__main__":
    if sys.argv[1:] == ["--fresh"]:
        sys.exit(0 if is_fresh() else 1)
    try:
        main()
    except KeyboardInterrupt:
        fail("set-up interrupted; .venv is unfinished and the next call makes it anew", 130)
