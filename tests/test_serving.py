"""Cells of engines: each in its own process, each with the status that its end deserves, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from serving_requests import (
    MEASURES,
    SAMPLES,
    SEED,
    VOCABULARY,
    WARMUP,
    Answer,
    command,
    job,
    request,
    through_the_host,
)
from smbench import machine
from smbench.worker.engines.fake import KERNEL, LAYERS, token
from smbench.worker.prompts import prompt
from smbench.workerprocess import WORKER, Refused, WorkerStopped

SCRIPTS = (
    "raise",
    "oom",
    "oom-at-start",
    "crash",
    "exit",
    "unsupported",
    "server",
    "garbage",
    "short",
    "truncated",
    "cached",
    "no-clock",
    "wrong-kernel",
)
HONEST = job(step_ms=2)
LAST = job(step_ms=2, at=1)
JOBS = {script: job(script=script) for script in SCRIPTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    """One worker, as the host starts it, over an honest cell, a cell of every script, and an honest one."""
    folder = tmp_path_factory.mktemp("run")
    return through_the_host([HONEST, *JOBS.values(), LAST], folder, worker=WORKER), folder


def died(answer: Answer, asked: Mapping[str, Any]) -> tuple[str, str]:
    (event,) = answer.of(asked, "died")
    return event["status"], event["reason"]


def test_an_honest_cell_is_stored_with_every_request(run: tuple[Answer, Path]) -> None:
    result = run[0].result(HONEST)
    assert (result.status, result.reason) == ("ok", None)
    assert result.selection is not None and result.selection.source == "library"
    serving = result.serving
    assert serving is not None
    assert (serving.engine, serving.version) == ("fake", "1.0")
    assert serving.kernels["linear"] == {KERNEL: LAYERS}
    assert len(serving.requests) == WARMUP + SAMPLES
    for index, answered in enumerate(serving.requests):
        asked = prompt(SEED, VOCABULARY, 24, index)
        generated = " ".join(str(token(asked, i)) for i in range(5))
        assert answered.output_sha256 == hashlib.sha256(generated.encode()).hexdigest()
        assert (answered.prompt_tokens, answered.completion_tokens, answered.finish_reason) == (24, 5, "length")
        assert answered.cached_tokens == 0
        # five tokens of two milliseconds
        assert answered.e2e_s >= 0.010


def test_measures_are_those_of_the_requests(run: tuple[Answer, Path]) -> None:
    result = run[0].result(HONEST)
    assert result.serving is not None
    answers = result.serving.requests
    rows = {row.name: row for row in result.measurements}
    assert tuple(rows) == MEASURES
    e2e = [answer.e2e_s for answer in answers]
    ttft = [answer.ttft_s or 0.0 for answer in answers]
    wanted = {"e2e_latency": e2e, "ttft": ttft, "tpot": [(a - b) / 4 for a, b in zip(e2e, ttft, strict=True)]}
    for name, values in wanted.items():
        row = rows[name]
        assert (row.method, row.l2, row.calls_per_sample) == ("wall", "none", 1)
        assert list(row.warmup_s) == values[:WARMUP]
        assert list(row.samples_s) == values[WARMUP:]
        assert row.busy_s == pytest.approx(sum(values[WARMUP:]))
    assert [row.work.bytes for row in result.measurements if row.work] == [1000, 1001, 1002]
    assert result.phases_s.keys() == {"inputs", "start", "generate", "total"}


def test_the_host_hears_of_every_request(run: tuple[Answer, Path]) -> None:
    assert len(run[0].of(HONEST, "request")) == WARMUP + SAMPLES


def test_every_cell_is_a_process_of_its_own(run: tuple[Answer, Path]) -> None:
    for cell in (HONEST, LAST):
        serving = run[0].result(cell).serving
        assert serving is not None
        assert serving.settings["engines_in_process"] == 1


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("raise", "crashed", r"RuntimeError: the fake engine is broken"),
        ("oom", "oom", r"RuntimeError: CUDA out of memory\. Tried to allocate 2\.00 TiB\."),
        ("oom-at-start", "oom", r"RuntimeError: CUDA out of memory\. Tried to allocate 2\.00 TiB\."),
        ("unsupported", "unsupported", r"the fake engine does not offer this"),
    ],
)
def test_what_an_engine_raises_is_its_cells_status(
    run: tuple[Answer, Path], script: str, status: str, reason: str
) -> None:
    result = run[0].result(JOBS[script])
    assert result.status == status
    assert re.fullmatch(reason, result.reason or "")
    assert result.measurements == ()


def test_a_process_that_dies_leaves_its_last_words(run: tuple[Answer, Path]) -> None:
    status, reason = died(run[0], JOBS["crash"])
    assert status == "crashed"
    assert "killed by SIGSEGV" in reason
    assert reason.endswith("the fake engine's last words")


def test_an_engine_that_exits_for_want_of_memory_is_out_of_memory(run: tuple[Answer, Path]) -> None:
    status, reason = died(run[0], JOBS["exit"])
    assert status == "oom"
    assert "exit code 1" in reason


def test_a_server_does_not_outlive_its_cell(run: tuple[Answer, Path]) -> None:
    answer, folder = run
    assert answer.result(JOBS["server"]).status == "ok"
    log = (folder / "logs" / f"{JOBS['server']['cell_id']}.log").read_text(encoding="utf-8")
    (pid,) = re.findall(r"server (\d+)", log)
    assert machine.parent_process(int(pid)) is None
    assert "ended 1 processes that the cell left behind" in (folder / "logs" / "worker-001.log").read_text()


def test_what_an_engine_prints_is_kept_and_no_event(run: tuple[Answer, Path]) -> None:
    answer, folder = run
    assert answer.result(JOBS["garbage"]).status == "ok"
    assert "words on standard output" in (folder / "logs" / f"{JOBS['garbage']['cell_id']}.log").read_text()
    assert {event["event"] for event in answer.events} == {"ready", "start", "request", "result", "died"}


def test_what_an_engine_says_is_not_mended(run: tuple[Answer, Path]) -> None:
    def first(script: str) -> Any:
        serving = run[0].result(JOBS[script]).serving
        assert serving is not None
        return serving.requests[0]

    assert (first("short").completion_tokens, first("short").finish_reason) == (4, "stop")
    assert first("truncated").prompt_tokens == 12
    assert first("cached").cached_tokens == 23
    wrong = run[0].result(JOBS["wrong-kernel"])
    assert wrong.status == "ok" and wrong.serving is not None
    assert wrong.serving.kernels["linear"] == {"OtherLinearKernel": LAYERS}


def test_an_engine_without_a_clock_has_no_first_token_times(run: tuple[Answer, Path]) -> None:
    result = run[0].result(JOBS["no-clock"])
    assert [row.name for row in result.measurements] == ["e2e_latency"]


def test_cells_that_fail_do_not_disturb_the_next(run: tuple[Answer, Path]) -> None:
    assert run[0].result(LAST).status == "ok"


def test_nothing_but_logs_is_left(run: tuple[Answer, Path]) -> None:
    cells = {f"{cell['cell_id']}.log" for cell in (HONEST, *JOBS.values(), LAST)}
    assert {path.name for path in (run[1] / "logs").iterdir()} == cells | {"worker-001.log"}


@pytest.mark.parametrize("script", ["hang", "hang-at-start"])
def test_a_hanging_cell_is_stopped_by_the_host_and_the_rest_goes_on(tmp_path: Path, script: str) -> None:
    hanging = job(script=script)
    with pytest.raises(WorkerStopped, match="no result within the limit of 1 s"):
        through_the_host([hanging, LAST], tmp_path, limit_s=1)
    assert through_the_host([LAST], tmp_path).result(LAST).status == "ok"


def test_a_request_that_goes_on_keeps_the_host_waiting(tmp_path: Path) -> None:
    # five requests of 0.6 s each, under a limit of 2.5 s
    slow = job(step_ms=120)
    assert through_the_host([slow], tmp_path, limit_s=2.5).result(slow).status == "ok"


def test_a_cell_dies_with_its_worker(tmp_path: Path) -> None:
    hanging = job(script="hang")
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request([hanging], tmp_path)), encoding="utf-8")
    worker = subprocess.Popen([*command(), str(file)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    while '"start"' not in worker.stdout.readline():
        pass
    cell = wait_for_child(worker.pid)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    deadline = time.monotonic() + 10
    while machine.parent_process(cell) is not None:
        assert time.monotonic() < deadline, "the cell outlives its worker"
        time.sleep(0.05)


def wait_for_child(pid: int) -> int:
    from smbench.worker.processes import descendants

    deadline = time.monotonic() + 10
    while not (found := descendants(pid)):
        assert time.monotonic() < deadline, "the worker starts no cell"
        time.sleep(0.02)
    return found[0]


def test_where_forks_see_no_gpu_every_cell_is_a_new_program(tmp_path: Path) -> None:
    worker = command("serving._environment = lambda device, logs: ({'python': {}}, False)")
    crash = job(script="crash")
    answer = through_the_host([crash, LAST], tmp_path, worker=worker)
    said = [event["event"] for event in answer.events if event["event"] != "request"]
    assert said == ["ready", "start", "died", "start", "result"]
    result = answer.result(LAST)
    assert result.status == "ok"
    # each program imports the engine again, and says so
    assert "import" in result.phases_s
    assert "the fake engine's last words" in died(answer, crash)[1]
    assert not list((tmp_path / "logs").glob("*.request.json"))


def test_an_engine_that_cannot_be_imported_costs_its_own_cells_only(tmp_path: Path) -> None:
    program = """
