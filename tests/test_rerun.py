"""A colleague's run, repeated here: the very recipe and cells, a comparison at the end, and clear refusals."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fake_run
import small_runs
from compared import packable
from small_runs import FAKE_WORKER
from smbench import bundle, plan, recipe, report, rerun, runfolder, runner
from smbench.cli import app
from smbench.errors import UsageError


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are answered by the fake worker, and no GPU is here."""
    command = (sys.executable, str(FAKE_WORKER))
    monkeypatch.setattr(runner, "run", functools.partial(runner.run, worker_command=command))
    monkeypatch.setattr("smbench.cli._here", plan.Here)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A run of one of the five providers that the profile has."""
    made = plan.make(
        recipe.parse(fake_run.RECIPE, "lora.toml"), fake_run.RECIPE, "cpu", plan.Here(), providers=("torch",)
    )
    folder = tmp_path / "theirs"
    runner.run(made, folder, lambda result: None, lambda warning: None)
    report.render(folder)
    return folder


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["rerun", *map(str, arguments)])


def test_the_very_cells_are_measured_again_and_compared(tmp_path: Path, theirs: Path) -> None:
    done = command(theirs, "--out", tmp_path / "ours")
    assert (done.exit_code, done.exception) == (0, None), done.output
    source, ours = runfolder.load(theirs), runfolder.load(tmp_path / "ours")
    assert ours.recipe_text == source.recipe_text
    assert (ours.profile_name, ours.cells) == (source.profile_name, source.cells)
    assert {result.status for result in ours.results.values()} == {"ok"}
    assert (tmp_path / "ours" / "report.md").exists()
    stored = json.loads((tmp_path / "ours" / "compare" / "compare.json").read_text(encoding="utf-8"))
    # the fake worker gives the same samples again
    assert stored["comparisons"][0]["counts"] == {"slower": 0, "faster": 0, "same": 4, "unclear": 0}
    assert "ours against theirs: 0 slower, 0 faster, 4 same, 0 unclear" in done.stderr
    assert "4 ok" in done.stdout


def test_a_bundle_is_repeated_like_the_folder_that_it_was_packed_from(tmp_path: Path, theirs: Path) -> None:
    packed = bundle.pack(packable(theirs), tmp_path / "theirs.tar.gz")
    assert packed
    done = command(packed.path, "--out", tmp_path / "ours")
    assert (done.exit_code, done.exception) == (0, None), done.output
    assert "ours against theirs.tar.gz: 0 slower, 0 faster, 4 same, 0 unclear" in done.stderr
    # the comparison does not keep our own run from being packed
    assert bundle.pack(packable(tmp_path / "ours"), tmp_path / "ours.tar.gz")


def test_the_same_command_again_measures_nothing(tmp_path: Path, theirs: Path) -> None:
    command(theirs, "--out", tmp_path / "ours")
    before = (tmp_path / "ours" / "results.jsonl").read_bytes()
    assert command(theirs, "--out", tmp_path / "ours").exit_code == 0
    assert (tmp_path / "ours" / "results.jsonl").read_bytes() == before


def test_a_device_that_is_not_here_is_named_and_the_cpu_profile_offered(tmp_path: Path) -> None:
    theirs = fake_run.build(tmp_path / "theirs", fake_run.RECIPE, "full", fake_run.every_status, [fake_run.GPU])
    refusal = command(theirs, "--out", tmp_path / "ours").exception
    assert isinstance(refusal, UsageError)
    assert "profile 'full', which needs an NVIDIA GPU, and none is visible" in str(refusal)
    assert "`--profile cpu` runs what this machine can" in str(refusal)
    assert not (tmp_path / "ours").exists()


def test_the_cpu_profile_of_a_gpu_run_ends_with_what_is_incomparable(tmp_path: Path) -> None:
    text = fake_run.RECIPE.replace(b"hidden_size = [128, 256]", b"hidden_size = [128, 4096]")
    theirs = fake_run.build(tmp_path / "theirs", text, "full", fake_run.every_status, [fake_run.GPU])
    done = command(theirs, "--profile", "cpu", "--out", tmp_path / "ours")
    assert (done.exit_code, done.exception) == (0, None), done.output
    compared = (tmp_path / "ours" / "compare" / "compare.md").read_text(encoding="utf-8")
    assert "**Nothing could be compared.**" in compared
    assert "| measurement | document, cold | wall |" in compared


def test_another_protocol_is_refused_before_anything_runs(tmp_path: Path) -> None:
    text = fake_run.RECIPE.replace(b"protocol_version = 1", b"protocol_version = 99")
    theirs = fake_run.build(tmp_path / "theirs", text, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    refusal = command(theirs, "--out", tmp_path / "ours").exception
    assert isinstance(refusal, UsageError)
    assert "was measured by protocol_version 99 of recipe 'lora', and this smbench measures by 1" in str(refusal)


def test_cells_that_the_recipe_does_not_have_are_refused(tmp_path: Path) -> None:
    text = small_runs.recipe_text()
    strange = [small_runs.cell(100), small_runs.cell(100, batch=3)]
    runfolder.create(tmp_path / "theirs", text, "small", "cpu", strange)
    with pytest.raises(UsageError, match="1 of its 2 cells are not in its recipe"):
        rerun.plan_of(runfolder.load(tmp_path / "theirs"), None, plan.Here())


def test_an_unknown_profile_lists_those_that_exist(theirs: Path) -> None:
    with pytest.raises(UsageError, match="has no profile 'huge'; known: full, cpu"):
        rerun.plan_of(runfolder.load(theirs), "huge", plan.Here())


def test_a_run_goes_into_a_folder_named_after_its_source(tmp_path: Path) -> None:
    assert rerun.default_folder(Path("lora-h200-0123.tar.gz"), tmp_path) == tmp_path / "runs" / "lora-h200-0123-rerun"


def test_neither_a_folder_nor_a_bundle(tmp_path: Path) -> None:
    assert isinstance(command(tmp_path / "none").exception, UsageError)
