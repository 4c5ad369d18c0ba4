"""What a load client is sent, how far it is, and what its file means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smbench.worker import benchserve, byhand, loadclient, loadresult, sentprompts, serverfacts
from smbench.worker.engines import ServeCommand
from smbench.worker.loadclient import Progress, Turns
from smbench.worker.loadresult import NotALoad
from smbench.worker.prompts import prompt
from smbench.worker.wordtokenizer import LEAST, Words, column, files

TRACEBACK = """Traceback (most recent call last):
  File "/home/somebody/site-packages/aiohttp/client.py", line 1, in f
aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 127.0.0.1:1 ssl:default
"""
NATIVE: dict[str, Any] = {
    "client": "vllm bench serve 0.26.0",
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 2.0,
    "completed": 2,
    "failed": 2,
    "input_lens": [7, 7, 7, 7],
    "output_lens": [3, 0, 1, 0],
    "ttfts": [0.5, 0.0, 0.25, 0.0],
    "itls": [[0.125, 0.25], [], [], []],
    "errors": ["", TRACEBACK, "", "Internal Server Error"],
    "generated_texts": [" a b c", "", " d", ""],
}
"""Four requests in the form of 0.26, which has no latencies."""


def read(folder: Path, **changes: Any) -> loadresult.Answers:
    path = folder / "result.json"
    path.write_text(json.dumps({**NATIVE, **changes}), encoding="utf-8")
    return loadresult.read(path, 4)


def test_a_file_becomes_a_record_of_the_requests_that_completed(tmp_path: Path) -> None:
    found = loadresult.load(read(tmp_path), "x", "cell", "0" * 64)
    assert (found["completed"], found["failed"]) == (2, 2)
    assert found["errors"] == {"ClientConnectorError": 1, "Internal Server Error": 1}
    assert (found["prompt_tokens"], found["completion_tokens"]) == (14, 4)
    assert (found["ttft_s"], found["e2e_s"]) == ([0.5, 0.25], [0.875, 0.25])
    # a single token has no time per further token
    assert (found["tpot_s"], found["itl_s"]) == ([0.1875], [0.125, 0.25])
    assert (found["request_rate"], found["max_concurrency"], found["native"]) == (None, None, "native/cell.json")


def test_what_the_client_says_of_latencies_goes_before_their_sum(tmp_path: Path) -> None:
    found = loadresult.load(read(tmp_path, latencies=[0.9, 0.0, 0.25, 0.0]), "x", "cell", "0" * 64)
    assert (found["e2e_s"], found["tpot_s"]) == ([0.9, 0.25], [0.2])


def test_the_measures_of_a_load_are_its_lists(tmp_path: Path) -> None:
    found = loadresult.load(read(tmp_path, request_rate=4.0, max_concurrency=2), "x", "cell", "0" * 64)
    assert (found["request_rate"], found["max_concurrency"]) == (4.0, 2)
    rows = loadresult.measurements(found, ["ttft", "duration"], {"ttft": {"bytes": 1, "flops": 2}})
    assert [(row["name"], row["samples_s"], row["work"]) for row in rows] == [
        ("ttft", [0.5, 0.25], {"bytes": 1, "flops": 2}),
        ("duration", [2.0], None),
    ]
    with pytest.raises(KeyError):
        loadresult.measurements(found, ["speed"], {})


def test_a_file_is_kept_without_texts_and_tracebacks(tmp_path: Path) -> None:
    loadresult.keep(read(tmp_path), tmp_path, "cell")
    kept = json.loads((tmp_path / "native" / "cell.json").read_text(encoding="utf-8"))
    assert kept["errors"] == ["", "ClientConnectorError", "", "Internal Server Error"]
    assert kept["ttfts"] == NATIVE["ttfts"]
    assert "generated_texts" not in kept


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ttfts": [0.5]}, "'ttfts' is no list of 4 requests"),
        ({"errors": None}, "'errors' is no list of 4 requests"),
        ({"completed": 3}, "'completed' is 3, and its lists have 2"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotALoad, match=words):
        read(tmp_path, **changes)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"ttfts": [0.1,', encoding="utf-8")
    with pytest.raises(NotALoad, match="is no JSON"):
        loadresult.read(tmp_path / "result.json", 4)


def test_requests_that_are_not_what_was_asked_are_named(tmp_path: Path) -> None:
    answers = read(tmp_path)
    assert answers.mismatches([7, 7, 7, 7], 3) == ["request 2: 7 prompt and 1 generated tokens, 7 and 3 were asked"]
    assert len(answers.mismatches([8, 7, 8, 7], 3)) == 2


def test_progress_counts_the_load_and_not_its_warm_up(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    log.touch()
    progress = Progress(log, 20)
    assert progress.look() is None
    with log.open("a", encoding="utf-8") as file:
        file.write("Warming up\r 50%|███   | 20/20 [00:00<00:00]\nStarting main bench")
        file.flush()
        assert progress.look() is None
        file.write("mark run...\r  0%|      | 0/20 [00:00<?, ?it/s]")
        file.flush()
        assert progress.look() == 0
        file.write("\r 35%|██    | 7/20 [00:0")
        file.flush()
        assert progress.look() == 7


def test_the_client_is_asked_for_the_load_of_the_cell(tmp_path: Path) -> None:
    server: Any = SimpleNamespace(port=4711, command=ServeCommand((), "model", "1", {}))
    limited = loadclient.Load([[1, 2]] * 3, 5, "2.5", 4, 1, 9)
    words = loadclient.command(Path("python"), limited, server, tmp_path)
    assert words[:3] == ["python", "-m", "smbench.worker.benchserve"]
    for word in (
        "--base-url=http://127.0.0.1:4711",
        "--num-prompts=3",
        "--request-rate=2.5",
        "--max-concurrency=4",
        "--seed=9",
        "--ignore-eos",
        "--save-detailed",
    ):
        assert word in words
    free = loadclient.Load([[1, 2]] * 3, 5, "inf", 0, 1, 9)
    assert not [w for w in loadclient.command(Path("python"), free, server, tmp_path) if "max-concurrency" in w]


def test_the_client_reads_prompts_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [5, 6, 7], "output_tokens": 4}, {"prompt": " a b", "output_tokens": 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = lambda text: SimpleNamespace(input_ids=text.split())  # noqa: E731
    found = benchserve.read(file, tokenizer, lambda **fields: fields, "bench-")  # type: ignore[arg-type]
    assert found == [
        {"prompt": [5, 6, 7], "prompt_len": 3, "expected_output_len": 4, "request_id": "bench-0"},
        {"prompt": " a b", "prompt_len": 2, "expected_output_len": 2, "request_id": "bench-1"},
    ]


def options(words: list[str]) -> dict[str, str]:
    return {name: value for name, value in pairwise(words) if name.startswith("--")}


def test_commands_are_recorded_as_a_reader_can_repeat_them() -> None:
    argv = (
        "/opt/x/bin/python3",
        "-m",
        "x.server",
        "/models/a",
        "--port=7",
        "--server-port",
        "7",
        "--file",
        "/tmp/o.yaml",
        "--len",
        "7",
    )
    told = byhand.server(ServeCommand(argv, "a", "1", {}), Path("/models/a"), 7)
    assert told == [
        "python3",
        "-m",
        "x.server",
        "<model>",
        "--port=<port>",
        "--server-port",
        "<port>",
        "--file",
        "<file>",
        "--len",
        "7",
    ]
    axes = {"dataset": "random", "num_prompts": 8, "input_len": 100, "output_len": 20}
    load = {"request_rate": "2.5", "max_concurrency": 0}
    found = options(byhand.client({**axes, **load}, "a", 3, 1))
    assert (found["--random-input-len"], found["--random-output-len"], found["--num-prompts"]) == ("100", "20", "8")
    assert (found["--request-rate"], found["--seed"], found["--port"]) == ("2.5", "3", "<port>")
    assert "--max-concurrency" not in found
    found = options(byhand.client({**axes, **load, "dataset": "shared-prefix", "max_concurrency": 4}, "a", 3, 1))
    assert (found["--prefix-repetition-prefix-len"], found["--prefix-repetition-num-prefixes"]) == ("50", "2")
    assert found["--max-concurrency"] == "4"
    found = options(byhand.client({**axes, **load, "dataset": "sharegpt"}, "a", 3, 1))
    assert (found["--dataset-path"], found["--sharegpt-output-len"]) == ("<file>", "20")


def asked(engine: str, folder: Path, model: str = "synthetic:tiny") -> dict[str, Any]:
    axes = {"dataset": "random", "num_prompts": 3, "input_len": 10}
    named = {"engine": engine, "model": {"name": model, "path": str(folder), "vocabulary": 64}}
    return {"subject": "online", "seed": 1, "axes": axes, "engine": named}


def test_a_server_that_takes_no_ids_gets_words_that_are_exactly_tokens(tmp_path: Path) -> None:
    config = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids, text = sentprompts.of(asked("vllm", tmp_path)), sentprompts.of(asked("lmdeploy", tmp_path))
    assert ids.prompts == [prompt(1, 64, 10, i) for i in range(3)]
    assert (ids.form, text.form) == ("token ids", "text")
    assert (ids.exact, text.exact) == (True, True)
    assert [len(str(words).split()) for words in text.prompts] == [10, 10, 10]
    assert text.record["tokens"] == ids.record["tokens"] == 30
    assert text.record["sha256"] != ids.record["sha256"]


def test_words_are_like_columns_of_a_spreadsheet() -> None:
    assert [column(number) for number in (1, 26, 27, 52, 53, 702, 703)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]


@pytest.mark.parametrize(("vocabulary", "bos", "eos"), [(2048, 0, 1), (LEAST, 0, 1), (3000, 2998, 2999)])
def test_every_token_has_one_name_and_every_word_is_built_from_a_shorter_one(
    vocabulary: int, bos: int, eos: int
) -> None:
    model = files(vocabulary, bos, eos, 4096)["tokenizer.json"]["model"]
    assert sorted(model["vocab"].values()) == list(range(vocabulary))
    assert [model["vocab"][name] for name in ("<|endoftext|>", "<|im_end|>")] == [bos, eos]
    built = {"Ġ"}
    for merge in model["merges"]:
        shorter, letter = merge.split()
        assert shorter in built and letter in model["vocab"]
        built.add(shorter + letter)
        assert shorter + letter in model["vocab"]
    assert len(built) == 1 + len(Words(vocabulary, bos, eos).ids)


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="two of them special"):
        Words(LEAST - 1, 0, 1)
    with pytest.raises(ValueError, match="two of them special"):
        Words(2048, 7, 7)


def test_kernels_and_cache_are_read_from_a_servers_log(tmp_path: Path) -> None:
    log = tmp_path / "x.server.log"
    log.write_text(
        "INFO [auto_gptq.py:352] Using MacheteLinearKernel for AutoGPTQLinearMethod\n"
        "INFO [cuda.py:1] Using AttentionBackendEnum.FLASH_ATTN backend.\n"
        "INFO GPU KV cache size: 1,234,567 tokens\n",
        encoding="utf-8",
    )
    assert serverfacts.kernels(log, {}) == {"linear": {"MacheteLinearKernel": 0}, "attention": {"FLASH_ATTN": 0}}
    assert serverfacts.memory(log) == {"kv_cache_tokens": 1234567}
    log.write_text("max_total_num_tokens=4096, chunked_prefill_size=512\n", encoding="utf-8")
    facts = {"settings": {"quantization": "gptq_marlin", "attention_backend": "fa3"}}
    assert serverfacts.kernels(log, facts) == {"linear": {"gptq_marlin": 0}, "attention": {"fa3": 0}}
    assert serverfacts.memory(log) == {"kv_cache_tokens": 4096}


def test_a_process_that_waits_for_the_processor_is_told_from_one_that_sleeps() -> None:
    """Two that compute on one core wait for each other; one that sleeps waits for nobody."""
    core = min(os.sched_getaffinity(0))
    pin = f"import os, time; os.sched_setaffinity(0, {{{core}}})\n"
    programs = [pin + "while True: pass"] * 2 + [pin + "time.sleep(60)"]
    running = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        time.sleep(0.3)
        before = [Turns.of(process.pid) for process in running]
        time.sleep(0.5)
        spent = [Turns.of(process.pid) for process in running]
        if None in before + spent:
            pytest.skip("this kernel keeps no account of turns")
        busy, _, asleep = (now.since(then) for now, then in zip(spent, before, strict=True) if now and then)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert busy.ran_s > 0.02 and busy.waited_s > 0.1
    assert asleep.waited_s < 0.1
    assert Turns.of(running[0].pid) is None


def test_a_client_without_vllm_is_told_from_one_that_died(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    log.write_text("ModuleNotFoundError: No module named 'vllm'\n", encoding="utf-8")
    assert loadclient.is_missing(log)
    log.write_text("ModuleNotFoundError: No module named 'vllm_extra'\n", encoding="utf-8")
    assert not loadclient.is_missing(log)
