"""The tuner: the search finds the best that it may, and a tuning session keeps what it found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from small_runs import AllInstalled
from smbench import plan, recipe, tune
from smbench.errors import UsageError
from smbench.runner import WorkerCannotStart
from smbench.worker import tune as worker
from smbench_kernels import configs
from smbench_kernels.op import Config, Point, Prepared, Tunable
from smbench_kernels.registry import op as find_op
from smbench_kernels.tune import FINAL_ROUNDS, PATIENCE, REFINEMENTS, SHORTLIST, search

FAKE = (sys.executable, str(Path(__file__).with_name("fake_tuner.py")))
POINT: Point = {"batch": 1}


def _unused(*_: Any) -> Prepared:
    raise AssertionError("the search itself never prepares a launch")


def tunable(predicted: Mapping[int, float]) -> Tunable:
    """A space of one axis, with a modelled time for each value."""
    return Tunable(
        space=lambda _: [{"BLOCK": value} for value in predicted],
        prepare=_unused,
        predict=lambda _point, config, _facts: predicted[config["BLOCK"]],
        binary=lambda _point, config: str(config),
        precompile=lambda _point, config, _capability: str(config),
    )


class Clock:
    """Exact times of configurations; what is not listed is wrong or does not launch."""

    def __init__(self, times: Mapping[int, float]) -> None:
        self.times = times
        self.asked: list[tuple[int, int]] = []

    def __call__(self, config: Config, samples: int) -> float | None:
        self.asked.append((config["BLOCK"], samples))
        return self.times.get(config["BLOCK"])


@given(st.dictionaries(st.integers(1, 1000), st.floats(1e-6, 1e-3), min_size=1, max_size=PATIENCE))
def test_the_best_of_a_small_space_is_found_whatever_the_model_says(times: dict[int, float]) -> None:
    choice = search(POINT, tunable(dict.fromkeys(times, 1.0)), {}, Clock(times))
    assert choice is not None
    assert choice.time_s == min(times.values())
    assert times[choice.config["BLOCK"]] == choice.time_s
    assert (choice.candidates, choice.timed) == (len(times), len(times))


def test_a_library_is_not_starved_by_our_model() -> None:
    slow_by_model = {block: 1.0 if block < 200 else 99.0 for block in range(1, 201)}
    own = tunable(slow_by_model)
    clock = Clock({block: 1e-6 if block == 200 else 2e-6 for block in slow_by_model})
    choice = search(POINT, dataclasses.replace(own, exhaustive=True), {}, clock)
    assert choice is not None and (choice.config, choice.timed) == ({"BLOCK": 200}, 200)
    ours = search(POINT, own, {}, clock)
    assert ours is not None and ours.timed < 200


def test_a_hopeless_configuration_is_never_run() -> None:
    clock = Clock({1: 2e-6, 2: 1e-6})
    choice = search(POINT, tunable({1: 1.0, 2: 99.0}), {}, clock)
    assert choice is not None and choice.config == {"BLOCK": 1}
    assert {block for block, _ in clock.asked} == {1}


def test_the_screening_stops_when_nothing_better_comes() -> None:
    space = dict.fromkeys(range(1, 500), 1.0)
    choice = search(POINT, tunable(space), {}, Clock({block: 1e-6 * block for block in space}))
    assert choice is not None and choice.config == {"BLOCK": 1}
    assert choice.timed == 1 + PATIENCE


def test_what_won_nearby_is_tried_first_if_it_belongs_to_the_space() -> None:
    clock = Clock({1: 3e-6, 2: 2e-6, 3: 1e-6})
    search(POINT, tunable({1: 1.0, 2: 1.0, 3: 1.0}), {}, clock, [{"BLOCK": 3}, {"BLOCK": 77}])
    assert clock.asked[0][0] == 3


def test_what_won_before_is_tried_first_though_only_a_refinement_leads_to_it() -> None:
    clock = Clock({1: 3e-6, 2: 2e-6, 77: 1e-6, 78: 0.5e-6})
    own = dataclasses.replace(tunable({1: 1.0, 2: 1.0}), predict=lambda *_: 1.0)
    hints = [{"BLOCK": 78}, {"BLOCK": 77}, {"BLOCK": 77}, {"BLOCK": 2}]
    admitting = dataclasses.replace(own, admits=lambda _point, config: config["BLOCK"] == 77)
    choice = search(POINT, admitting, {}, clock, hints)
    assert choice is not None and choice.config == {"BLOCK": 77}
    # two of the space and the hint, each screened once
    assert (choice.candidates, choice.timed) == (3, 3)
    assert {block for block, _ in clock.asked[:2]} == {77, 2}
    kept = search(POINT, own, {}, clock, hints)
    assert kept is not None and kept.config == {"BLOCK": 2}


def test_a_search_begins_with_what_the_files_hold_for_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a repeated search does not end worse. A library's space is searched whole."""
    table = configs.load(configs.path_of("NVIDIA H200", "bgmv_shrink"))
    entry = table.entries[0]
    op = find_op("bgmv_shrink")
    monkeypatch.setattr(configs, "device_name", lambda _: "NVIDIA H200")
    device = torch.device("cpu")
    assert worker._kept(worker._Job(op, None, entry.point), device) == [entry.config]
    assert worker._kept(worker._Job(op, "vllm-tuned", entry.point), device) == []
    monkeypatch.setattr(configs, "device_name", lambda _: "a card without files")
    assert worker._kept(worker._Job(op, None, entry.point), device) == []


