"""A run: every cell gets its status whatever its worker does, and stopping anywhere loses nothing."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import fake_worker
from fake_worker import NEVER_READY, REFUSED, samples_of
from small_runs import FAKE_WORKER, cpu_plan, recipe_text
from smbench import runfolder, runner
from smbench.errors import CorruptError, UsageError
from smbench.plan import INTERPRETED, Plan
from smbench.result import Result, Session
from smbench.runfolder import Run

WORKER = (sys.executable, str(FAKE_WORKER))


def measure(plan: Plan, folder: Path, command: Sequence[str] = WORKER) -> Run:
    """Run a plan and read what it left."""
    runner.run(plan, folder, lambda result: None, lambda warning: None, command)
    return runfolder.load(folder)


def by_size(run: Run) -> dict[int, Result]:
    return {int(result.cell.axes["hidden_size"]): result for result in run.results.values()}


def outcome(tmp_path: Path, size: int, time_limit_s: float = 60.0) -> tuple[str, str]:
    """Status and reason of a misbehaving cell between two honest ones, which must not suffer."""
    run = measure(cpu_plan([100, size, 200], time_limit_s=time_limit_s), tmp_path / "run")
    found = by_size(run)
    assert [found[honest].status for honest in (100, 200)] == ["ok", "ok"]
    assert found[size].measurements == ()
    assert [session.ended for session in run.sessions] == ["finished"]
    return found[size].status, found[size].reason or ""


def test_an_honest_cell_is_stored_to_the_last_digit(tmp_path: Path) -> None:
    run = measure(cpu_plan([100]), tmp_path / "run")
    (result,) = run.results.values()
    assert (result.status, result.reason, result.environment_id) == ("ok", None, fake_worker.ENVIRONMENT_ID)
    assert result.started_at == fake_worker.STARTED_AT
    (measurement,) = result.measurements
    assert (measurement.name, measurement.method, measurement.l2) == ("wall", "wall", "none")
    assert list(measurement.samples_s) == samples_of(100)
    assert list(measurement.warmup_s) == samples_of(100)[:1]
    assert [entry.environment for entry in run.environments] == [fake_worker.ENVIRONMENT]
    (session,) = run.sessions
    assert (session.workers, session.results, session.ended) == (1, 1, "finished")
    assert session.timer_checks == (fake_worker.TIMER_CHECK,)
    assert 0 < session.worker_start_s < session.wall_s


def test_compiling_ahead_is_told_and_part_of_the_sessions_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_COMPILES", "6")
    notes: list[str] = []
    runner.run(cpu_plan([100]), tmp_path / "run", lambda result: None, notes.append, WORKER)
    (session,) = runfolder.load(tmp_path / "run").sessions
    assert session.compile_s == 1.5
    assert notes == ["compiling 6 kernels on all cores, before they are timed"]


@pytest.mark.parametrize(
    ("size", "status", "reason"),
    [
        (2, "verified", "only checked"),
        (3, "crashed", r"the worker died \(killed by SIGSEGV\)"),
        (5, "crashed", r"the worker died \(exit code 9\)"),
        (6, "crashed", r"the worker's result breaks its format: measurements.0.samples_s.2: .*finite.*"),
        (7, "crashed", r"the worker's result breaks its format: : .*without a passed correctness check"),
        (8, "crashed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        (9, "crashed", r"the worker died \(exit code 7\): … .* line 99999 .*the very last words"),
        (10, "incorrect", "first inputs: relative error 1 exceeds 0.01"),
        (11, "oom", "CUDA out of memory. Tried to allocate 2.00 TiB"),
        (12, "unsupported", "needs a hidden size above 12"),
        (13, "crashed", "the worker wrote a line that is no event: b'Loading checkpoint shards: 100%.*"),
        (14, "crashed", r"the worker wrote a line that is no event: b'\\xff\\xfe no text.*"),
        (15, "crashed", "the worker wrote a line that is no event: .*"),
        (16, "crashed", "the worker's result breaks its format: started_at: Field required"),
    ],
)
def test_what_a_worker_does_becomes_the_status_of_that_cell_alone(
    tmp_path: Path, size: int, status: str, reason: str
) -> None:
    found = outcome(tmp_path, size)
    assert found[0] == status
    assert re.fullmatch(reason, found[1])


def test_a_cell_that_hangs_is_stopped_at_its_limit_with_all_its_children(tmp_path: Path) -> None:
    began = time.monotonic()
    assert outcome(tmp_path, 17, time_limit_s=1.0) == ("timeout", "no result within the limit of 1 s")
    assert time.monotonic() - began < 10
    (log,) = (tmp_path / "run/logs").glob("*.log")
    assert_gone(int(log.read_text(encoding="utf-8").split()[1]))


def test_reasons_of_crashes_are_short_and_the_whole_log_is_kept(tmp_path: Path) -> None:
    _, reason = outcome(tmp_path, 9)
    assert len(reason) < 400
    logs = list((tmp_path / "run/logs").iterdir())
    assert [log.name for log in logs] == ["worker-001.log"]
    assert logs[0].read_text(encoding="utf-8").count("\n") == 100_001


def test_cells_that_cannot_run_here_are_recorded_without_a_worker(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no worker should have been started')")
    run = measure(cpu_plan(providers=["absent", "cuda-only"]), tmp_path / "run", command)
    assert {(result.cell.provider, result.status, result.reason) for result in run.results.values()} == {
        ("absent", "unsupported", "the Python package 'no_such_package_anywhere' is not installed here"),
        ("cuda-only", "unsupported", "needs a device of kind cuda, this profile runs on cpu"),
    }
    assert run.sessions[0].workers == 0


def test_interpreted_cells_get_a_worker_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setenv("FAKE_WORKER_JOURNAL", str(journal))
    # what is left in the user's shell decides nothing
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = measure(cpu_plan(providers=["torch", "ours"]), tmp_path / "run")
    assert {(r.cell.provider, r.status, r.reason) for r in run.results.values()} == {
        ("torch", "ok", None),
        ("ours", "verified", INTERPRETED),
    }
    workers = re.findall("interpreted=(.)", journal.read_text(encoding="utf-8"))
    assert sorted(workers) == ["0", "1"]
    assert run.sessions[0].workers == 2


def test_a_worker_that_never_starts_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(runner.WorkerCannotStart) as caught:
        measure(cpu_plan([NEVER_READY, 100]), tmp_path / "run")
    assert str(caught.value) == (
        "the worker stopped 2 times before its first result; its last words: the worker died (exit code 1): "
        "… the driver on your system is too old"
    )
    run = runfolder.load(tmp_path / "run")
    assert run.results == {}
    assert len(list((tmp_path / "run/logs").glob("*.log"))) == 2


def test_a_run_that_fails_half_way_keeps_what_it_has_and_says_so(tmp_path: Path) -> None:
    # the worker that comes after the crash never starts, since its first cell forbids it
    with pytest.raises(runner.WorkerCannotStart):
        measure(cpu_plan([3, NEVER_READY]), tmp_path / "run")
    run = runfolder.load(tmp_path / "run")
    assert {size: result.status for size, result in by_size(run).items()} == {3: "crashed"}
    assert [session.ended for session in run.sessions] == ["failed"]


def test_a_request_that_the_worker_refuses_is_a_usage_error_with_all_reasons(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        measure(cpu_plan([100, REFUSED]), tmp_path / "run")
    assert str(caught.value) == "recipe 'small': axis 'rank' is missing; axis 'rnak' is unknown"
    assert runfolder.load(tmp_path / "run").results == {}


def test_the_real_worker_refuses_another_protocol(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"protocol": 99, "device": "cpu", "measures": [], "jobs": []}), encoding="utf-8")
    command = [sys.executable, "-m", "smbench.worker", str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    event = json.loads(done.stdout)
    assert (done.returncode, event["event"]) == (2, "refused")
    assert event["errors"] == ["request has protocol 99, this worker 1"]


def test_a_second_run_measures_nothing_and_changes_nothing(tmp_path: Path) -> None:
    plan = cpu_plan([100, 3, 200])
    measure(plan, tmp_path / "run")
    before = (tmp_path / "run/results.jsonl").read_bytes()
    run = measure(plan, tmp_path / "run", (sys.executable, "-c", "raise SystemExit(1)"))
    assert (tmp_path / "run/results.jsonl").read_bytes() == before
    assert len(run.results) == 3


def test_a_run_goes_on_with_what_is_missing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cpu_plan([100, 200, 300])
    measure(plan, tmp_path / "run")
    path = tmp_path / "run/results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lost = lines.pop(2)
    path.write_bytes(b"".join(lines))
    journal = tmp_path / "journal"
    monkeypatch.setenv("FAKE_WORKER_JOURNAL", str(journal))
    run = measure(plan, tmp_path / "run")
    assert len(run.results) == 3
    begun = re.findall("cell (.+)", journal.read_text(encoding="utf-8"))
    assert begun == [json.loads(lost)["cell_id"]]
    # the same machine and software is not stored again
    assert len(run.environments) == 1


def test_results_are_told_as_they_come_and_a_torn_line_is_a_warning(tmp_path: Path) -> None:
    plan = cpu_plan([100, 200])
    folder = tmp_path / "run"
    runfolder.create(folder, plan.recipe_text, "small", "cpu", [entry.cell for entry in plan.entries])
    (folder / "results.jsonl").write_bytes(b'{"record"')
    told: list[int] = []
    warnings: list[str] = []

    def on_result(result: Result) -> None:
        # on the disk before it is told
        assert result.cell_id in runfolder.load(folder).results
        told.append(int(result.cell.axes["hidden_size"]))

    runner.run(plan, folder, on_result, warnings.append, WORKER)
    assert told == [100, 200]
    assert warnings == ["results.jsonl: the last line was torn (9 bytes); it was set aside as results.torn-0.txt"]


def test_a_run_folder_of_a_newer_format_is_not_touched(tmp_path: Path) -> None:
    plan = cpu_plan([100])
    measure(plan, tmp_path / "run")
    path = tmp_path / "run/run.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": 2}), encoding="utf-8")
    before = (tmp_path / "run/results.jsonl").read_bytes()
    with pytest.raises(CorruptError, match="format 2 is newer than this smbench reads"):
        measure(plan, tmp_path / "run")
    assert (tmp_path / "run/results.jsonl").read_bytes() == before


SIZES = (100, 200, 300, 400, 500, 600, 700, 800)


class Host:
    """The `smbench run` command in a process of its own, over slow honest cells."""

    def __init__(self, tmp_path: Path, sizes: Sequence[int] = SIZES, delay_s: float = 0.03) -> None:
        self.folder = tmp_path / "the run"
        self.journal = tmp_path / "journal"
        recipes = tmp_path / "recipes"
        recipes.mkdir()
        (recipes / "small.toml").write_bytes(recipe_text(sizes))
        script = Path(__file__).with_name("fake_host.py")
        self.command = [sys.executable, str(script), str(recipes), "run", "small", "--out", str(self.folder)]
        self.environment = {
            **os.environ,
            "FAKE_WORKER_DELAY_S": str(delay_s),
            "FAKE_WORKER_JOURNAL": str(self.journal),
        }

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> Run:
        """The same command again, to its end."""
        with self.start() as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert f"{len(SIZES)} ok" in out
        return runfolder.load(self.folder)

    def results(self) -> list[str]:
        """The cell of every whole result line on the disk."""
        path = self.folder / "results.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [record["cell_id"] for record in map(json.loads, lines) if record["record"] == "result"]

    def wait_for_results(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.results()) < count:
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.01)

    def workers(self) -> list[int]:
        text = self.journal.read_text(encoding="utf-8") if self.journal.exists() else ""
        return [int(pid) for pid in re.findall(r"worker (\d+)", text)]


def assert_gone(pid: int) -> None:
    """A process has ended; one that nobody has waited for counts."""
    deadline = time.monotonic() + 10
    stat = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            state = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return
        # on its way out it can read as nothing
        if not state or state[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_the_same_command_finishes_with_every_cell_once(tmp_path: Path, seed: int) -> None:
    host = Host(tmp_path)
    moments = random.Random(seed)
    seen: list[str] = []
    kills = 0
    while kills < 3 and len(seen) < len(SIZES):
        with host.start() as process:
            # sometimes before the first result, sometimes right behind one
            if kills:
                host.wait_for_results(len(seen) + 1)
            time.sleep(moments.uniform(0.0, 0.5 if kills == 0 else 0.08))
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        for pid in host.workers():
            assert_gone(pid)
        # what was on the disk stays there, in order
        found = host.results()
        assert found[: len(seen)] == seen
        seen = found
    journal = host.journal.read_text(encoding="utf-8") if host.journal.exists() else ""
    run = host.finish()
    found = host.results()
    assert found[: len(seen)] == seen
    assert sorted(found) == sorted(cell.cell_id for cell in run.cells)
    assert all(result.status == "ok" for result in run.results.values())
    # nothing that was stored has been begun again
    begun = re.findall("cell (.+)", host.journal.read_text(encoding="utf-8")[len(journal) :])
    assert not set(begun) & set(seen)
    # a killed session leaves no record of itself, and one that found nothing to do makes none
    assert {session.ended for session in run.sessions} <= {"finished"}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["ctrl-c", "sigterm"])
def test_a_stop_leaves_a_whole_folder_and_says_how_to_go_on(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    host = Host(tmp_path, delay_s=0.1)
    with host.start() as process:
        host.wait_for_results(2)
        process.send_signal(sent)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1] == (
        "stopped; every finished cell is kept; the same command goes on: "
        f"smbench run small --profile cpu --out '{host.folder}'"
    )
    for pid in host.workers():
        assert_gone(pid)
    run = runfolder.load(host.folder)
    # the one that was being written when the signal came may have been taken back
    assert 1 <= len(run.results) < len(SIZES)
    assert run.warnings == []
    assert [(session.ended, session.results) for session in run.sessions] == [("interrupted", len(run.results))]
    run = host.finish()
    assert [session.ended for session in run.sessions] == ["interrupted", "finished"]
    assert sum(session.results for session in run.sessions) == len(SIZES) == len(host.results())


def test_a_second_command_in_the_same_folder_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    host = Host(tmp_path)
    with runfolder.locked(host.folder), host.start() as second:
        out, err = second.communicate(timeout=30)
    assert (second.returncode, out) == (2, "")
    assert err == f"error: another run is using {host.folder}; wait for it, or choose another folder with OUT=\n"
    assert host.workers() == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_full_disk_ends_with_a_clear_error_and_the_next_run_goes_on(tmp_path: Path) -> None:
    host = Host(tmp_path, delay_s=0.0)
    with host.start(FAKE_HOST_FILE_BYTES="4000") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: File too large: ")
    assert "every result so far is intact; free space, then the same command goes on: smbench run" in err
    assert "Traceback" not in err
    kept = host.results()
    assert 0 < len(kept) < len(SIZES)
    assert (host.folder / "results.jsonl").read_bytes().endswith(b"\n")
    run = host.finish()
    assert host.results()[: len(kept)] == kept
    assert len(run.results) == len(host.results()) == len(SIZES)
    assert all(isinstance(session, Session) for session in run.sessions)
