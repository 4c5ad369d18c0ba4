"""Merging loses nothing, chooses nothing, and refuses whatever is not one experiment."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fake_run
import small_runs
from smbench import bundle, runfolder, verify
from smbench.cell import Cell
from smbench.cli import app
from smbench.errors import UsageError
from smbench.identity import environment_id
from smbench.merge import merge
from smbench.recipe import Profile
from smbench.result import Environment, Result

Outcome = Callable[[Cell, Profile], Result | None]


def stack(providers: Collection[str], facts: dict[str, Any]) -> Outcome:
    """A machine that can run some providers only."""

    def outcome(cell: Cell, profile: Profile) -> Result | None:
        if cell.provider in providers:
            return fake_run.ok(cell, profile).model_copy(update={"environment_id": environment_id(facts)})
        return fake_run.result(cell, "unsupported", "the package is not installed here")

    return outcome


def measured(
    folder: Path, providers: Collection[str], cores: int, started_at: str, text: bytes = fake_run.RECIPE
) -> Path:
    """A run of one stack on a machine of its own, with a log."""
    facts = {**fake_run.GPU, "cpu": {"cores_usable": cores}}
    session = fake_run.session(1)[0].model_copy(update={"started_at": started_at})
    fake_run.build(folder, text, "full", stack(providers, facts), [], [session])
    lines = (folder / "results.jsonl").read_text(encoding="utf-8")
    environment = Environment(environment_id=environment_id(facts), environment=facts)
    (folder / "results.jsonl").write_text(environment.model_dump_json() + "\n" + lines, encoding="utf-8")
    (folder / "logs").mkdir()
    (folder / "logs" / "worker-001.log").write_text(f"log of {folder.name}", encoding="utf-8")
    (folder / "native").mkdir()
    (folder / "native" / f"cell-of-{folder.name}.json").write_text(folder.name, encoding="utf-8")
    return folder


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Path]:
    """Two stacks of one recipe; the first was measured last."""
    a = measured(tmp_path / "a", ("torch", "smbench", "smbench-tuned"), 8, "2026-01-02T00:00:00Z")
    return a, measured(tmp_path / "b", ("vllm", "sglang"), 16, "2026-01-01T00:00:00Z")


def test_a_measured_result_takes_the_place_of_an_unsupported_one_and_nothing_is_lost(
    tmp_path: Path, halves: tuple[Path, Path]
) -> None:
    a, b = (runfolder.load(half) for half in halves)
    merge(tmp_path / "both", halves)
    joined = runfolder.load(tmp_path / "both")
    assert [cell.cell_id for cell in joined.cells] == [cell.cell_id for cell in a.cells]
    assert {result.status for result in joined.results.values()} == {"ok"}
    for cell_id, result in joined.results.items():
        source = a if result.cell.provider in ("torch", "smbench", "smbench-tuned") else b
        assert result == source.results[cell_id]
    assert list(joined.environments) == [*a.environments, *b.environments]
    assert [session.started_at for session in joined.sessions] == ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]
    logs = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "both" / "logs").iterdir()}
    assert logs == {"worker-001.log": "log of a", "worker-002.log": "log of b"}
    native = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "both" / "native").iterdir()}
    assert native == {"cell-of-a.json": "a", "cell-of-b.json": "b"}
    assert (tmp_path / "both" / "recipe.toml").read_bytes() == fake_run.RECIPE
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_merged_folder_reports_packs_and_verifies(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "both"), *map(str, halves)])
    assert (done.exit_code, done.exception) == (0, None)
    assert "ok" in done.stdout
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    assert "results of 2 different environments are in this run" in text
    packed = bundle.pack(tmp_path / "both", tmp_path / "both.tar.gz")
    assert packed
    assert len(verify.verify(packed.path).run.environments) == 2


def test_folders_of_a_narrowed_plan_are_joined_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    text = small_runs.recipe_text(sizes=[100, 200, 300])
    folders = []
    for name, kept in (("a", (300,)), ("b", (100, 200))):
        cells = [small_runs.cell(size) for size in kept]
        runfolder.create(tmp_path / name, text, "small", "cpu", cells)
        results = "".join(small_runs.timed(cell).model_dump_json() + "\n" for cell in cells)
        (tmp_path / name / "results.jsonl").write_text(results, encoding="utf-8")
        folders.append(tmp_path / name)
    merge(tmp_path / "all", folders)
    assert [cell.axes["hidden_size"] for cell in runfolder.load(tmp_path / "all").cells] == [100, 200, 300]


def test_a_merged_folder_goes_on_like_any_other(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    merge(tmp_path / "both", halves)
    joined = runfolder.load(tmp_path / "both")
    # as `smbench run` does first
    runfolder.create(tmp_path / "both", joined.recipe_text, "lora", "full", joined.recipe.cells("full"))
    with runfolder.Appender(tmp_path / "both") as appender:
        appender.append(fake_run.session(0)[0])
    assert len(runfolder.load(tmp_path / "both").sessions) == 3


def test_a_cell_with_two_numbers_is_a_conflict_that_names_it(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    other = measured(tmp_path / "c", ("vllm",), 32, "2026-01-03T00:00:00Z")
    lines = (other / "results.jsonl").read_text(encoding="utf-8").replace('"samples_s":[', '"samples_s":[1e-6,')
    (other / "results.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(UsageError, match=r"were tried in two .*\n  bgmv_shrink/vllm .*: ok in b, ok in c\n") as refused:
        merge(tmp_path / "all", [*halves, other])
    assert "more" in str(refused.value).splitlines()[-1]
    assert not (tmp_path / "all").exists()


def test_a_failure_is_no_gap_that_another_machine_may_fill(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    a, _ = halves
    loaded = runfolder.load(a)
    crashed = next(result for result in loaded.results.values() if result.cell.provider == "vllm")
    line = fake_run.result(crashed.cell, "crashed", "killed by SIGSEGV").model_dump_json()
    with (a / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match=r"^1 cell was tried in two .*\n  bgmv_shrink/vllm .*: crashed in a, ok in b$"):
        merge(tmp_path / "both", halves)


def test_the_same_results_twice_are_no_conflict(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    a, _ = halves
    merge(tmp_path / "once", [a, a])
    once, loaded = runfolder.load(tmp_path / "once"), runfolder.load(a)
    assert (once.results, list(once.sessions)) == (loaded.results, list(loaded.sessions))


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (b"protocol_version = 1", b"protocol_version = 2", "protocol_version: 1 and 2"),
        (b"samples = 5", b"samples = 6", "recipe.toml: profile: unlike values"),
        (b'name = "lora"', b'name = "other"', "recipe: 'lora' and 'other'"),
    ],
)
def test_runs_of_unlike_experiments_are_refused(
    tmp_path: Path, halves: tuple[Path, Path], old: bytes, new: bytes, names: str
) -> None:
    text = fake_run.RECIPE.replace(old, new)
    other = measured(tmp_path / "c", ("vllm",), 16, "2026-01-03T00:00:00Z", text)
    with pytest.raises(UsageError, match=f"a and c are not of one experiment: {names}"):
        merge(tmp_path / "all", [halves[0], other])


def test_another_profile_is_refused(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    other = fake_run.build(tmp_path / "cpu", fake_run.RECIPE, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    with pytest.raises(UsageError, match="profile: 'full' and 'cpu'"):
        merge(tmp_path / "all", [halves[0], other])


def test_an_existing_folder_is_never_merged_into(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    before = (halves[0] / "results.jsonl").read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        merge(halves[0], halves)
    with pytest.raises(UsageError, match="at least two"):
        merge(tmp_path / "all", halves[:1])
    assert (halves[0] / "results.jsonl").read_bytes() == before
    (tmp_path / "empty").mkdir()
    merge(tmp_path / "empty", halves)
    assert runfolder.load(tmp_path / "empty").results


def test_torn_lines_that_runs_set_aside_are_kept(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    for half in halves:
        (half / "results.torn-500.txt").write_text(f"half a line of {half.name}", encoding="utf-8")
    merge(tmp_path / "both", halves)
    kept = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "both").glob("results.torn-*.txt")}
    assert kept == {"results.torn-500.txt": "half a line of a", "results.torn-501.txt": "half a line of b"}