from smbench.worker.engines import fake
def preload():
    raise OSError("libcudart.so.99: cannot open shared object file")
fake.preload = preload
"""
    answer = through_the_host([HONEST, LAST], tmp_path, worker=command(program))
    for cell in (HONEST, LAST):
        status, reason = died(answer, cell)
        assert status == "crashed"
        assert reason == "the engine cannot be imported: OSError: libcudart.so.99: cannot open shared object file"


def test_an_engine_that_does_not_shut_down_is_killed_after_its_result(tmp_path: Path) -> None:
    worker = command("from smbench.worker import cellprocess\ncellprocess.GRACE_S = 0.3")
    stuck = job(script="hang-at-close")
    answer = through_the_host([stuck, LAST], tmp_path, worker=worker)
    assert answer.result(stuck).status == "ok"
    assert answer.result(LAST).status == "ok"


def test_a_cell_that_is_only_verified_has_no_time(tmp_path: Path) -> None:
    untimed = {**HONEST, "untimed_reason": "this profile checks it only"}
    result = through_the_host([untimed], tmp_path).result(untimed)
    assert (result.status, result.reason, result.measurements) == ("verified", "this profile checks it only", ())


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([job(engine="fale")], "unknown engine 'fale'; known: fake, lmdeploy, sglang, transformers, trtllm, vllm"),
        (
            [job(pace=3)],
            "providers.fake-3.settings.pace: unknown setting of engine 'fake'; "
            "known: script, at, step_ms, prefix_caching",
        ),
        ([HONEST, job(engine="transformers")], "one worker serves one engine, and the request has fake, transformers"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_runs(
    tmp_path: Path, jobs: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(Refused) as refusal:
        through_the_host(jobs, tmp_path)
    assert words in refusal.value.errors


def test_prompts_depend_on_seed_vocabulary_length_and_index_alone() -> None:
    # written down: other tokens would be another workload, without anything that says so
    assert prompt(0, 152064, 4, 0) == PINNED
    assert prompt(0, 152064, 4, 0) == prompt(0, 152064, 4, 0)
    others = [prompt(1, 152064, 4, 0), prompt(0, 152063, 4, 0), prompt(0, 152064, 5, 0)[:4], prompt(0, 152064, 4, 1)]
    assert len({tuple(tokens) for tokens in [PINNED, *others]}) == 5
    long = prompt(3, 100, 8000, 2)
    assert len(long) == 8000 and set(long) == set(range(100))


PINNED = [72384, 40352, 102347, 105266]
