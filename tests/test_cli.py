"""The command as a user and a program meet it: its answers, its errors, its exit codes, and that it answers at once.

Exit codes 130 (Ctrl-C) and 0 (SIGTERM), and what a stopped run says, are in test_runner.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fake_host
from fake_worker import NEVER_READY, REFUSED
from small_runs import REPOSITORY, recipe_text
from smbench import cli, recipe

SMBENCH = (sys.executable, "-m", "smbench")
COMMANDS = ("list", "plan", "run", "tune", "report", "doctor")


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


def call(command: Sequence[str], folder: Path, **environment: str) -> Answer:
    """A command in a process of its own."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def smbench(folder: Path, *arguments: str) -> Answer:
    """The real command."""
    return call([*SMBENCH, *arguments], folder)


class Host:
    """The command within this process, on a machine without a GPU, over a fake worker, in an empty folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.recipes = folder / "recipes"
        self.recipes.mkdir()
        self.hold()
        self._patch = patch
        self._capture = capture
        patch.chdir(folder)
        for module, name, value in fake_host.replacements(self.recipes):
            patch.setattr(module, name, value)
        # the test process keeps its own
        patch.setattr(signal, "signal", lambda *_: None)

    def hold(self, *sizes: int) -> None:
        """Let `small` be a recipe over these hidden sizes."""
        (self.recipes / "small.toml").write_bytes(recipe_text(sizes or (100, 200)))

    def __call__(self, *arguments: str) -> Answer:
        self._patch.setattr(sys, "argv", ["smbench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Answer(ended.value.code, written.out, written.err)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, monkeypatch, capsys)


def document(done: Answer) -> Any:
    """The one JSON document on standard output of a command that went well."""
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_list_names_every_recipe_with_its_sizes(tmp_path: Path) -> None:
    done = smbench(tmp_path, "list", "--json")
    found = {row["name"]: row for row in document(done)}
    assert done.err == ""
    assert sorted(found) == recipe.names(REPOSITORY / "recipes")
    assert found["lora"]["document"] == "000"
    assert found["lora"]["cells"].keys() == {"full", "quick", "peers", "cpu"}
    text = smbench(tmp_path, "list").out
    assert all(name in text and row["title"] in text for name, row in found.items())


def test_plan_tells_every_cell_its_stack_the_minutes_and_what_is_impossible_and_why(tmp_path: Path) -> None:
    done = smbench(tmp_path, "plan", "lora", "--profile", "cpu", "--json")
    plan = document(done)
    assert done.err == ""
    assert (plan["recipe"], plan["profile"]) == ("lora", "cpu")
    assert plan["estimate_s"] > 0
    assert len({cell["cell_id"] for cell in plan["cells"]}) == len(plan["cells"]) > 0
    stacks = {cell["provider"]: cell["stack"] for cell in plan["cells"]}
    assert (stacks["torch"], stacks["smbench"], stacks["vllm"]) == ("kernels", "kernels", "vllm")
    reasons = {cell["unsupported"] for cell in plan["cells"] if cell["provider"] == "vllm"}
    assert reasons == {"needs a device of kind cuda, this profile runs on cpu"}
    assert not any(cell["unsupported"] or cell["untimed"] for cell in plan["cells"] if cell["provider"] == "torch")


def test_plan_reads_well_in_a_pipe(host: Host) -> None:
    host.hold(100, 200, 300)
    done = host("plan", "small")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "recipe small, profile cpu: 3 cells"
    assert lines[2].split() == ["bgmv_shrink", "torch", "kernels", "3", "timed"]
    assert lines[-1] == "estimate: 0.0 minutes (basis: made up)"
    every = host("plan", "small", "--cells").out
    assert all(f"hidden_size={size}" in every for size in (100, 200, 300))


def test_doctor_gives_every_check_a_verdict_and_every_trouble_a_fix(tmp_path: Path) -> None:
    done = smbench(tmp_path, "doctor", "--json")
    checks = json.loads(done.out)
    assert {"gpu", "disk", "memory"} <= {check["name"] for check in checks}
    assert {check["verdict"] for check in checks} <= {"ok", "warn", "fail", "unknown"}
    assert all(check["fix"] for check in checks if check["verdict"] in ("warn", "fail"))
    assert done.code == int(any(check["verdict"] == "fail" for check in checks))
    assert done.err == ""


def test_a_run_ends_with_a_report_and_the_same_command_adds_nothing(tmp_path: Path) -> None:
    recipes = REPOSITORY / "recipes"
    command = [sys.executable, fake_host.__file__, str(recipes), "run", "lora", "--out", "out", "--json"]
    first = document(call(command, tmp_path, FAKE_HOST_REPORT="1"))
    bundle = tmp_path / first.pop("bundle")
    assert bundle.parent == tmp_path / "out"
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
    second = call(command, tmp_path)
    assert document(second) == {**first, "bundle": None}
    assert "210 cells, 210 of them already measured" in second.err
    again = smbench(tmp_path, "report", "out", "--json")
    assert (document(again), again.err) == (first, "")
    assert (tmp_path / "out/results.jsonl").read_bytes() == results
    assert (tmp_path / "out/report.md").read_bytes() == report
    verified = document(smbench(tmp_path, "verify", str(bundle), "--json"))
    assert verified["verified"] and verified["statuses"] == {"unsupported": 126, "ok": 42, "verified": 42}
    assert smbench(tmp_path, "pack", "out", "-o", "again.tar.gz").code == 0
    assert (tmp_path / "again.tar.gz").read_bytes() == bundle.read_bytes()


def test_without_out_the_folder_is_named_after_recipe_and_device(host: Host) -> None:
    done = host("run", "small")
    assert done.code == 0
    assert done.out.splitlines() == ["2 ok", "report: runs/small-cpu/report.md"]
    assert (host.folder / "runs/small-cpu/results.jsonl").exists()


def test_a_run_in_a_pipe_tells_its_progress_in_plain_lines(host: Host) -> None:
    host.hold(100, 200, 12)
    assert host("run", "small").err.splitlines() == [
        "3 cells; about 3 s to go",
        "3 of 3 cells (2 ok, 1 unsupported)",
    ]


@pytest.mark.parametrize("size", [3, 10, 11], ids=["crashed", "incorrect", "oom"])
def test_measured_and_failed_is_exit_code_1_with_everything_else_in_place(host: Host, size: int) -> None:
    host.hold(100, size, 200)
    done = host("run", "small", "--json")
    assert done.code == 1
    assert json.loads(done.out)["counts"]["ok"] == 2


def refused(done: Answer, code: int) -> str:
    """The one message of a command that did nothing."""
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    return done.err.removeprefix("error: ").rstrip("\n")


def test_what_cannot_be_done_is_exit_code_2_and_says_what_can(host: Host) -> None:
    for arguments, told in {
        ("plan", "smal"): "unknown recipe 'smal'; known: small; did you mean 'small'?",
        ("run", "smal"): "unknown recipe 'smal'; known: small; did you mean 'small'?",
        ("run", "small", "--profile", "fast"): "recipe 'small' has no profile 'fast'; known: cpu, full",
        ("plan", "small", "--profile", "full"): "profile 'full' of recipe 'small' needs an NVIDIA GPU and none is "
        "visible; run PROFILE=cpu, or see `smbench doctor`",
        ("run", "small", "--provider", "x"): "unknown provider 'x' in profile 'cpu'; known: torch",
        ("tune", "small"): "tuning needs an NVIDIA GPU and none is visible; see `smbench doctor`",
    }.items():
        assert refused(host(*arguments), 2) == told
    # nothing was made on the way
    assert [path.name for path in host.folder.iterdir()] == ["recipes"]


def test_a_report_of_no_run_folder_is_exit_code_2(tmp_path: Path) -> None:
    assert refused(smbench(tmp_path, "report", "nowhere"), 2) == "nowhere is not a run folder: it has no run.json"


def test_a_recipe_with_a_fault_is_exit_code_2_with_file_key_and_known_keys(host: Host) -> None:
    (host.recipes / "bad.toml").write_bytes(recipe_text().replace(b"samples = 5", b"sampels = 5", 1))
    told = refused(host("run", "bad"), 2)
    assert "bad.toml: profile.cpu.measure[0].sampels: unknown key; known keys here: calls, l2, " in told
    assert told.endswith("did you mean 'samples'?")


def test_a_worker_that_refuses_is_exit_code_2_and_one_that_never_starts_is_1(host: Host) -> None:
    host.hold(REFUSED)
    done = host("run", "small", "--out", "a")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("error: recipe 'small': axis 'rank' is missing; axis 'rnak' is unknown\n")
    host.hold(NEVER_READY)
    done = host("run", "small", "--out", "b")
    assert (done.code, done.out) == (1, "")
    assert "its last words: the worker died (exit code 1): … the driver on your system is too old\n" in done.err
    assert "fix: see b/logs and `smbench doctor`; the same command goes on: smbench run small" in done.err


def test_an_unknown_option_is_exit_code_2(host: Host) -> None:
    done = host("run", "small", "--no-such-option")
    assert (done.code, done.out) == (2, "")
    assert "--no-such-option" in done.err


def test_damaged_or_newer_results_are_exit_code_3(host: Host) -> None:
    assert host("run", "small", "--out", "out").code == 0
    results = host.folder / "out/results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole.replace(b'"status":"ok"', b'"status":"okay"', 1))
    for command in (("report", "out"), ("run", "small", "--out", "out")):
        assert "results.jsonl: line 2: result.status: Input should be 'ok'" in refused(host(*command), 3)
    results.write_bytes(whole)
    run_file = host.folder / "out/run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_bytes()) | {"format": 2}), encoding="utf-8")
    for command in (("report", "out"), ("run", "small", "--out", "out")):
        told = refused(host(*command), 3)
        assert told == "out/run.json: format 2 is newer than this smbench reads (1); update smbench"
    assert results.read_bytes() == whole


def test_a_folder_of_another_run_is_exit_code_2_and_stays_as_it_is(host: Host) -> None:
    assert host("run", "small", "--out", "out").code == 0
    before = (host.folder / "out/results.jsonl").read_bytes()
    host.hold(100, 200, 300)
    done = host("run", "small", "--out", "out")
    assert done.code == 2
    assert "out holds a run with a different recipe.toml; choose another folder with OUT=" in done.err
    assert (host.folder / "out/results.jsonl").read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(host: Host, command: str) -> None:
    done = host(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"smbench {command} [OPTIONS]" in done.out


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = smbench(tmp_path, "--help")
    assert (done.code, done.err) == (0, "")
    assert all(command in done.out for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [(*SMBENCH, "--help"), (sys.executable, "-c", "import smbench")], ids=["--help", "import"]
)
def test_it_answers_at_once(tmp_path: Path, command: Sequence[str]) -> None:
    """Under 0.3 s, process start included: of processor time, which is the wall clock where nobody else is at work."""
    best_s = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert call(command, tmp_path).code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best_s = min(best_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best_s < 0.3
