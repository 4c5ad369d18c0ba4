"""One virtual environment of locked packages: made from nothing, and stamped so that the next call knows.

Owns the folder, its stamp and how pip is called. Does not own which packages belong into it: setup_venv.py says that of
`.venv`, setup_stack.py of a stack. Runs before anything is installed, so it needs the standard library alone. Where
packages come from is pip's own configuration, with two additions: `WHEELHOUSE`, a folder of wheels that is looked at
first, and `TORCH_INDEX_URL`, a package index for torch alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
REMEMBERED = ("TORCH_INDEX_URL", "WHEELHOUSE")
"""Options that a folder made anew takes from the one it replaces; removing the folder forgets them."""


def fail(message: str, code: int) -> NoReturn:
    print(f"smbench: {message}", file=sys.stderr)
    sys.exit(code)


@dataclass(frozen=True)
class LockedVenv:
    """The environment in `folder`; messages call it `name`."""

    folder: Path
    name: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Written in part first and whole last: it tells ours from another's, and a half-made one from a whole."""
        return self.folder / "smbench-setup.json"

    def recorded(self) -> dict[str, str]:
        """What the last set-up wrote; empty where there was none."""
        try:
            content = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {str(key): str(value) for key, value in content.items()}

    def write_stamp(self, content: Mapping[str, str]) -> None:
        """Whole or not at all, whenever the machine stops."""
        unfinished = self.stamp.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(self.stamp)

    def is_fresh(self, inputs: str, given: tuple[str, ...]) -> bool:
        """Whether it is whole, of these inputs, of the Python that runs this, and made with the options `given`."""
        recorded = self.recorded()
        # a copied or moved checkout has one that points at the old place
        here = {"root": str(ROOT), "version": sys.version, "inputs": inputs}
        options = {name: os.environ[name] for name in given if os.environ.get(name)}
        return all(recorded.get(key) == value for key, value in {**here, **options}.items())

    def refuse_foreign(self) -> None:
        """End the set-up where the folder is not ours to remove."""
        folder = self.folder
        if folder.is_symlink() or (folder.exists() and not self.stamp.exists() and any(folder.iterdir())):
            fail(f"{folder} was not made by smbench; move it away or remove it, then run this again", 2)

    def remembered(self) -> dict[str, str]:
        """The options of this call, and for those not given the ones of the last."""
        recorded = self.recorded()
        return {name: os.environ.get(name) or recorded.get(name, "") for name in REMEMBERED}

    def begin(self, options: Mapping[str, str]) -> None:
        """An empty folder with an unfinished stamp."""
        import shutil

        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_stamp({"root": str(ROOT), **options})
        # the stamp stays: a set-up that is interrupted here still finds a folder of its own
        for left in self.folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left != self.stamp:
                left.unlink()

    def finish(self, options: Mapping[str, str], inputs: str) -> None:
        self.write_stamp({"root": str(ROOT), **options, "version": sys.version, "inputs": inputs})

    def call(self, what: str, command: list[str]) -> None:
        """Run a step of the set-up; its failure ends the set-up with the step's name."""
        print(f"smbench set-up: {what}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            fail(
                f"set-up failed: {what}. The cause is above; {self.name} is unfinished and the next call makes it anew",
                1,
            )

    def create(self, wheelhouse: Path | None, bare: bool = False) -> list[str]:
        """An environment with pip alone in it, and not even that where it is `bare`; the command that is pip for it."""
        from importlib.util import find_spec

        fix = "install it (Debian, Ubuntu: apt-get install python3-venv) or name another Python with PYTHON="
        if find_spec("venv") is None:
            fail(f"{sys.executable} has no module venv; {fix}", 2)
        if find_spec("ensurepip") is not None and not bare:
            self.call(f"making {self.name}", [sys.executable, "-m", "venv", str(self.folder)])
            return [str(self.python), "-m", "pip"]
        # Debian keeps ensurepip in python3-venv; any pip that can work on another environment does as well
        pip = self._pip_of_others()
        if pip is None and wheelhouse is not None:
            wheel = max(wheelhouse.glob("pip-*.whl"), default=None)
            pip = [str(self.python), str(wheel / "pip")] if wheel else None
        if pip is None:
            fail(f"{sys.executable} has no module ensurepip, and there is no pip >= 22.3 to do without it; {fix}", 2)
        without_pip = [sys.executable, "-m", "venv", "--without-pip", str(self.folder)]
        self.call(f"making {self.name} without pip in it", without_pip)
        return pip

    def _pip_of_others(self) -> list[str] | None:
        """This Python's own pip, told to work on the folder; None where there is none that can (pip 22.3)."""
        found = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
        words = found.stdout.split()
        if found.returncode != 0 or len(words) < 2:
            return None
        major, minor = (int(part) for part in words[1].split(".")[:2])
        return [sys.executable, "-m", "pip", "--python", str(self.python)] if (major, minor) >= (22, 3) else None


def wheelhouse_of(options: Mapping[str, str]) -> Path | None:
    """The folder that `WHEELHOUSE` names, None without one. Ends the set-up where it is no folder."""
    if not options["WHEELHOUSE"]:
        return None
    folder = Path(options["WHEELHOUSE"]).resolve()
    if not folder.is_dir():
        fail(f"WHEELHOUSE: {folder} is not a folder", 2)
    return folder


def install_command(pip: list[str], wheelhouse: Path | None) -> list[str]:
    """pip's `install` as every step calls it."""
    install = [*pip, "install", "--no-input", "--disable-pip-version-check"]
    return install if wheelhouse is None else [*install, "--find-links", str(wheelhouse)]


def torch_commands(install: list[str], version: str, index: str, wheelhouse: Path | None) -> dict[str, list[str]]:
    """How torch alone is installed, by what to say of it; empty where only pip's own configuration can provide it.

    A CPU build finds everything it needs in the lock. A CUDA build brings its nvidia packages.
    """
    requirement = f"torch=={version}"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if wheelhouse is not None and list(wheelhouse.glob(f"torch-{version}[+-]*{tag}-*.whl")):
        return {f"installing {requirement} from {wheelhouse}": [*install, "--no-deps", "--no-index", requirement]}
    if index:
        return {f"installing {requirement} from {index}": [*install, "--no-deps", "--index-url", index, requirement]}
    return {}


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU."""
    from shutil import which

    return Path("/dev/nvidiactl").exists() or which("nvidia-smi") is not None
