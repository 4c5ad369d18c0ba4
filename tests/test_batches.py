"""Cells of batches: which prompts they consist of, what is stored of each repetition, what a wrong answer becomes."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from serving_requests import SAMPLES, SEED, VOCABULARY, WARMUP, Answer, batch_job, command, through_the_host
from smbench import recipe, resources
from smbench.findings import Evidence, Finding
from smbench.guards import GUARDS
from smbench.result import Result
from smbench.worker import datasets, sharegpt
from smbench.worker.engines import BatchAnswer
from smbench.worker.engines.fake import token
from smbench.worker.engines.streaming import Arrivals
from smbench.worker.prompts import prompt, prompt_with_prefix
from smbench.workerprocess import Refused

STATIC = batch_job("static_batch", step_ms=2)
SINGLE = batch_job("static_batch", step_ms=1, output_len=1)
OFFLINE = batch_job("offline", step_ms=1)
SHARED = batch_job("offline", dataset="shared-prefix", prefix_caching=True)
UNSHARED = batch_job("offline", dataset="shared-prefix")
RANDOM = batch_job("offline", prefix_caching=True)
SCRIPTS = {name: batch_job("static_batch", script=name) for name in ("short", "truncated", "cached", "no-clock")}
LOST = batch_job("static_batch", script="lost-step", at=1)
JOBS = [STATIC, SINGLE, OFFLINE, SHARED, UNSHARED, RANDOM, *SCRIPTS.values(), LOST]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    return through_the_host(JOBS, tmp_path_factory.mktemp("run"))


def batches(result: Result) -> Sequence[Any]:
    assert result.serving is not None, result.reason
    return result.serving.batches


def sha256(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256("\n".join(" ".join(map(str, ids)) for ids in sequences).encode()).hexdigest()


def test_a_static_batch_is_stored_with_every_step(run: Answer) -> None:
    result = run.result(STATIC)
    assert (result.status, result.reason) == ("ok", None)
    assert result.serving is not None
    assert (result.serving.step_clock, result.serving.requests) == ("engine-step", ())
    found = batches(result)
    assert len(found) == WARMUP + SAMPLES
    for repetition, batch in enumerate(found):
        asked = [prompt(SEED, VOCABULARY, 24, 4 * repetition + i) for i in range(3)]
        assert batch.output_sha256 == sha256([[token(ids, i) for i in range(5)] for ids in asked])
        assert (batch.batch, batch.prompt_tokens, batch.completion_tokens, batch.cached_tokens) == (3, 72, 15, 0)
        assert batch.finish_reasons == {"length": 3}
        # five steps of two milliseconds, the first of them the prompts'
        assert len(batch.step_s) == 4 and min(batch.step_s) >= 0.002
        assert batch.e2e_s == pytest.approx(batch.prefill_s + sum(batch.step_s))


def test_measures_are_those_of_the_document(run: Answer) -> None:
    result = run.result(STATIC)
    rows = {row.name: row for row in result.measurements}
    assert list(rows) == ["prefill_latency", "decode_latency", "e2e_latency"]
    found = batches(result)
    wanted = {
        "prefill_latency": [batch.prefill_s for batch in found],
        "decode_latency": [statistics.median(batch.step_s) for batch in found],
        "e2e_latency": [batch.e2e_s for batch in found],
    }
    for name, values in wanted.items():
        assert (list(rows[name].warmup_s), list(rows[name].samples_s)) == (values[:WARMUP], values[WARMUP:])
        assert rows[name].method == "wall"
    assert [row.work.bytes for row in result.measurements if row.work] == [1000, 1001, 1002]


def test_a_single_output_token_has_no_decode_step(run: Answer) -> None:
    result = run.result(SINGLE)
    assert [row.name for row in result.measurements] == ["prefill_latency", "e2e_latency"]
    assert all(batch.step_s == () and batch.e2e_s == batch.prefill_s for batch in batches(result))


def test_an_offline_batch_is_timed_as_a_whole(run: Answer) -> None:
    result = run.result(OFFLINE)
    assert [row.name for row in result.measurements] == ["e2e_latency"]
    assert result.serving is not None and result.serving.prompts is not None
    assert result.serving.step_clock == "none"
    assert all((batch.prefill_s, batch.step_s) == (None, ()) and batch.e2e_s >= 0.005 for batch in batches(result))
    told = result.serving.prompts
    # of the first repetition that counts
    counted = [prompt(SEED, VOCABULARY, 24, 8 * WARMUP + i) for i in range(6)]
    assert (told.dataset, told.count, told.tokens, told.sha256) == ("random", 6, 144, sha256(counted))


def test_the_host_hears_of_every_repetition(run: Answer) -> None:
    assert len(run.of(OFFLINE, "request")) == WARMUP + SAMPLES


def test_a_cache_of_prefixes_is_on_where_a_provider_asks_and_prompts_share_one(run: Answer) -> None:
    hits = {
        name: [batch.cached_tokens for batch in batches(run.result(asked))]
        for name, asked in {"shared": SHARED, "off": UNSHARED, "random": RANDOM}.items()
    }
    # half of 24 tokens, of every prompt but the first of its group of four
    assert hits == {"shared": [48] * 5, "off": [0] * 5, "random": [0] * 5}


def test_prompts_of_a_group_share_their_first_half_and_no_repetition_shares_any() -> None:
    drawn = datasets.draw(batch_job("offline", dataset="shared-prefix", num_prompts=6), 2)
    heads = [[tuple(ids[:12]) for ids in prompts] for prompts in drawn.repetitions]
    for repetition in heads:
        assert [repetition.index(head) for head in repetition] == [0, 0, 0, 0, 4, 4]
    assert not set(heads[0]) & set(heads[1])
    tails = [tuple(ids[12:]) for prompts in drawn.repetitions for ids in prompts]
    assert len(set(tails)) == 12
    assert prompt_with_prefix(0, 152064, 8, 5)[:4] == prompt_with_prefix(0, 152064, 8, 4)[:4]


@pytest.mark.parametrize(
    ("script", "field", "values"),
    [
        ("short", "completion_tokens", [14, 15]),
        ("short", "finish_reasons", [{"length": 2, "stop": 1}, {"length": 3}]),
        ("truncated", "prompt_tokens", [60, 72]),
        ("cached", "cached_tokens", [23, 0]),
    ],
)
def test_what_an_engine_says_of_a_batch_is_not_mended(run: Answer, script: str, field: str, values: list[Any]) -> None:
    found = [getattr(batch, field) for batch in batches(run.result(SCRIPTS[script]))]
    assert found[:2] == values


def test_an_engine_that_shows_no_steps_is_timed_as_a_whole(run: Answer) -> None:
    result = run.result(SCRIPTS["no-clock"])
    # the first repetition had no clock, so no sample is complete
    assert [row.name for row in result.measurements] == ["e2e_latency"]


def test_a_batch_with_a_step_that_nobody_saw_is_no_measurement(run: Answer) -> None:
    result = run.result(LOST)
    assert (result.status, result.measurements) == ("crashed", ())
    assert result.reason == "RuntimeError: 3 decode steps were seen, 4 were asked for"


def test_the_steps_of_a_stream_end_with_the_last_prompt_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 3.5, 4.0, 5.0, 6.5])
    monkeypatch.setattr("smbench.worker.engines.streaming.time.perf_counter", lambda: next(clock))
    arrivals = Arrivals(2)
    # the second prompt's first token comes after the first one's second
    for which, count in [(0, 1), (0, 2), (1, 1), (1, 2), (0, 3), (1, 3)]:
        arrivals.saw(which, count)
    answer = arrivals.timed(BatchAnswer([[1, 2, 3]] * 2, [4, 4], ["length"] * 2, None))
    assert (answer.prefill_s, answer.step_s, answer.step_clock) == (3.5, [0.5, 2.5], "stream")


def test_engines_that_did_not_get_the_same_prompts_are_named(run: Answer) -> None:
    ours = run.result(STATIC)
    assert ours.serving is not None and ours.serving.prompts is not None
    cell = ours.cell.model_copy(update={"provider": "another"})
    others = ours.serving.prompts.model_copy(update={"sha256": "f" * 64})
    same = ours.model_copy(update={"cell": cell})
    other = same.model_copy(update={"serving": ours.serving.model_copy(update={"prompts": others})})

    def found(*results: Result) -> list[Finding]:
        chosen = recipe.load(recipe.find("gptq", resources.recipes_dir()))
        return list(GUARDS["prompts"](Evidence(chosen, None, results, {}, [], [])))

    assert found(ours, same) == []
    (finding,) = found(ours, other)
    assert finding.severity == "warning"
    assert "at 1 of 1 points" in finding.message and "ffffffffffff: another" in finding.message


# ------------------------------------------------------------------------------------------------------- sharegpt


def conversations(file: Path, *turns: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text(json.dumps([{"id": str(i), "conversations": list(entry)} for i, entry in enumerate(turns)]))
    return file


def asks(words: int, name: str = "human") -> list[dict[str, str]]:
    return [{"from": name, "value": " ".join(["word"] * words)}, {"from": "gpt", "value": "an answer"}]


def words_as_tokens(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_the_first_human_turn_of_each_conversation_is_a_prompt(tmp_path: Path) -> None:
    file = conversations(
        tmp_path / "sharegpt.json",
        asks(5),
        [{"from": "system", "value": "be brief"}, *asks(6, "user")],
        [{"from": "gpt", "value": "no question"}],
        [],
        [{"from": "human", "value": "  "}, *asks(9)],
    )
    assert [len(question.split()) for question in sharegpt.questions(file)] == [5, 6]


def test_questions_are_of_the_length_that_a_cell_takes_and_in_an_order_of_the_seed(tmp_path: Path) -> None:
    file = conversations(tmp_path / "sharegpt.json", *(asks(n) for n in (3, 4, 5, 6, 7, 8, 9)))
    drawn = sharegpt.draw(file, words_as_tokens, 3, 4, 8)
    assert {len(ids) for ids in drawn} < {4, 5, 6, 7, 8}
    assert drawn == sharegpt.draw(file, words_as_tokens, 3, 4, 8)
    assert len({tuple(map(len, sharegpt.draw(file, words_as_tokens, seed, 4, 8))) for seed in range(5)}) > 1
    with pytest.raises(sharegpt.NotShareGpt, match=r"5 of 7 questions have 4 to 8 tokens .* the cell needs 6"):
        sharegpt.draw(file, words_as_tokens, 3, 6, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", r"bad\.json: not valid JSON"),
        ('{"a": 1}', r"bad\.json: holds no list of conversations"),
        ('[{"text": "a"}, 3]', r"bad\.json: none of its 2 entries has a turn from human or user in a list"),
    ],
)
def test_a_file_of_another_form_is_refused_before_an_engine_starts(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(Refused) as refusal:
        through_the_host([batch_job("offline", dataset="sharegpt", sharegpt=file)], tmp_path)
    assert re.match(words, refusal.value.errors[0])


def test_a_file_s_prompts_are_those_of_every_repetition_and_its_text_is_not_stored(tmp_path: Path) -> None:
    file = conversations(tmp_path / "sharegpt.json", *(asks(n) for n in range(4, 20)))
    asked = batch_job("offline", dataset="sharegpt", sharegpt=file, num_prompts=5)
    # the fake's folder has no tokenizer
    program = """
from smbench.worker import datasets
datasets._tokenizer = lambda folder: lambda text: [len(word) for word in text.split()]
"""
    result = through_the_host([asked], tmp_path, worker=command(program)).result(asked)
    assert result.status == "ok" and result.serving is not None and result.serving.prompts is not None
    assert len({batch.output_sha256 for batch in batches(result)}) == 1
    told = result.serving.prompts
    assert told.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (told.dataset, told.count) == ("sharegpt", 5)
    assert {batch.prompt_tokens for batch in batches(result)} == {told.tokens}
    assert "word word" not in result.model_dump_json()
