"""Makes `.venv`: the locked packages, torch, and smbench itself as an editable install.

Owns `.venv` and the stamp in it. Does not own which packages those are: pyproject.toml and requirements.lock do.
Runs before anything is installed, so it needs the standard library alone. Where packages come from is pip's own
configuration, with two additions from the environment: `WHEELHOUSE`, a folder of wheels that is looked at first, and
`TORCH_INDEX_URL`, a package index for torch alone. Both are remembered for when `.venv` has to be made anew; removing
`.venv` forgets them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "smbench-setup.json"
"""Written in part first and whole last: it tells our `.venv` from another's, and a half-made one from a whole."""
REMEMBERED = ("TORCH_INDEX_URL", "WHEELHOUSE")


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


def stamp() -> dict[str, str]:
    """What the last set-up wrote; empty where there was none."""
    try:
        content = json.loads(STAMP.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {str(key): str(value) for key, value in content.items()}


def write_stamp(content: dict[str, str]) -> None:
    """Whole or not at all, whenever the machine stops."""
    unfinished = STAMP.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(STAMP)


def is_fresh() -> bool:
    """Whether `.venv`, whose Python runs this, is whole, of these inputs, and made with the options that are given."""
    recorded = stamp()
    # a copied or moved checkout has a .venv that points at the old place
    here = {"root": str(ROOT), "version": sys.version, "inputs": inputs_digest()}
    given = {name: os.environ[name] for name in ("PYTHON", *REMEMBERED) if os.environ.get(name)}
    return all(recorded.get(key) == value for key, value in {**here, **given}.items())


def fail(message: str, code: int) -> NoReturn:
    print(f"smbench: {message}", file=sys.stderr)
    sys.exit(code)


def call(what: str, command: list[str]) -> None:
    """Run a step of the set-up; its failure ends the set-up with the step's name."""
    import subprocess

    print(f"smbench set-up: {what}", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        fail(f"set-up failed: {what}. The cause is above; .venv is unfinished and the next call makes it anew", 1)


def make_venv(wheelhouse: Path | None) -> list[str]:
    """An empty `.venv`, and the command that is pip for it."""
    from importlib.util import find_spec

    fix = "install it (Debian, Ubuntu: apt-get install python3-venv) or name another Python with PYTHON="
    if find_spec("venv") is None:
        fail(f"{sys.executable} has no module venv; {fix}", 2)
    if find_spec("ensurepip") is not None:
        call("making .venv", [sys.executable, "-m", "venv", str(VENV)])
        return [str(VENV_PYTHON), "-m", "pip"]
    # Debian keeps ensurepip in python3-venv; any pip that can work on another environment does as well
    pip = pip_for_others()
    if pip is None and wheelhouse is not None:
        wheel = max(wheelhouse.glob("pip-*.whl"), default=None)
        pip = [str(VENV_PYTHON), str(wheel / "pip")] if wheel else None
    if pip is None:
        fail(f"{sys.executable} has no module ensurepip, and there is no pip >= 22.3 to do without it; {fix}", 2)
    call("making .venv without ensurepip", [sys.executable, "-m", "venv", "--without-pip", str(VENV)])
    return pip


def pip_for_others() -> list[str] | None:
    """This Python's own pip, told to work on `.venv`; None where there is none that can (pip 22.3)."""
    import subprocess

    found = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
    words = found.stdout.split()
    if found.returncode != 0 or len(words) < 2:
        return None
    major, minor = (int(part) for part in words[1].split(".")[:2])
    return [sys.executable, "-m", "pip", "--python", str(VENV_PYTHON)] if (major, minor) >= (22, 3) else None


def constraints() -> Path:
    """The locked versions as a constraints file. Without their hashes: with them, pip asks for torch's hashes too."""
    versions = [
        line.removesuffix("\\").strip() for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line
    ]
    path = VENV / "constraints.txt"
    path.write_text("\n".join(versions) + "\n", encoding="utf-8")
    return path


def install_torch(install: list[str], index: str, wheelhouse: Path | None) -> None:
    """torch of the pinned version: from the wheelhouse, else from its own index, else wherever pip looks.

    A CPU build finds everything it needs in the lock. A CUDA build brings its nvidia packages, from where pip looks.
    """
    tools = project()["tool"]
    assert isinstance(tools, dict)
    version = tools["smbench"]["setup"]["torch"]
    requirement = f"torch=={version}"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if wheelhouse is not None and list(wheelhouse.glob(f"torch-{version}[+-]*{tag}-*.whl")):
        call(f"installing {requirement} from {wheelhouse}", [*install, "--no-deps", "--no-index", requirement])
    elif index:
        call(f"installing {requirement} from {index}", [*install, "--no-deps", "--index-url", index, requirement])
    call(f"installing {requirement} with what it needs", [*install, "--constraint", str(constraints()), requirement])


def advise_on_cuda(options: dict[str, str]) -> None:
    """Where nothing says otherwise, Linux gets the CUDA build of torch, useless on a machine without a GPU."""
    from shutil import which

    gpu = Path("/dev/nvidiactl").exists() or which("nvidia-smi") is not None
    if sys.platform == "linux" and not gpu and not options["TORCH_INDEX_URL"] and not options["WHEELHOUSE"]:
        print(
            "smbench: no NVIDIA GPU here. Unless pip is configured otherwise, torch brings gigabytes of CUDA; "
            "TORCH_INDEX_URL=<PyTorch's CPU wheel index, see the selector on pytorch.org> avoids them.",
            flush=True,
        )


def make(options: dict[str, str]) -> None:
    """`.venv` from nothing."""
    import shutil

    wheelhouse = Path(options["WHEELHOUSE"]).resolve() if options["WHEELHOUSE"] else None
    if wheelhouse is not None and not wheelhouse.is_dir():
        fail(f"WHEELHOUSE: {wheelhouse} is not a folder", 2)
    advise_on_cuda(options)
    VENV.mkdir(exist_ok=True)
    content = {"root": str(ROOT), **options}
    write_stamp(content)
    # the stamp stays: a set-up that is interrupted here still finds a .venv of its own
    for left in VENV.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left != STAMP:
            left.unlink()

    pip = make_venv(wheelhouse)
    install = [*pip, "install", "--no-input", "--disable-pip-version-check"]
    if wheelhouse is not None:
        install += ["--find-links", str(wheelhouse)]
    locked = ["--quiet", "--require-hashes", "--requirement", str(LOCK)]
    call("installing the packages of requirements.lock", [*install, *locked])
    install_torch(install, options["TORCH_INDEX_URL"], wheelhouse)
    editable = ["--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    call("installing smbench", [*install, *editable])

    content |= {"version": sys.version, "inputs": inputs_digest()}
    write_stamp(content)


def main() -> None:
    import fcntl
    import subprocess

    # two makes at once: the second waits, then finds the work done
    with LOCK.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if VENV_PYTHON.exists():
            check = [str(VENV_PYTHON), "-I", "-S", "-B", __file__, "--fresh"]
            if subprocess.run(check, check=False).returncode == 0:
                return
        recorded = stamp()
        if VENV.is_symlink() or (VENV.exists() and not STAMP.exists() and any(VENV.iterdir())):
            fail(f"{VENV} was not made by smbench; move it away or remove it, then run this again", 2)
        remembered = {name: os.environ.get(name) or recorded.get(name, "") for name in REMEMBERED}
        make({"PYTHON": os.environ.get("PYTHON", ""), **remembered})


if __name__ == "__main__":
    if sys.argv[1:] == ["--fresh"]:
        sys.exit(0 if is_fresh() else 1)
    try:
        main()
    except KeyboardInterrupt:
        fail("set-up interrupted; .venv is unfinished and the next call makes it anew", 130)
