"""docker/smoke.py against images that are made up: a stack's Python is a script here that answers as one would."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOUND: dict[str, Any] = {
    "versions": {"torch": "2.13.0+cu130", "triton": "3.7.1"},
    "card": {"cuda": "13.0", "card": {"name": "NVIDIA H200", "capability": [9, 0]}},
    "kernel": {"error": 1e-7, "bound": 1e-3},
}
# answers by what the program asks about; importing the engine may print, as engines do
PYTHON = """#!{python}
import json, sys
program = sys.argv[2]
answers = json.loads({answers!r})
print("an engine's greeting")
name = "versions" if "metadata" in program else "card" if "get_device_properties" in program else "kernel"
if answers[name] is None:
    sys.exit("ModuleNotFoundError: No module named 'vllm'")
print(json.dumps(answers[name]))
"""


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("smoke", ROOT / "docker" / "smoke.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HOME", tmp_path)
    monkeypatch.setattr(module, "IMAGE", tmp_path / "image.json")
    data = tmp_path / "venv/lib/python3.11/site-packages/smbench/data"
    data.mkdir(parents=True)
    shutil.copy(ROOT / "docker" / "archs.toml", data)
    return module


def run(smoke: ModuleType, monkeypatch: pytest.MonkeyPatch, arch: str, *arguments: str, **answers: Any) -> int:
    """The exit status of smoke.py in an image of an arch whose kernels stack gives these answers."""
    python = smoke.HOME / "stacks" / "kernels" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON.format(python=sys.executable, answers=json.dumps(SOUND | answers)), encoding="utf-8")
    python.chmod(0o755)
    smoke.IMAGE.write_text(json.dumps({"name": "kernels", "arch": arch, "stacks": ["kernels"]}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["smoke.py", *arguments])
    status: int = smoke.main()
    return status


def test_an_image_on_its_card_is_fine(
    smoke: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(smoke, monkeypatch, "sm90") == 0
    said = capsys.readouterr().out
    assert "kernels: NVIDIA H200, CUDA 13.0\n" in said
    assert said.endswith("image kernels for sm90: fine\n")


@pytest.mark.parametrize(
    ("arch", "answers", "said"),
    [
        (
            "sm90",
            {"card": {"cuda": "13.0", "card": None}},
            "for sm90, and no NVIDIA GPU is visible here: start it with",
        ),
        (
            "sm86",
            {},
            "this image is for sm86, the card is NVIDIA H200 of compute capability 9.0: use the image for sm90",
        ),
        (
            "sm90",
            {"versions": {"torch": "2.12.0", "triton": "3.7.1"}},
            "torch is 2.12.0, the image's table says 2.13.0",
        ),
        ("sm90", {"versions": None}, "stack kernels: ModuleNotFoundError: No module named 'vllm'"),
        ("sm90", {"kernel": {"error": 0.5, "bound": 1e-3}}, "the kernel's relative error is 0.5, allowed is 0.001"),
        ("sm90", {"kernel": {"error": float("nan"), "bound": 1e-3}}, "the kernel's relative error is nan"),
        ("cpu", {}, "torch is built for CUDA 13.0, which does not fit an image for cpu"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    smoke: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arch: str,
    answers: dict[str, Any],
    said: str,
) -> None:
    assert run(smoke, monkeypatch, arch, **answers) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_force_goes_on_with_another_card_but_not_without_one(
    smoke: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(smoke, monkeypatch, "sm86", "--force") == 0
    assert run(smoke, monkeypatch, "sm86", "--force", card={"cuda": "13.0", "card": None}) == 1