def test_wrong_configurations_win_nothing() -> None:
    choice = search(POINT, tunable({1: 1.0, 2: 1.0}), {}, Clock({2: 1e-6}))
    assert choice is not None and choice.config == {"BLOCK": 2}
    assert search(POINT, tunable({1: 1.0, 2: 1.0}), {}, Clock({})) is None


def test_the_shortlist_is_timed_there_and_back() -> None:
    clock = Clock({1: 1.00e-6, 2: 1.01e-6, 3: 1.5e-6})
    search(POINT, tunable({1: 1.0, 2: 1.0, 3: 1.0}), {}, clock)
    finals = [block for block, _ in clock.asked[3:]]
    assert finals == [1, 2, 2, 1, 1, 2][: 2 * FINAL_ROUNDS]
    assert SHORTLIST >= 2


def tuned_plan(batches: list[int], *providers: str) -> plan.Plan:
    """The shipped recipe's plan, at some batches of one operation and size."""
    text = (Path(__file__).parents[1] / "recipes" / "lora.toml").read_bytes()
    profile = "peers" if "vllm-tuned" in providers else "full"
    size = {"hidden_size": 4096, "rank": 16, "num_loras": 8} if profile == "peers" else {"hidden_size": 128}
    here = plan.Here("NVIDIA H200", stacks=AllInstalled(()))
    whole = plan.make(recipe.parse(text, "lora.toml"), text, profile, here)
    entries = [
        entry
        for entry in whole.entries
        if entry.cell.subject == "bgmv_shrink"
        and entry.cell.provider in (providers or ("smbench-tuned",))
        and size.items() <= entry.cell.axes.items()
        and entry.cell.axes["batch"] in batches
    ]
    assert len(entries) == len(batches) * max(1, len(providers))
    return dataclasses.replace(whole, entries=entries)


def tuned(folder: Path, batches: list[int], *providers: str, quality_points: int = 0) -> tune.Tuned:
    folder.mkdir(exist_ok=True)
    planned = tuned_plan(batches, *providers)
    return tune.tune(planned, folder, "A Card", 1e12, quality_points, lambda _: None, folder / "configs", FAKE)


def entries(folder: Path, library: str | None = None) -> dict[int, Config]:
    """Configuration by batch, as a provider would read it."""
    file = configs.load(configs.path_of("A Card", "bgmv_shrink", folder / "configs", library))
    assert (file.device, file.triton, file.library) == ("A Card", "9.9", library)
    return {int(entry.point["batch"]): entry.config for entry in file.entries}


def test_every_right_point_gets_a_configuration_that_providers_read(tmp_path: Path) -> None:
    done = tuned(tmp_path, [1, 8, 24])
    assert entries(tmp_path) == {1: {"BLOCK": 10}, 24: {"BLOCK": 240}}
    assert (done.points, done.searched, done.binaries, done.timed, done.candidates) == (2, 3, 7, 40, 200)


