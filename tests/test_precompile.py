"""Kernels are compiled on all cores before they are timed: those that the cells will launch, each once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton

from smbench.worker import baked, precompile
from smbench.worker.precompile import Task
from smbench_kernels import configs, hardware
from smbench_kernels.op import Point
from smbench_kernels.registry import op as find_op

DEVICE = torch.device("cpu")
SMALL: Point = {"batch": 1, "seq_len": 1, "hidden_size": 4096, "rank": 16, "num_loras": 1, "dtype": "bfloat16"}
LARGE: Point = {**SMALL, "batch": 256, "rank": 64, "num_loras": 8}


@dataclass(frozen=True)
class Cell:
    subject: str
    provider: str
    axes: Point


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has an H200 and an empty cache."""
    monkeypatch.setattr(configs, "device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(hardware, "of", lambda _: hardware.TYPICAL[90])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setenv(baked.VARIABLE, str(tmp_path / "nothing shipped"))


def test_a_task_is_what_the_provider_will_launch() -> None:
    cells = [Cell("bgmv_shrink", provider, LARGE) for provider in ("smbench", "smbench-tuned", "torch", "vllm")]
    tasks = list(precompile.of_cells(cells, DEVICE).values())
    tunable = find_op("bgmv_shrink").tuning()
    assert tunable.default
    table = configs.load(configs.path_of("NVIDIA H200", "bgmv_shrink"))
    wanted = [tunable.default(LARGE, hardware.TYPICAL[90]), configs.lookup(table, LARGE)[0]]
    assert {task.provider for task in tasks} == {None}
    assert {tunable.binary(LARGE, task.config) for task in tasks} == {tunable.binary(LARGE, one) for one in wanted}


def test_cells_that_share_a_kernel_need_it_once() -> None:
    """Numbers of tokens and of parts are arguments of the kernel."""
    cells = [Cell("bgmv_shrink", "smbench-tuned", {**SMALL, "num_loras": loras}) for loras in (1, 8, 32)] * 2
    assert len(precompile.of_cells(cells, DEVICE)) <= 3


def test_points_that_nothing_is_tuned_for_are_left_to_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "device_name", lambda _: "a card without files")
    assert not precompile.of_cells([Cell("bgmv_shrink", "smbench-tuned", SMALL)], DEVICE)


def test_an_image_that_ships_kernels_needs_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / baked.FACTS).write_text("{}")
    monkeypatch.setenv(baked.VARIABLE, str(tmp_path))
    assert not precompile.of_cells([Cell("bgmv_shrink", "smbench", SMALL)], DEVICE)


def test_progress_is_told_and_a_list_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile_all(tasks: Sequence[Task], capability: int) -> Iterator[int]:
        for done in range(1, len(tasks) + 1):
            compiled.append(capability)
            yield done

    monkeypatch.setattr(precompile, "compile_all", compile_all)
    monkeypatch.setattr(precompile, "FEWEST", 2)
    cells = [Cell("bgmv_shrink", "smbench-tuned", point) for point in (SMALL, LARGE)]
    told = list(precompile.ahead(cells, DEVICE))
    assert [(row["done"], row["of"]) for row in told] == [(0, 2), (2, 2)]
    assert compiled == [90, 90]
    assert not list(precompile.ahead(cells, DEVICE)), "the same list again"
    assert not list(precompile.ahead(cells[:1], DEVICE)), "too few to be worth the processes"
    more = [*cells, Cell("bgmv_expand", "smbench-tuned", LARGE)]
    assert [row["of"] for row in precompile.ahead(more, DEVICE)] == [3, 3], "another list"


def test_what_was_compiled_is_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    tunable = find_op("bgmv_shrink").tuning()
    config = {"BLOCK_R": 2, "BLOCK_K": 4096, "SPLIT_K": 1, "num_warps": 8}
    assert list(precompile.compile_all([Task("bgmv_shrink", None, SMALL, config)], 90)) == [1]
    before = sorted(folder.iterdir())
    assert before
    tunable.precompile(SMALL, config, 90)
    assert sorted(folder.iterdir()) == before


def test_a_fault_of_this_is_no_reason_not_to_measure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(tasks: Sequence[Task], capability: int) -> Iterator[int]:
        yield 1
        raise RuntimeError("no process can be started")

    monkeypatch.setattr(precompile, "compile_all", broken)
    monkeypatch.setattr(precompile, "FEWEST", 1)
    told = list(precompile.ahead([Cell("bgmv_shrink", "smbench-tuned", LARGE)], DEVICE))
    assert told[0]["done"] == 0
    assert "no process can be started" in capfd.readouterr().err


def test_a_kernel_that_does_not_compile_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(precompile.compile_all([Task("bgmv_shrink", None, LARGE, {"KERNEL": 2})], 90)) == [1]
    assert "bgmv_shrink None {'KERNEL': 2}: KeyError" in capfd.readouterr().err
