"""The dependency rule is enforced, not promised: each forbidden import makes ruff fail, each permitted one does not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = (
    "pyproject.toml",
    "bench/values.ruff.toml",
    "bench/smbench/ruff.toml",
    "bench/smbench/worker/ruff.toml",
    "kernels/ruff.toml",
)
VALUES_CONFIG = "bench/values.ruff.toml"

HOST = "bench/smbench/report.py"
CLI = "bench/smbench/cli.py"
VALUE = "bench/smbench/stats.py"
WORKER = "bench/smbench/worker/op.py"
ENGINE = "bench/smbench/worker/engines/vllm.py"
KERNEL = "kernels/smbench_kernels/bgmv_shrink.py"


def banned(config: str) -> set[str]:
    table = tomllib.loads((ROOT / config).read_text(encoding="utf-8"))
    return set(table["lint"]["flake8-tidy-imports"]["banned-api"])


def ruff_accepts(folder: Path, path: str, source: str) -> bool:
    """Whether both of `make check`'s ruff runs find the module's imports permitted."""
    for config in CONFIGS:
        (folder / config).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / config, folder / config)
    module = folder / path
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(source, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID"]
    runs = [
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        for command in ([*ruff, "."], [*ruff, "--config", VALUES_CONFIG, "bench/smbench"])
    ]
    # 2 is ruff's own failure, such as a broken config
    assert all(run.returncode in (0, 1) for run in runs), [run.stderr for run in runs]
    assert all("TID" in run.stdout for run in runs if run.returncode == 1)
    return all(run.returncode == 0 for run in runs)


FORBIDDEN = [
    (HOST, "import torch"),
    (HOST, "import triton.language as tl"),
    (HOST, "from vllm import LLM"),
    (HOST, "import sglang"),
    (HOST, "import lmdeploy"),
    (HOST, "import tensorrt_llm"),
    (HOST, "from transformers import AutoModel"),
    (HOST, "from smbench.worker.timing import Spec"),
    (HOST, "from smbench import worker"),
    (HOST, "from smbench import cli"),
    (HOST, "from . import recipe"),
    (HOST, "def late():\n    import torch\n    return torch"),
    (CLI, "import torch"),
    (CLI, "from smbench.worker import op"),
    (CLI, "from smbench import cli"),
    (VALUE, "import torch"),
    (VALUE, "import typer"),
    (VALUE, "from jinja2 import Template"),
    (VALUE, "from rich.console import Console"),
    (VALUE, "from smbench.runner import run"),
    (VALUE, "from smbench import report"),
    (VALUE, "from smbench.worker.timing import Spec"),
    (VALUE, "def late():\n    from smbench.cli import main\n    return main"),
    (WORKER, "import typer"),
    (WORKER, "import jinja2"),
    (WORKER, "import rich.progress"),
    (WORKER, "import docker"),
    (WORKER, "from smbench.runner import run"),
    (WORKER, "from smbench import report, stats"),
    (WORKER, "from smbench.cli import main"),
    (ENGINE, "import typer"),
    (ENGINE, "from smbench.report import render"),
    (KERNEL, "import smbench"),
    (KERNEL, "from smbench.stats import summarize"),
    (KERNEL, "def late():\n    from smbench.worker import timing\n    return timing"),
]
PERMITTED = [
    (HOST, "import jinja2"),
    (HOST, "from smbench.stats import summarize"),
    (HOST, "from smbench_kernels.registry import OPS"),
    (CLI, "import typer"),
    (CLI, "from smbench import report"),
    (VALUE, "import numpy as np"),
    (VALUE, "from smbench.cell import Cell"),
    (WORKER, "import torch"),
    (WORKER, "from smbench.stats import summarize"),
    (WORKER, "from smbench_kernels.op import Op"),
    (ENGINE, "from vllm import LLM"),
    (KERNEL, "import triton"),
    (KERNEL, "from smbench_kernels.op import Op"),
]


def name(value: str) -> str:
    return value.replace("\n", " ").removeprefix("bench/smbench/")


@pytest.mark.parametrize(("path", "source"), FORBIDDEN, ids=name)
def test_a_forbidden_import_fails_the_check(tmp_path: Path, path: str, source: str) -> None:
    assert not ruff_accepts(tmp_path, path, f"{source}\n")


@pytest.mark.parametrize(("path", "source"), PERMITTED, ids=name)
def test_a_permitted_import_passes_the_check(tmp_path: Path, path: str, source: str) -> None:
    assert ruff_accepts(tmp_path, path, f"{source}\n")


def test_every_module_is_a_value_or_is_banned_for_values_and_worker() -> None:
    """A new module must be put on one side, or the rule would silently not know it."""
    values_config = tomllib.loads((ROOT / VALUES_CONFIG).read_text(encoding="utf-8"))
    values = set(values_config["include"])
    host = banned(VALUES_CONFIG) & banned("bench/smbench/worker/ruff.toml")
    for module in sorted((ROOT / "bench" / "smbench").glob("*.py")):
        if module.name == "__main__.py":
            continue
        is_value = f"bench/smbench/{module.name}" in values
        assert is_value != (f"smbench.{module.stem}" in host), f"{module.name} is to be listed once in {VALUES_CONFIG}"


def test_host_and_values_load_without_torch() -> None:
    """What no lint sees: an import through a third module, or by name."""
    modules = [f"smbench.{path.stem}" for path in sorted((ROOT / "bench" / "smbench").glob("[!_]*.py"))]
    heavy = ("torch", "triton", "transformers", "vllm", "sglang", "lmdeploy")
    program = "\n".join(
        [
            "import importlib, sys",
            f"for name in {modules!r}:",
            "    importlib.import_module(name)",
            f"    if heavy := set({heavy!r}) & set(sys.modules):",
            "        sys.exit(f'{name} loads {sorted(heavy)}')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
