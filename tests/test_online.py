"""Cells of servers under load: each ends as it deserves, leaves no process, and the next one works."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from serving_requests import Answer, command
from smbench.cell import Cell
from smbench.worker import loopback, server
from smbench.worker.engines import ServeCommand, fakeserver
from smbench.worker.prompts import prompt
from smbench.workerprocess import WorkerProcess

PROMPTS, INPUT, OUTPUT, SEED, VOCABULARY = 20, 12, 4, 5, 64
MEASURES = ("ttft", "tpot", "itl", "e2e_latency", "duration")


def job(prompts: int = PROMPTS, rate: str = "inf", concurrency: int = 4, **settings: Any) -> dict[str, Any]:
    """One cell of the fake engine's server; `settings` are its script's."""
    axes: dict[str, int | str] = {
        "model": "synthetic:tiny",
        "dtype": "float16",
        "dataset": "random",
        "num_prompts": prompts,
        "input_len": INPUT,
        "output_len": OUTPUT,
        "request_rate": rate,
        "max_concurrency": concurrency,
        "tensor_parallel": 1,
        "graphs": "eager",
    }
    provider = "-".join(["fake", *(str(value) for value in settings.values())])
    cell = Cell(kind="engine", subject="online", provider=provider, axes=axes, seed=SEED)
    return {
        "cell_id": cell.cell_id,
        "subject": cell.subject,
        "provider": provider,
        "axes": axes,
        "seed": SEED,
        "untimed_reason": None,
        "engine": {
            "engine": "fake",
            "device": "cpu",
            "settings": settings,
            "limits": {"max_model_len": 2048, "max_num_seqs": 4, "memory_fraction": 0.3, "kv_cache_bytes": 64 << 20},
            "model": {"name": "synthetic:tiny", "path": ".", "vocabulary": VOCABULARY},
            "requests": {"warmup": 1, "samples": 1},
            "measures": list(MEASURES),
            "expected_kernel": None,
            "work": {name: {"bytes": 1000, "flops": 2000} for name in MEASURES},
            "compare": False,
            "is_reference": False,
            "sharegpt": None,
        },
    }


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that runs the fake client whatever it is told to run."""
    script = tmp_path_factory.mktemp("client") / "python"
    program = Path(__file__).with_name("fake_load_client.py")
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


MARK = "SMBENCH_TEST_ONLINE"
"""Environment variable that everything which a test starts inherits."""


def serve(
    jobs: Sequence[Mapping[str, Any]], folder: Path, client: Path, limit_s: float = 30.0, program: str = ""
) -> Answer:
    """Everything that a worker says of a request; nothing that it started is left."""
    answer = Answer()
    with worker(jobs, folder, client, limit_s, program) as process:
        for event in process.events(limit_s):
            answer.events.append(event)
        assert started(folder) == [], "before the worker has ended"
    return answer


def worker(
    jobs: Sequence[Mapping[str, Any]], folder: Path, client: Path, limit_s: float, program: str = ""
) -> WorkerProcess:
    """A worker over a request, as the host starts it."""
    request = {
        "kind": "engine",
        "device": "cpu",
        "logs": str(folder / "logs"),
        "folder": str(folder),
        "time_limit_s": limit_s,
        "client_python": str(client),
        "measures": [],
        "jobs": list(jobs),
    }
    mark = f"import os; os.environ['{MARK}'] = {str(folder)!r}"
    return WorkerProcess(folder, request, interpreted=False, command=command(f"{mark}\n{program}"))


