"""The command as a user and a program meet it: its answers, its errors, its exit codes, and that it answers at once.

Exit codes 130 (Ctrl-C) and 0 (SIGTERM), and what a stopped run says, are in test_runner.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import REPOSITORY, recipe_text
from smbench import recipe

SMBENCH = (sys.executable, "-m", "smbench")
FAKE_HOST = Path(__file__).with_name("fake_host.py")
COMMANDS = ("list", "plan", "run", "tune", "report", "doctor")


def call(command: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


def smbench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call([*SMBENCH, *arguments], folder)


def without_gpu(
    folder: Path, *arguments: str, sizes: Sequence[int] = (100, 200), recipes: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command on a machine without a GPU, over a fake worker; by default with one recipe, `small`."""
    if recipes is None:
        recipes = folder / "recipes"
        recipes.mkdir(exist_ok=True)
        (recipes / "small.toml").write_bytes(recipe_text(sizes))
    return call([sys.executable, str(FAKE_HOST), str(recipes), *arguments], folder, **environment)


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on standard output of a command that went well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_list_names_every_recipe_with_its_sizes(tmp_path: Path) -> None:
    done = smbench(tmp_path, "list", "--json")
    found = {row["name"]: row for row in answer(done)}
    assert done.stderr == ""
    assert sorted(found) == recipe.names(REPOSITORY / "recipes")
    assert found["lora"]["document"] == "000"
    assert found["lora"]["cells"].keys() == {"full", "quick", "cpu"}
    text = smbench(tmp_path, "list").stdout
    assert all(name in text and row["title"] in text for name, row in found.items())


def test_plan_tells_every_cell_its_stack_the_minutes_and_what_is_impossible_and_why(tmp_path: Path) -> None:
    done = smbench(tmp_path, "plan", "lora", "--profile", "cpu", "--json")
    plan = answer(done)
    assert done.stderr == ""
    assert (plan["recipe"], plan["profile"]) == ("lora", "cpu")
    assert plan["estimate_s"] > 0
    assert len({cell["cell_id"] for cell in plan["cells"]}) == len(plan["cells"]) > 0
    assert {cell["stack"] for cell in plan["cells"]} == {"kernels"}
    reasons = {cell["unsupported"] for cell in plan["cells"] if cell["provider"] == "vllm"}
    assert reasons == {"needs a device of kind cuda, this profile runs on cpu"}
    assert not any(cell["unsupported"] or cell["untimed"] for cell in plan["cells"] if cell["provider"] == "torch")


def test_plan_reads_well_in_a_pipe(tmp_path: Path) -> None:
    done = without_gpu(tmp_path, "plan", "small", sizes=[100, 200, 300])
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "recipe small, profile cpu: 3 cells"
    assert lines[2].split() == ["bgmv_shrink", "torch", "kernels", "3", "timed"]
    assert lines[-1] == "estimate: 0.0 minutes (basis: made up)"
    every = without_gpu(tmp_path, "plan", "small", "--cells", sizes=[100, 200, 300]).stdout
    assert [f"hidden_size={size}" in every for size in (100, 200, 300)] == [True] * 3


def test_doctor_gives_every_check_a_verdict_and_every_trouble_a_fix(tmp_path: Path) -> None:
    done = smbench(tmp_path, "doctor", "--json")
    checks = json.loads(done.stdout)
    assert {"gpu", "disk", "memory"} <= {check["name"] for check in checks}
    assert {check["verdict"] for check in checks} <= {"ok", "warn", "fail", "unknown"}
    assert all(check["fix"] for check in checks if check["verdict"] in ("warn", "fail"))
    assert done.returncode == int(any(check["verdict"] == "fail" for check in checks))
    assert done.stderr == ""


def test_a_run_ends_with_a_report_and_the_same_command_adds_nothing(tmp_path: Path) -> None:
    command = ("run", "lora", "--out", "out", "--json")
    recipes = REPOSITORY / "recipes"
    first = answer(without_gpu(tmp_path, *command, recipes=recipes, FAKE_HOST_REPORT="1"))
    assert first == {
        "folder": "out",
        "counts": {"ok": 42, "verified": 42, "unsupported": 126},
        "report": "out/report.md",
    }
    results = (tmp_path / "out/results.jsonl").read_bytes()
    report = (tmp_path / "out/report.md").read_bytes()
    assert report.startswith(b"# ")
    assert (tmp_path / "out/report.html").exists()
    assert list((tmp_path / "out/figures").glob("*.png"))
    second = without_gpu(tmp_path, *command, recipes=recipes)
    assert answer(second) == first
    assert "210 cells, 210 of them already measured" in second.stderr
    again = smbench(tmp_path, "report", "out", "--json")
    assert (answer(again), again.stderr) == (first, "")
    assert (tmp_path / "out/results.jsonl").read_bytes() == results
    assert (tmp_path / "out/report.md").read_bytes() == report


def test_without_out_the_folder_is_named_after_recipe_and_device(tmp_path: Path) -> None:
    done = without_gpu(tmp_path, "run", "small")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["2 ok", "report: runs/small-cpu/report.md"]
    assert (tmp_path / "runs/small-cpu/results.jsonl").exists()


