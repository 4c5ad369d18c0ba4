"""vLLM's own server on a CPU under `vllm bench serve`, both from the stack's Python, as the host would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from smbench import stacks
from smbench.cell import Cell
from smbench.result import Result
from smbench.worker.prompts import prompt
from smbench.worker.wordtokenizer import Words
from smbench.workerprocess import WORKER_MODULE, WorkerProcess

pytestmark = [pytest.mark.engine("vllm"), pytest.mark.timeout(300)]

PYTHON = str(stacks.here().python("vllm"))
PROMPTS, INPUT, OUTPUT, SEED, VOCABULARY = 8, 48, 6, 4, 2048
MEASURES = ("ttft", "tpot", "itl", "e2e_latency", "duration")
ASK = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = sys.stdin.read()
ids = tokenizer(text).input_ids
print(json.dumps([ids, tokenizer.decode(ids) == text, len(tokenizer)]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    command = [PYTHON, "-m", "smbench.worker.checkpoint", "tiny", "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def job(model: Path, rate: str, concurrency: int, prompts: int = PROMPTS) -> dict[str, Any]:
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
    cell = Cell(kind="engine", subject="online", provider="vllm", axes=axes, seed=SEED)
    return {
        "cell_id": cell.cell_id,
        "subject": "online",
        "provider": "vllm",
        "axes": axes,
        "seed": SEED,
        "untimed_reason": None,
        "engine": {
            "engine": "vllm",
            "device": "cpu",
            "settings": {},
            "limits": {"max_model_len": 512, "max_num_seqs": 4, "memory_fraction": 0.3, "kv_cache_bytes": 64 << 20},
            "model": {"name": "synthetic:tiny", "path": str(model), "vocabulary": VOCABULARY},
            "requests": {"warmup": 1, "samples": 1},
            "measures": list(MEASURES),
            "expected_kernel": None,
            "work": {},
            "compare": False,
            "is_reference": False,
            "sharegpt": None,
        },
    }


def result_of(asked: dict[str, Any], events: list[dict[str, Any]]) -> Result:
    (event,) = [event for event in events if event["event"] == "result" and event["cell_id"] == asked["cell_id"]]
    cell = Cell(kind="engine", **{key: asked[key] for key in ("subject", "provider", "axes", "seed")})
    fields = {key: value for key, value in event.items() if key not in ("event", "cell_id")}
    return Result(cell_id=cell.cell_id, cell=cell, environment_id="0", **fields)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], Path]:
    """A load at a rate, and one whose server somebody kills: one server for both."""
    folder = tmp_path_factory.mktemp("run")
    jobs = [job(model, "8", 2), job(model, "20", 0, 40)]
    request = {
        "kind": "engine",
        "device": "cpu",
        "logs": str(folder / "logs"),
        "folder": str(folder),
        "time_limit_s": 200.0,
        "measures": [],
        "jobs": jobs,
    }
    events: list[dict[str, Any]] = []
    killed = False
    with WorkerProcess(folder, request, interpreted=False, command=[PYTHON, *WORKER_MODULE]) as process:
        for event in process.events(200.0):
            events.append(event)
            # the second load has begun; its 40 requests take two seconds
            if event.get("cell_id") == jobs[1]["cell_id"] and not killed and "/40 [" in words_of(folder, jobs[1]):
                (core,) = engine_cores(folder)
                os.kill(core, signal.SIGKILL)
                killed = True
    return [result_of(asked, events) for asked in jobs], folder


def words_of(folder: Path, asked: dict[str, Any]) -> str:
    """What the load client of a cell has said so far."""
    log = folder / "logs" / f"{asked['cell_id']}.client.log"
    return log.read_text(encoding="utf-8") if log.exists() else ""


def engine_cores(folder: Path) -> list[int]:
    """The processes of vLLM that hold the model, below this process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "comm").read_text().startswith("VLLM::EngineCor") and str(folder) in str(
                (path / "fd" / "1").readlink()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_every_request_is_what_was_asked(run: tuple[list[Result], Path]) -> None:
    result = run[0][0]
    assert (result.status, result.reason) == ("ok", None)
    assert result.serving is not None and result.serving.load is not None
    load = result.serving.load
    assert (load.completed, load.failed) == (PROMPTS, 0)
    assert (load.prompt_tokens, load.completion_tokens) == (PROMPTS * INPUT, PROMPTS * OUTPUT)
    assert [row.name for row in result.measurements] == list(MEASURES)
    assert load.client.startswith("vllm bench serve 0.")
    assert (load.request_rate, load.max_concurrency, load.burstiness) == (8.0, 2, 1.0)
    for ttft, e2e in zip(load.ttft_s, load.e2e_s, strict=True):
        assert 0 < ttft < e2e <= load.duration_s


def test_the_server_tells_what_it_is(run: tuple[list[Result], Path]) -> None:
    serving = run[0][0].serving
    assert serving is not None
    facts = serving.settings["server"]
    assert facts["version"]["version"] == serving.version
    assert facts["max_model_len"] == 512
    assert facts["probes"] == [{"prompt_tokens": INPUT, "completion_tokens": OUTPUT, "cached_tokens": 0}] * 2
    assert facts["load_client"]["ran_s"] > 0
    assert serving.kernels["linear"] == {"CPUWNA16LinearKernel": 0}
    assert serving.memory["kv_cache_tokens"] > 0
    assert str(Path.home()) not in json.dumps(serving.settings)


def test_the_statistics_of_the_client_are_those_of_its_lists(run: tuple[list[Result], Path]) -> None:
    serving = run[0][0].serving
    assert serving is not None and serving.load is not None
    load = serving.load
    native = json.loads((run[1] / load.native).read_text(encoding="utf-8"))
    for key, samples in (("ttft", load.ttft_s), ("tpot", load.tpot_s), ("itl", load.itl_s), ("e2el", load.e2e_s)):
        assert sum(samples) / len(samples) * 1e3 == pytest.approx(native[f"mean_{key}_ms"], rel=1e-6)
    assert native["total_input_tokens"] == load.prompt_tokens


def test_a_killed_engine_is_a_crash_with_the_counts_so_far(run: tuple[list[Result], Path]) -> None:
    result = run[0][1]
    assert result.status == "crashed", result.reason
    assert "the server died during the load" in (result.reason or "")
    assert "of 40 requests" in (result.reason or "")


def test_one_server_stood_for_both_and_none_is_left(run: tuple[list[Result], Path]) -> None:
    assert len(list((run[1] / "logs").glob("*.server.log"))) == 1
    deadline = time.monotonic() + 5
    while engine_cores(run[1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine_cores(run[1]) == []


def test_text_of_words_becomes_the_very_tokens(model: Path) -> None:
    words = Words(VOCABULARY, 0, 1)
    asked = [words.ids[token % len(words.ids)] for token in prompt(SEED, VOCABULARY, 500, 0)]
    done = subprocess.run(
        [PYTHON, "-c", ASK, str(model)], input=words.text(asked), stdout=subprocess.PIPE, text=True, check=True
    )
    assert json.loads(done.stdout) == [asked, True, VOCABULARY]