def started(folder: Path) -> list[str]:
    """Commands of the processes that a worker of this folder started, and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"{MARK}={folder}".encode() in environment.split(b"\0"):
            found.append(words)
    return found


HONEST = job()
WAITING = job(rate="200", concurrency=0)
NEXT = job(prompts=PROMPTS + 1)
LAST = job(prompts=PROMPTS + 2)
FAULTS: Mapping[str, dict[str, Any]] = {
    "crash": job(script="crash", at=12),
    "exit": job(script="exit", at=12),
    "errors": job(script="errors", at=3),
    "short": job(script="short", at=7),
    "truncated": job(script="truncated"),
    "cached": job(script="cached"),
    "oom-at-start": job(script="oom-at-start"),
    "server": job(script="server"),
}
SILENT: Mapping[str, dict[str, Any]] = {
    "never-ready": job(script="never-ready"),
    "hang": job(script="hang", at=12),
    "stubborn": job(script="stubborn"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, client: Path) -> tuple[Answer, Path]:
    """One worker over honest cells and a cell of every fault, with the user's shell full of what must not leak."""
    folder = tmp_path_factory.mktemp("run")
    crash, *others = FAULTS.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("OPENAI_API_KEY", "secret")
        return serve([HONEST, WAITING, crash, NEXT, *others, LAST], folder, client), folder


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory, client: Path) -> tuple[Answer, Path]:
    """One worker over servers that do not answer, or do not end, with little patience, and an honest one."""
    folder = tmp_path_factory.mktemp("silent")
    program = "from smbench.worker import server; server.GRACE_S = 0.5"
    return serve([*SILENT.values(), HONEST], folder, client, 2.5, program), folder


def ended(answer: Answer, asked: Mapping[str, Any]) -> tuple[str, str]:
    result = answer.result(asked)
    return result.status, result.reason or ""


def test_an_honest_cell_is_stored_with_what_the_client_saw(run: tuple[Answer, Path]) -> None:
    result = run[0].result(HONEST)
    assert (result.status, result.reason) == ("ok", None)
    assert result.serving is not None and result.serving.load is not None
    load = result.serving.load
    assert (load.completed, load.failed, load.errors) == (PROMPTS, 0, {})
    assert (load.prompt_tokens, load.completion_tokens) == (PROMPTS * INPUT, PROMPTS * OUTPUT)
    assert [len(load.ttft_s), len(load.tpot_s), len(load.e2e_s)] == [PROMPTS] * 3
    assert len(load.itl_s) == PROMPTS * (OUTPUT - 1)
    assert (load.client, load.request_rate, load.max_concurrency) == ("vllm bench serve 0.0-fake", None, 4)
    assert [row.name for row in result.measurements] == list(MEASURES)
    samples = {row.name: row.samples_s for row in result.measurements}
    assert (samples["ttft"], samples["itl"], samples["duration"]) == (load.ttft_s, load.itl_s, (load.duration_s,))
    for e2e, ttft, tpot in zip(load.e2e_s, load.ttft_s, load.tpot_s, strict=True):
        assert e2e == pytest.approx(ttft + (OUTPUT - 1) * tpot, abs=1e-7)
    waiting = run[0].result(WAITING)
    assert waiting.serving is not None and waiting.serving.load is not None
    assert (waiting.serving.load.request_rate, waiting.serving.load.max_concurrency) == (200.0, None)


def test_the_prompts_are_those_of_the_seed(run: tuple[Answer, Path]) -> None:
    serving = run[0].result(HONEST).serving
    assert serving is not None and serving.prompts is not None
    drawn = [" ".join(map(str, prompt(SEED, VOCABULARY, INPUT, i))) for i in range(PROMPTS)]
    assert serving.prompts.sha256 == hashlib.sha256("\n".join(drawn).encode()).hexdigest()
    assert serving.settings["prompts_sent_as"] == "token ids"


def test_the_clients_own_file_is_kept_without_texts_and_places(run: tuple[Answer, Path]) -> None:
    answer, folder = run
    for asked in (HONEST, FAULTS["errors"], FAULTS["crash"]):
        serving = answer.result(asked).serving
        assert serving is not None and serving.load is not None
        data = (folder / serving.load.native).read_bytes()
        assert serving.load.native == f"native/{asked['cell_id']}.json"
        assert hashlib.sha256(data).hexdigest() == serving.load.native_sha256
        kept = json.loads(data)
        assert "generated_texts" not in kept and len(kept["ttfts"]) == PROMPTS
        for private in (str(Path(__file__).parent), str(folder), str(Path.home()), socket.gethostname()):
            assert private not in data.decode()