def test_a_death_keeps_what_was_found_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkerCannotStart):
        tuned(tmp_path, [1, 16, 24])
    assert entries(tmp_path) == {1: {"BLOCK": 10}}
    monkeypatch.setenv("FAKE_TUNER_SURVIVES", "1")
    assert tuned(tmp_path, [1, 16, 24]).searched == 2
    assert entries(tmp_path) == {1: {"BLOCK": 10}, 16: {"BLOCK": 160}, 24: {"BLOCK": 240}}


def test_a_torn_journal_line_is_searched_again(tmp_path: Path) -> None:
    tuned(tmp_path, [1, 24])
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    assert tuned(tmp_path, [1, 24]).searched == 1
    assert all(json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())
    assert entries(tmp_path) == {1: {"BLOCK": 10}, 24: {"BLOCK": 240}}


def test_entries_of_other_points_stay(tmp_path: Path) -> None:
    tuned(tmp_path, [1])
    (tmp_path / "journal.jsonl").unlink()
    tuned(tmp_path, [24])
    assert set(entries(tmp_path)) == {1, 24}


def test_the_comparison_with_an_exhaustive_search_is_told(tmp_path: Path) -> None:
    tuned(tmp_path, [1, 24])
    said = tuned(tmp_path, [1, 24], quality_points=2).lines()
    assert "the search against the exhaustive best of 2 random points: 2 within 2 %" in said[2]
    assert "what the files held against the exhaustive best of 2 random points: 0 within 2 %" in said[3]


BOTH = ("smbench-tuned", "vllm-tuned")


def test_a_library_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert tuned(tmp_path, [1, 256], *BOTH).searched == 4
    assert entries(tmp_path) == entries(tmp_path, "vllm 0.26.0") == {1: {"BLOCK": 10}, 256: {"BLOCK": 2560}}
    assert tuned(tmp_path, [1, 256], *BOTH).searched == 0


def test_another_version_of_a_library_is_searched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(tmp_path, [1], *BOTH)
    monkeypatch.setenv("FAKE_TUNER_LIBRARY", "vllm 0.33.0")
    assert tuned(tmp_path, [1, 256], *BOTH).searched == 3
    assert entries(tmp_path, "vllm 0.26.0") == {1: {"BLOCK": 10}}
    assert entries(tmp_path, "vllm 0.33.0") == {1: {"BLOCK": 10}, 256: {"BLOCK": 2560}}


def test_a_library_that_is_not_here_leaves_ours_to_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TUNER_LIBRARY", "")
    done = tuned(tmp_path, [1], *BOTH)
    assert done.searched == 1 and entries(tmp_path) == {1: {"BLOCK": 10}}
    assert done.lines()[0] == "vllm-tuned was not searched: vllm is not installed in this stack"


def test_a_space_is_searched_around_the_best_so_far_until_that_stays() -> None:
    first = tunable({1: 1.0, 2: 1.0})
    around = dataclasses.replace(first, refine=lambda _, config: [{"BLOCK": 10 * config["BLOCK"]}, config])
    both = dataclasses.replace(around, predict=lambda _point, _config, _facts: 1.0)
    # 2 of the space, then 20 around it, then 200 is wrong and 20 stays
    choice = search(POINT, both, {}, Clock({1: 3e-6, 2: 2e-6, 20: 1e-6}))
    assert choice is not None and choice.config == {"BLOCK": 20}
    assert (choice.candidates, choice.timed) == (6, 6)
    worse = search(POINT, both, {}, Clock({1: 3e-6, 2: 2e-6, 20: 4e-6}))
    assert worse is not None and worse.config == {"BLOCK": 2} and worse.timed == 4
    endless = search(POINT, both, {}, Clock({1: 3e-6, **{2 * 10**power: 2e-6 / 2**power for power in range(9)}}))
    assert endless is not None and endless.config == {"BLOCK": 2 * 10**REFINEMENTS}


def test_a_plan_with_nothing_tuned_is_refused() -> None:
    with pytest.raises(UsageError, match="no provider has selection 'tuned', so there is nothing to tune"):
        tune.points_of(tuned_plan([1], "smbench"))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so() -> None:
    command = [sys.executable, "-m", "smbench", "tune", "lora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tuning needs an NVIDIA GPU" in done.stderr
