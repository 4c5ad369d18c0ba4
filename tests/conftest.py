"""What every test process needs: the versions in its header, and the reason why a marked test cannot run here."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from smbench.stacks import here

SHOWN = ("smbench", "torch", "triton", "numpy", "pydantic")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> str:
    versions = [f"{package} {_version(package)}" for package in SHOWN]
    mode = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiler"
    return f"python {platform.python_version()}, {', '.join(versions)}, triton mode {mode}"


def _no_gpu() -> str | None:
    """Why there is no GPU here. torch, which takes a second, is imported only where the driver is."""
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver: neither /dev/nvidiactl nor nvidia-smi"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def _no_docker() -> str | None:
    if shutil.which("docker") is None:
        return "no docker client"
    try:
        answer = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "the docker daemon does not answer within 20 s"
    return None if answer.returncode == 0 else "no docker daemon"


@pytest.fixture
def seed() -> int:
    """Fresh on every run, and what `random` and torch begin with; pytest shows it where a test fails."""
    value = random.SystemRandom().randrange(2**31)
    sys.stderr.write(f"seed {value}\n")
    random.seed(value)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, saying why; ask only for what some collected test needs."""
    for marker, ask in (("gpu", _no_gpu), ("docker", _no_docker)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = ask() if marked else None
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))
    for item in items:
        if engine := item.get_closest_marker("engine"):
            name = str(engine.args[0])
            if here().missing(name, [name]):
                item.add_marker(pytest.mark.skip(reason=f"engine: {name} is not installed; {here().advice(name)}"))
