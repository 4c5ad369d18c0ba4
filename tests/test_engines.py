"""What every driver of an engine is, and what becomes of its settings."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from serving_requests import AXES, SEED, job
from smbench.worker.engines import ENGINES, Driver, Limits, driver, setup_of
from smbench.worker.engines.plain import plain


@pytest.mark.parametrize("name", ENGINES)
def test_every_driver_is_one(name: str) -> None:
    found = driver(name)
    for member in ("preload", "start", "serve_command"):
        wanted = list(inspect.signature(getattr(Driver, member)).parameters)[1:]
        assert list(inspect.signature(getattr(found, member)).parameters) == wanted
    assert all(isinstance(value, str) for value in [*found.ENVIRONMENT.values(), *found.SETTINGS.values()])


@pytest.mark.parametrize("name", ENGINES)
def test_naming_an_engine_imports_nothing_of_it(name: str) -> None:
    importlib.reload(importlib.import_module(ENGINES[name]))
    assert not {"lmdeploy", "sglang", "tensorrt_llm", "transformers", "vllm"} & sys.modules.keys()


def test_a_setup_is_the_axes_of_a_cell_and_the_limits_of_its_profile() -> None:
    found = setup_of(job(engine="vllm", folder=Path("m"), linear_kernel="marlin"))
    assert {name: getattr(found, name) for name in AXES if name != "model"} == {
        name: value for name, value in AXES.items() if name != "model"
    }
    assert (found.model, found.seed, found.settings) == (Path("m"), SEED, {"linear_kernel": "marlin"})
    assert found.limits == Limits(2048, 4, 0.3, 64 << 20)


class Mode(enum.Enum):
    FULL = (2, 0)


@dataclasses.dataclass
class Inner:
    mode: Mode
    folder: str
    _private: int = 1


@dataclasses.dataclass
class Outer:
    inner: Inner
    late: int = dataclasses.field(init=False)


def test_settings_become_json_without_paths() -> None:
    found = plain(
        {
            "config": Outer(Inner(Mode.FULL, "/home/somebody/cache")),
            "dtype": torch.float16,
            "sizes": {2, 1},
            "model": nn.Linear(1, 1),
            "many": list(range(1000)),
            "unset": None,
            "infinite": float("inf"),
            "huge": 1 << 70,
        }
    )
    assert found == {
        "config": {"inner": {"mode": "FULL"}},
        "dtype": "torch.float16",
        "sizes": [1, 2],
        "unset": None,
    }
