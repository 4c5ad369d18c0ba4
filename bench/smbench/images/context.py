"""The folder that a build gets to see: locks, build steps, smbench's wheel, local wheels, and nothing else.

Owns its layout, which the Dockerfiles rely on. A folder of its own instead of the checkout: the wheelhouse may lie
anywhere, a change of a recipe must not build an engine anew, and nothing can slip in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from smbench.errors import CorruptError, UsageError
from smbench.images.target import Target

PARTS: Mapping[str, tuple[str, ...]] = {
    "debian": ("docker/build/debian_packages.sh",),
    "packages": (
        "bench/locked_venv.py",
        "bench/stack_packages.py",
        "docker/build/file_hashes.py",
        "docker/build/with_pip.sh",
    ),
    "smbench": ("docker/build/install_smbench.sh",),
    "bake": ("docker/build/bake.sh",),
    "facts": ("docker/build/image_facts.py",),
    "strip/smbench": ("bench/smbench/__init__.py", "bench/smbench/errors.py"),
    "strip/smbench/fatbin": ("bench/smbench/fatbin/*.py",),
    ".": ("docker/smoke.py",),
}
"""Folder of the context → files of the checkout. One folder a kind of step: a change builds anew what it touches."""


def lay_out(checkout: Path, folder: Path, target: Target, wheelhouse: Path | None, epoch: int) -> Path:
    """Make `folder` the context of an image. Returns it. UsageError where something of the checkout is missing."""
    shutil.rmtree(folder, ignore_errors=True)
    for part, patterns in PARTS.items():
        for pattern in patterns:
            found = sorted(checkout.glob(pattern))
            if not found:
                raise UsageError(f"{pattern} is missing: images are built from a whole checkout of smbench")
            for source in found:
                _copy(source, folder / part / source.name)
    for lock in target.locks:
        _copy(checkout / "docker" / "locks" / lock, folder / "locks" / lock)
    _copy(checkout / "docker" / target.dockerfile, folder / "Dockerfile")
    (folder / "wheelhouse").mkdir()
    if wheelhouse is not None:
        for wheel in wanted_wheels(wheelhouse, target, folder / "locks"):
            _link(wheel, folder / "wheelhouse" / wheel.name)
    build_wheel(checkout, folder / "dist", epoch)
    return folder


def wanted_wheels(wheelhouse: Path, target: Target, locks: Path) -> list[Path]:
    """Wheels of packages that this image installs; a wheelhouse may hold gigabytes of others."""
    names = {"torch"} if any(row.cpu_torch for row in target.packages) else set()
    for lock in target.locks:
        text = (locks / lock).read_text(encoding="utf-8")
        names |= set(re.findall(r"^([a-z0-9][a-z0-9.-]*)==", text, flags=re.MULTILINE))
    return sorted(path for path in wheelhouse.glob("*.whl") if _distribution(path) in names)


def build_wheel(checkout: Path, folder: Path, epoch: int) -> None:
    """smbench's wheel, the same bytes from the same sources."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CorruptError(f"smbench's wheel cannot be built: {done.stderr.strip()}")


def wheelhouse_folder(named: str) -> Path | None:
    """The folder that WHEELHOUSE names, None without one. UsageError where it is no folder."""
    if not named:
        return None
    folder = Path(named).resolve()
    if not folder.is_dir():
        raise UsageError(f"WHEELHOUSE: {folder} is not a folder")
    return folder


def _distribution(wheel: Path) -> str:
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    # the builder's cache looks at modes, and a checkout's depend on the user's umask
    target.chmod(0o644)


def _link(source: Path, target: Path) -> None:
    """Not copied where it can be helped: a wheel of torch is hundreds of megabytes."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