def test_a_server_tells_of_itself(run: tuple[Answer, Path]) -> None:
    serving = run[0].result(HONEST).serving
    assert serving is not None
    facts = serving.settings["server"]
    assert (facts["version"], facts["max_model_len"]) == ({"version": "1.0"}, 2048)
    assert [probe["prompt_tokens"] for probe in facts["probes"]] == [INPUT, INPUT]
    assert serving.settings["enable_prefix_caching"] is False
    told = serving.settings["server_command"]
    assert told == ["python", "-m", "smbench.worker.engines.fakeserver", "--host=127.0.0.1", "--port=<port>"]
    assert serving.settings["client_command"][:3] == ["vllm", "bench", "serve"]


def test_cells_of_the_same_server_share_it_until_one_goes_wrong(run: tuple[Answer, Path]) -> None:
    logs = {path.name for path in (run[1] / "logs").glob("*.server.log")}
    assert f"{HONEST['cell_id']}.server.log" in logs
    assert f"{WAITING['cell_id']}.server.log" not in logs
    # the same command again, but after a server that went wrong
    assert f"{NEXT['cell_id']}.server.log" in logs
    assert len(logs) == 3 + len(FAULTS)


@pytest.mark.parametrize("cell", [WAITING, NEXT, LAST], ids=["shared", "after a crash", "last"])
def test_the_next_cell_works(run: tuple[Answer, Path], cell: dict[str, Any]) -> None:
    assert ended(run[0], cell) == ("ok", "")


def test_a_server_killed_in_the_middle_is_a_crash_with_the_counts_so_far(run: tuple[Answer, Path]) -> None:
    status, reason = ended(run[0], FAULTS["crash"])
    assert status == "crashed"
    counts = re.search(r"(\d+) of 20 requests were completed and (\d+) failed", reason)
    assert counts and int(counts[1]) + int(counts[2]) == PROMPTS and int(counts[2]) > 0
    assert "killed by SIGKILL" in reason and "the fake server's last words" in reason
    load = run[0].result(FAULTS["crash"]).serving
    assert load is not None and load.load is not None and load.load.completed == int(counts[1])
    assert not run[0].result(FAULTS["crash"]).measurements


def test_failed_requests_make_a_cell_incorrect_with_their_kinds(run: tuple[Answer, Path]) -> None:
    status, reason = ended(run[0], FAULTS["errors"])
    assert (status, reason) == ("incorrect", "2 of 20 requests failed: Internal Server Error 2")
    serving = run[0].result(FAULTS["errors"]).serving
    assert serving is not None and serving.load is not None
    assert (serving.load.completed, serving.load.failed) == (18, 2)
    assert serving.load.errors == {"Internal Server Error": 2}


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (
            "short",
            "incorrect",
            "requests are not what was asked: request",
        ),
        ("truncated", "incorrect", "the server counts 6 prompt and 4 generated tokens, 12 and 4 were asked"),
        ("cached", "incorrect", "took 11 of 12 prompt tokens from a cache of prefixes"),
        ("oom-at-start", "oom", "CUDA out of memory"),
        ("exit", "oom", "the server died during the load"),
        ("server", "ok", ""),
    ],
)
def test_every_other_fault_has_its_status(run: tuple[Answer, Path], script: str, status: str, words: str) -> None:
    found, reason = ended(run[0], FAULTS[script])
    assert found == status, reason
    assert words in reason


def test_a_server_that_is_never_ready_runs_into_the_limit(silent: tuple[Answer, Path]) -> None:
    status, reason = ended(silent[0], SILENT["never-ready"])
    assert status == "timeout"
    assert "was not ready within 2 s: … fake server" in reason


