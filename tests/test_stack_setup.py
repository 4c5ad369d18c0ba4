"""`make stack`: an engine's packages beside a checkout, by hash, once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tiny_wheel(folder: Path, name: str) -> Path:
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose only stack is one tiny wheel of a wheelhouse."""
    folder = tmp_path / "checkout"
    for pattern in ("pyproject.toml", "README.md", "LICENSE", "bench/*.py", "bench/smbench/__init__.py"):
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for name in ("kernels/smbench_kernels", "recipes", "report_templates", "docker/locks"):
        (folder / name).mkdir(parents=True)
    (folder / "docker" / "archs.toml").write_text(
        '[arch.cpu]\n[stack.tiny.build.cpu]\nlock = "tiny.txt"\nrequires = ["tiny==1.0"]\n', encoding="utf-8"
    )
    (folder / "wheels").mkdir()
    digest = hashlib.sha256(tiny_wheel(folder / "wheels", "tiny").read_bytes()).hexdigest()
    (folder / "docker" / "locks" / "tiny.txt").write_text(
        f"tiny==1.0 \\\n    --hash=sha256:{digest}\n", encoding="utf-8"
    )
    return folder


def stack(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "WHEELHOUSE": str(checkout / "wheels"), "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-B", str(checkout / "bench" / "setup_stack.py"), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_a_stack_is_made_once_and_made_anew_when_its_lock_changes(checkout: Path) -> None:
    done = stack(checkout, "tiny", "--arch", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    python = checkout / ".stacks" / "tiny" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import smbench, tiny; print(smbench.__file__)"], capture_output=True, text=True, check=True
    )
    assert where.stdout.strip() == str(checkout / "bench" / "smbench" / "__init__.py")
    assert stack(checkout, "tiny", "--arch", "cpu").stdout == ""
    lock = checkout / "docker" / "locks" / "tiny.txt"
    lock.write_text(lock.read_text(encoding="utf-8").replace("tiny==1.0", "tiny==1.0.0"), encoding="utf-8")
    assert "making stack tiny (cpu)" in stack(checkout, "tiny", "--arch", "cpu").stdout


def test_a_package_that_is_not_the_locked_one_is_refused(checkout: Path) -> None:
    with zipfile.ZipFile(checkout / "wheels" / "tiny-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("surprise.py", "")
    done = stack(checkout, "tiny", "--arch", "cpu")
    assert done.returncode == 3
    assert "smbench: tiny.txt: a package is not the one that was locked" in done.stderr
    # what is half made is not taken for whole
    assert "inputs" not in json.loads((checkout / ".stacks" / "tiny" / "smbench-setup.json").read_text("utf-8"))


def test_an_unknown_stack_and_a_stack_that_needs_a_gpu_are_named(checkout: Path) -> None:
    done = stack(checkout, "tny", "--arch", "cpu")
    assert (done.returncode, done.stderr) == (
        2,
        "smbench: STACK: unknown stack 'tny'; known: tiny; did you mean 'tiny'?\n",
    )
    done = stack(checkout, "tiny", "--arch", "sm90")
    assert "ARCH: unknown arch 'sm90'; known: cpu" in done.stderr
