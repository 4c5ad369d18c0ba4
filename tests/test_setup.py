"""The set-up: the lock covers what is asked for, a wheel carries its data, and `make` says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from smbench import resources

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def locked() -> list[Requirement]:
    return [Requirement(line.removesuffix("\\")) for line in LOCK.splitlines() if "==" in line]


def asked_for() -> list[Requirement]:
    groups = PROJECT["dependency-groups"].values()
    return [
        Requirement(text)
        for text in [*PROJECT["project"]["dependencies"], *(text for group in groups for text in group)]
    ]


@pytest.mark.parametrize("requirement", asked_for(), ids=str)
def test_the_lock_satisfies_every_requirement(requirement: Requirement) -> None:
    versions = [row for row in locked() if row.name == requirement.name]
    assert versions, f"run make locks: {requirement.name} is not in requirements.lock"
    for row in versions:
        (pin,) = row.specifier
        assert pin.version in requirement.specifier, f"run make locks: {row} is not {requirement}"


def test_the_lock_has_hashes_and_names_no_index_and_no_torch() -> None:
    assert all(line.startswith("    --hash=sha256:") or "==" in line for line in LOCK.splitlines())
    assert "://" not in LOCK
    assert not {row.name for row in locked()} & {"torch", "nvidia-cublas", "nvidia-cuda-runtime"}


def test_a_checkout_reads_its_own_data() -> None:
    assert resources.recipes_dir() == ROOT / "recipes"
    assert resources.templates_dir() == ROOT / "report_templates"
    assert resources.archs_file() == ROOT / "docker" / "archs.toml"


def test_a_wheel_alone_finds_its_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("smbench-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = set(archive.namelist())
    for folder, target in (("recipes", "recipes"), ("report_templates", "report_templates")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                assert f"smbench/data/{target}/{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "kernels").rglob("*.json"):
        assert str(path.relative_to(ROOT / "kernels")) in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"smbench", "smbench_kernels"}
    assert not [name for name in names if name.endswith("ruff.toml")]

    program = (
        "import json; from smbench import resources as r; "
        "print(json.dumps([str(r.recipes_dir()), str(r.templates_dir()), str(r.archs_file())]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    data = installed / "smbench" / "data"
    assert json.loads(done.stdout) == [str(data / "recipes"), str(data / "report_templates"), str(data / "archs.toml")]


def setup_copy(folder: Path) -> Path:
    """The few files that `make setup` needs before it installs anything."""
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements.lock",
        "bench/setup.sh",
        "bench/setup_venv.py",
        "bench/locked_venv.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # a make above this one must not pass its own variables down
    environment = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_every_target() -> None:
    listed = make(ROOT).stdout
    for target in ("setup", "run", "tune", "test", "check", "locks", "help"):
        assert f"make {target} " in listed


def test_make_passes_only_what_is_set() -> None:
    dry = make(ROOT, "--dry-run", "run", "RECIPE=lora", "PROFILE=cpu", "OUT=a folder").stdout
    assert ".venv/bin/smbench launch 'lora' --profile 'cpu' --out 'a folder'\n" in dry


def test_setup_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    done = make(setup_copy(tmp_path), "setup", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "/bin/false is not Python 3.11 or newer" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


def test_setup_leaves_a_foreign_venv_alone(tmp_path: Path) -> None:
    precious = setup_copy(tmp_path) / ".venv" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("mine", encoding="utf-8")
    done = make(tmp_path, "setup", f"PYTHON={sys.executable}")
    assert done.returncode != 0
    assert "was not made by smbench" in done.stderr
    assert precious.read_text(encoding="utf-8") == "mine"


def test_setup_names_a_wheelhouse_that_is_not_there(tmp_path: Path) -> None:
    done = make(setup_copy(tmp_path), "setup", f"PYTHON={sys.executable}", "WHEELHOUSE=nowhere")
    assert done.returncode != 0
    assert f"WHEELHOUSE: {tmp_path / 'nowhere'} is not a folder" in done.stderr