def test_a_server_that_falls_silent_runs_into_the_limit_with_the_counts_so_far(silent: tuple[Answer, Path]) -> None:
    status, reason = ended(silent[0], SILENT["hang"])
    assert status == "timeout"
    assert re.search(r"no request was done within 2 s, [5-9] of 20 were before", reason)


def test_a_server_that_ignores_the_end_is_killed_and_the_next_cell_works(silent: tuple[Answer, Path]) -> None:
    assert ended(silent[0], SILENT["stubborn"]) == ("ok", "")
    assert ended(silent[0], HONEST) == ("ok", "")


def test_nothing_is_left_when_the_worker_itself_is_killed(tmp_path: Path, client: Path) -> None:
    asked = job(script="server", step_ms=200)
    with worker([asked], tmp_path, client, 30.0) as process:
        events = process.events(30.0)
        while not any("fake_load_client" in words for words in started(tmp_path)):
            next(events)
        # the server, its child, the client, and a warden of each
        assert len(started(tmp_path)) >= 5
    deadline = time.monotonic() + 10
    while started(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started(tmp_path) == []


def command_of(port: int) -> ServeCommand:
    argv = (sys.executable, "-m", "smbench.worker.engines.fakeserver", "--host=127.0.0.1", f"--port={port}")
    return ServeCommand(argv=argv, model=fakeserver.MODEL, version="1.0", settings={})


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on, and answers as a server would."""
    with subprocess.Popen([*command_of(port := loopback.free_port()).argv], stderr=subprocess.DEVNULL) as process:
        while loopback.status(port, "/health", 1.0) != 200:
            time.sleep(0.02)
        yield port
        process.kill()


def test_a_port_that_somebody_took_is_left_for_another(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobodys = loopback.free_port()
    ports = iter([taken, loopback.free_port()])
    monkeypatch.setattr(loopback, "free_port", lambda: next(ports))
    found = server.start(command_of, tmp_path / "x.server.log", 20.0, lambda: None)
    try:
        assert found.port != taken
        assert loopback.listens(found.processes(), found.port)
        # who answers on the other port is no server of ours
        assert loopback.listens(found.processes(), taken) is False
        assert loopback.listens(found.processes(), nobodys) is None
    finally:
        found.stop()
    assert "in use" in (tmp_path / f"x.server.port-{taken}.log").read_text()


def test_a_stranger_who_answers_is_not_taken_for_the_server(tmp_path: Path, taken: int) -> None:
    ours = server.Server(ServeCommand(("sleep", "600"), fakeserver.MODEL, "1.0", {}), taken, tmp_path / "x.server.log")
    try:
        time.sleep(0.3)
        assert ours.alive
        assert not ours.ready()
    finally:
        ours.stop()


def test_a_fixed_port_that_is_taken_is_said(tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.FIXED_PORT, str(taken))
    with pytest.raises(server.ServerFailed, match=rf"port {taken} of 127.0.0.1 is taken by another program.*unset"):
        server.start(command_of, tmp_path / "x.server.log", 20.0, lambda: None)
    monkeypatch.setenv(server.FIXED_PORT, "http")
    with pytest.raises(server.ServerFailed, match="'http' is no port"):
        server.start(command_of, tmp_path / "x.server.log", 20.0, lambda: None)


def test_an_environment_is_stripped_of_proxies_and_credentials() -> None:
    given = {"PATH": "/bin", "HTTPS_PROXY": "x", "HF_TOKEN": "x", "OPENAI_API_KEY": "x", "TOKENIZERS_PARALLELISM": "0"}
    assert loopback.private(given) == {
        "PATH": "/bin",
        "TOKENIZERS_PARALLELISM": "0",
        "no_proxy": "127.0.0.1,localhost",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def test_a_warden_ends_a_tree_of_processes_with_its_program(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '600'], start_new_session=True); "
        "print(p.pid, flush=True); sys.exit(int(sys.argv[1]))"
    )
    words = [sys.executable, "-m", "smbench.worker.warden", str(os.getpid()), "1", sys.executable, "-c", program]
    done = subprocess.run([*words, "7"], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), signal.SIGCONT)