def test_a_run_in_a_pipe_tells_its_progress_in_plain_lines(tmp_path: Path) -> None:
    done = without_gpu(tmp_path, "run", "small", sizes=[100, 200, 12])
    assert done.stderr.splitlines() == [
        "3 cells; about 3 s to go",
        "3 of 3 cells (2 ok, 1 unsupported)",
    ]


@pytest.mark.parametrize("size", [3, 10, 11], ids=["crashed", "incorrect", "oom"])
def test_measured_and_failed_is_exit_code_1_with_everything_else_in_place(tmp_path: Path, size: int) -> None:
    done = without_gpu(tmp_path, "run", "small", "--json", sizes=[100, size, 200])
    assert done.returncode == 1
    assert json.loads(done.stdout)["counts"]["ok"] == 2
    assert "Traceback" not in done.stderr


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").rstrip("\n")


def test_what_cannot_be_done_is_exit_code_2_and_says_what_can(tmp_path: Path) -> None:
    for arguments, told in {
        ("plan", "smal"): "unknown recipe 'smal'; known: small; did you mean 'small'?",
        ("run", "smal"): "unknown recipe 'smal'; known: small; did you mean 'small'?",
        ("run", "small", "--profile", "fast"): "recipe 'small' has no profile 'fast'; known: cpu, full",
        ("plan", "small", "--profile", "full"): "profile 'full' of recipe 'small' needs an NVIDIA GPU and none is "
        "visible; run PROFILE=cpu, or see `smbench doctor`",
        ("run", "small", "--provider", "x"): "unknown provider 'x' in profile 'cpu'; known: torch",
        ("report", "."): ". is not a run folder: it has no run.json",
        ("report", "nowhere"): "nowhere is not a run folder: it has no run.json",
        ("tune", "small"): "tuning needs an NVIDIA GPU and none is visible; see `smbench doctor`",
    }.items():
        assert refused(without_gpu(tmp_path, *arguments), 2) == told
    # nothing was made on the way
    assert [path.name for path in tmp_path.iterdir()] == ["recipes"]


def test_a_recipe_with_a_fault_is_exit_code_2_with_file_key_and_known_keys(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/bad.toml").write_bytes(recipe_text().replace(b"samples = 5", b"sampels = 5", 1))
    told = refused(without_gpu(tmp_path, "run", "bad", recipes=tmp_path / "recipes"), 2)
    assert "bad.toml: profile.cpu.measure[0].sampels: unknown key; known keys here: calls, l2, " in told
    assert told.endswith("did you mean 'samples'?")


def test_a_worker_that_refuses_is_exit_code_2_and_one_that_never_starts_is_1(tmp_path: Path) -> None:
    assert refused(without_gpu(tmp_path, "run", "small", "--out", "a", sizes=[20]), 2).splitlines()[-1]
    done = without_gpu(tmp_path, "run", "small", "--out", "b", sizes=[21])
    assert done.returncode == 1
    assert "its last words: the worker died (exit code 1): … the driver on your system is too old" in done.stderr
    assert "fix: see b/logs and `smbench doctor`; the same command goes on: smbench run small" in done.stderr


def test_an_unknown_option_is_exit_code_2(tmp_path: Path) -> None:
    done = smbench(tmp_path, "run", "lora", "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--no-such-option" in done.stderr


def test_damaged_or_newer_results_are_exit_code_3(tmp_path: Path) -> None:
    assert without_gpu(tmp_path, "run", "small", "--out", "out").returncode == 0
    results = tmp_path / "out/results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole.replace(b'"status":"ok"', b'"status":"okay"', 1))
    for command in (("report", "out"), ("run", "small", "--out", "out")):
        assert "results.jsonl: line 2: result.status: Input should be 'ok'" in refused(
            without_gpu(tmp_path, *command), 3
        )
    results.write_bytes(whole)
    run_file = tmp_path / "out/run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_bytes()) | {"format": 2}), encoding="utf-8")
    for command in (("report", "out"), ("run", "small", "--out", "out")):
        told = refused(without_gpu(tmp_path, *command), 3)
        assert told == "out/run.json: format 2 is newer than this smbench reads (1); update smbench"
    assert results.read_bytes() == whole


def test_a_folder_of_another_run_is_exit_code_2_and_stays_as_it_is(tmp_path: Path) -> None:
    assert without_gpu(tmp_path, "run", "small", "--out", "out").returncode == 0
    before = (tmp_path / "out/results.jsonl").read_bytes()
    done = without_gpu(tmp_path, "run", "small", "--out", "out", sizes=[100, 200, 300])
    assert done.returncode == 2
    assert "out holds a run with a different recipe.toml; choose another folder with OUT=" in done.stderr
    assert (tmp_path / "out/results.jsonl").read_bytes() == before


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)], ids=lambda a: " ".join(a) or "smbench")
def test_help_lists_what_there_is(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = smbench(tmp_path, *arguments, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout
    if not arguments:
        assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [(*SMBENCH, "--help"), (sys.executable, "-c", "import smbench")], ids=["--help", "import"]
)
def test_it_answers_at_once(tmp_path: Path, command: Sequence[str]) -> None:
    """Under 0.3 s of wall clock, process start included; the best of several, since the machine has other work."""
    best = float("inf")
    for _ in range(10):
        began = time.monotonic()
        assert call(command, tmp_path).returncode == 0
        best = min(best, time.monotonic() - began)
        if best < 0.3:
            break
    assert best < 0.3
