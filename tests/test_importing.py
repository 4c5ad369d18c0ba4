"""Files of other tools: each number is the file's own, under its true definition."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import small_runs
from import_files import DATA, FILES, edited
from smbench import importing, published
from smbench.imported import ImportedRun, Measure
from smbench.metrics import METRICS

TOOLS = {
    "aiperf-export.csv": "aiperf",
    "aiperf-export.json": "aiperf",
    "aiperf-records.jsonl": "aiperf",
    "guidellm.json": "guidellm",
    "sglang-offline.jsonl": "sglang-offline-throughput",
    "sglang-one-batch.log": "sglang-one-batch",
    "sglang-serving-details.jsonl": "sglang-serving",
    "sglang-serving.jsonl": "sglang-serving",
    "vllm-latency.json": "vllm-latency",
    "vllm-serve-all-failed.json": "vllm-serve",
    "vllm-serve-detailed.json": "vllm-serve",
    "vllm-serve.json": "vllm-serve",
    "vllm-throughput.json": "vllm-throughput",
}


def one(name: str) -> ImportedRun:
    (run,) = importing.read(DATA / name)
    return run


def said(name: str) -> dict[str, Any]:
    """The file's first object, as the tool wrote it."""
    values: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8").splitlines()[-1])
    return values


def of(run: ImportedRun, metric: str, definition: str | None = None) -> Measure:
    found = run.measure(metric, definition)
    assert found is not None, (metric, [(m.metric, m.definition) for m in run.measures])
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_tool_is_known_by_the_content_alone(name: str) -> None:
    runs = importing.parse((DATA / name).read_bytes(), "whatever.txt")
    assert {run.tool for run in runs} == {TOOLS[name]}
    assert [run.position for run in runs] == list(range(1, len(runs) + 1))
    for run in runs:
        assert (run.source, len(run.source_sha256)) == ("whatever.txt", 64)
        for measure in run.measures:
            assert METRICS[measure.metric].way(measure.definition)
        assert ImportedRun.model_validate_json(run.model_dump_json()) == run
        # nothing says where things lay
        assert "/" not in (run.model or "")


def test_a_detailed_file_of_vllm_has_the_statistics_of_its_samples() -> None:
    run, file = one("vllm-serve-detailed.json"), said("vllm-serve-detailed.json")
    assert (run.model, run.engine, run.completed, run.failed) == ("tiny-llama", None, 6, 0)
    assert (run.prompt_tokens, run.completion_tokens) == (144, 48)
    assert run.axes == {
        "num_prompts": 6,
        "input_len": 24,
        "output_len": 8,
        "request_rate": "8",
        "max_concurrency": 4,
    }
    for metric, key in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e_latency", "e2el")):
        measure = of(run, metric)
        # the tool's own statistics, recomputed from what we took for samples
        for statistic, compute in (("mean", np.mean), ("median", np.median), ("std", np.std)):
            assert compute(measure.samples) == pytest.approx(file[f"{statistic}_{key}_ms"] / 1e3, rel=1e-9)
            assert measure.stated[statistic] == pytest.approx(file[f"{statistic}_{key}_ms"] / 1e3, rel=1e-12)
        for percent in (50, 90, 99):
            value = np.percentile(measure.samples, percent)
            assert value == pytest.approx(measure.stated[f"p{percent}"], rel=1e-9)
    assert of(run, "duration", "load").stated == {"total": file["duration"]}
    assert of(run, "goodput").stated == {"total": file["request_goodput"]}
    assert of(run, "total_token_throughput").stated["total"] == pytest.approx((144 + 48) / file["duration"])
    assert not [note for note in run.notes if "states a median" in note]


def test_a_file_of_vllm_without_details_has_its_statistics_and_the_whole_latencies() -> None:
    run, file = one("vllm-serve.json"), said("vllm-serve.json")
    assert (run.axes["request_rate"], run.axes["max_concurrency"]) == ("inf", 0)
    # lengths from the totals, which divide evenly
    assert (run.axes["input_len"], run.axes["output_len"]) == (24, 8)
    assert of(run, "ttft").samples == ()
    assert of(run, "ttft").stated["p99"] == pytest.approx(file["p99_ttft_ms"] / 1e3)
    assert of(run, "e2e_latency").samples == tuple(file["latencies"])


def test_failed_requests_are_counted_and_in_no_number() -> None:
    run = one("vllm-serve-all-failed.json")
    assert (run.completed, run.failed, run.measures) == (0, 6, ())

    def third_fails(file: dict[str, Any]) -> None:
        file["errors"][2] = "Internal Server Error"
        file["output_lens"][2] = file["ttfts"][2] = file["latencies"][2] = 0
        file["itls"][2] = []
        file["completed"], file["failed"] = 5, 1

    (some,) = importing.parse(edited("vllm-serve-detailed.json", third_fails), "some.json")
    whole = one("vllm-serve-detailed.json")
    assert (some.completed, some.failed) == (5, 1)
    assert of(some, "ttft").samples == tuple(s for i, s in enumerate(of(whole, "ttft").samples) if i != 2)
    assert len(of(some, "itl").samples) == 35
    # its statistics are those of six
    assert [note for note in some.notes if note.startswith("ttft: states a median of")]


def test_an_older_file_of_vllm_has_its_latencies_from_the_gaps() -> None:
    (old,) = importing.parse(edited("vllm-serve-detailed.json", lambda file: file.pop("latencies")), "old.json")
    new = one("vllm-serve-detailed.json")
    for metric in ("e2e_latency", "tpot"):
        assert of(old, metric).samples == pytest.approx(of(new, metric).samples, rel=1e-9)


def test_results_that_were_appended_to_one_file_are_several() -> None:
    text = (DATA / "vllm-serve.json").read_bytes() + b"\n" + (DATA / "vllm-serve-detailed.json").read_bytes()
    assert [(run.position, len(of(run, "ttft").samples)) for run in importing.parse(text, "x")] == [(1, 0), (2, 6)]


def test_vllm_latency_and_throughput() -> None:
    latency, file = one("vllm-latency.json"), json.loads((DATA / "vllm-latency.json").read_text(encoding="utf-8"))
    measure = of(latency, "e2e_latency", "batch")
    assert measure.samples == tuple(file["latencies"])
    assert (measure.stated["mean"], measure.stated["median"]) == (file["avg_latency"], file["percentiles"]["50"])
    assert (latency.workload, latency.axes) == ("static_batch", {})
    through = one("vllm-throughput.json")
    assert (through.workload, through.axes, through.completed) == ("offline", {"num_prompts": 6}, 6)
    elapsed = of(through, "e2e_latency", "batch").stated["total"]
    assert of(through, "request_throughput").stated["total"] == pytest.approx(6 / elapsed)
    assert of(through, "total_token_throughput").stated["total"] == pytest.approx(192 / elapsed)


def test_sglang_counts_gaps_by_chunk_or_by_token() -> None:
    run, file = one("sglang-serving-details.jsonl"), said("sglang-serving-details.jsonl")
    assert (run.model, run.failed, run.axes["dataset"], run.axes["request_rate"]) == (None, 0, "random", "8")
    assert of(run, "itl", "per chunk").samples == tuple(gap for gaps in file["itls"] for gap in gaps)
    # 42 tokens came after the first ones, in 15 chunks with whole characters
    assert len(of(run, "itl").samples) == 15
    assert of(run, "ttft").stated["median"] == pytest.approx(float(np.median(file["ttfts"])))
    assert of(run, "tpot").samples == ()
    assert of(run, "total_token_throughput").stated["total"] == file["total_throughput"]

    def native(values: dict[str, Any]) -> None:
        values["backend"] = "sglang"
        values["server_info"] = {"model_path": "/somebody/models/Qwen2.5-7B/", "tp_size": 4, "version": "0.5.23"}

    (own,) = importing.parse(edited("sglang-serving-details.jsonl", native), "x.jsonl")
    assert of(own, "itl").definition == "per token"
    assert (own.model, own.engine, own.axes["tensor_parallel"]) == ("Qwen2.5-7B", "sglang", 4)
    assert own.settings["server.version"] == "0.5.23"


def test_sglang_without_details_does_not_say_how_many_failed() -> None:
    run = one("sglang-serving.jsonl")
    # a bare Infinity in the file
    assert run.axes["request_rate"] == "inf"
    assert run.failed is None
    assert "num_prompts" not in run.axes
    assert not any(measure.samples for measure in run.measures)


def test_the_document_s_log_has_the_published_numbers() -> None:
    numbers = published.load(small_runs.REPOSITORY / "recipes" / "published" / "sglang-one-batch.toml")
    expected = {
        (point.at["batch"], point.at["input_len"], point.at["output_len"], point.metric): point.value
        for point in numbers.points()
        if point.path == "benchmark.log"
    }
    found = {
        (run.axes["batch"], run.axes["input_len"], run.axes["output_len"], measure.metric): value
        for run in importing.read(DATA / "sglang-one-batch.log")
        for measure in run.measures
        for value in measure.stated.values()
    }
    assert found == expected
    assert len(found) == 20


def test_the_log_s_objects_read_the_same_as_lines() -> None:
    runs = importing.read(DATA / "sglang-one-batch.log")
    text = (DATA / "sglang-one-batch.log").read_text(encoding="utf-8").partition("\n")[2]
    objects = [json.loads(part + "}") for part in text.split("}")[:-1]]
    lines = "".join(json.dumps(values) + "\n" for values in objects).encode()
    again = importing.parse(lines, "sglang-one-batch.log")
    assert [run.measures for run in again] == [run.measures for run in runs]
    assert of(runs[1], "e2e_latency").definition == "sum of phases"
    assert runs[0].measure("decode_latency") is None


def test_sglang_offline() -> None:
    run = one("sglang-offline.jsonl")
    assert run.axes == {"num_prompts": 10, "input_len": 256, "output_len": 128}
    assert of(run, "e2e_latency", "batch").stated == {"total": 4.0}
    assert of(run, "output_throughput").stated == {"total": 320.0}


def test_three_files_of_one_run_of_aiperf_agree() -> None:
    export, table, records = (one(f"aiperf-{name}") for name in ("export.json", "export.csv", "records.jsonl"))
    assert (export.tool_version, export.model) == ("0.13.0", "tiny-bytes")
    assert (export.axes["max_concurrency"], export.axes["request_rate"]) == (2, "inf")
    for run in (export, table, records):
        assert (run.completed, run.failed, run.prompt_tokens, run.completion_tokens) == (6, 0, 144, 48)
        assert (run.axes["num_prompts"], run.axes["input_len"], run.axes["output_len"]) == (6, 24, 8)
    for metric in ("ttft", "tpot", "itl", "e2e_latency"):
        measure = of(export, metric)
        assert np.median(of(records, metric).samples) == pytest.approx(measure.stated["median"])
        assert of(table, metric).stated["median"] == pytest.approx(measure.stated["median"], abs=5.1e-6)
        assert {m.definition for m in (measure, of(table, metric), of(records, metric))} == {measure.definition}
    for metric in ("duration", "request_throughput", "goodput"):
        assert of(table, metric).stated["total"] == pytest.approx(of(export, metric).stated["total"], rel=0.01)


def test_aiperf_counts_tokens_of_its_own_where_nobody_told_it_otherwise() -> None:
    export = one("aiperf-export.json")
    assert {m.metric for m in export.measures if m.definition == "retokenized"} == {
        "tpot",
        "output_throughput",
        "total_token_throughput",
    }
    assert [note for note in export.notes if "counts 94 output tokens and the server 48" in note]

    def counted_by_the_server(file: dict[str, Any]) -> None:
        file["total_osl"]["avg"] = file["total_usage_completion_tokens"]["avg"]

    (told,) = importing.parse(edited("aiperf-export.json", counted_by_the_server), "x")
    assert {m.definition for m in told.measures if m.metric in ("tpot", "output_throughput")} == {
        "after first token",
        "of the load",
    }


def test_guidellm_says_two_kinds_of_time_per_token() -> None:
    run = one("guidellm.json")
    file = json.loads((DATA / "guidellm.json").read_text(encoding="utf-8"))["benchmarks"][0]
    requests = file["requests"]["successful"]
    assert (run.tool_version, run.model, run.axes["max_concurrency"]) == ("0.8.1", "tiny-bytes", 2)
    assert of(run, "tpot", "after first token").samples == pytest.approx(
        tuple(request["inter_token_latency_ms"] / 1e3 for request in requests)
    )
    # the wait for the first token is in the other one
    assert of(run, "tpot", "all tokens").samples == pytest.approx(
        tuple((request["time_to_first_token_ms"] + 7 * request["inter_token_latency_ms"]) / 8e3 for request in requests)
    )
    assert of(run, "e2e_latency").samples == tuple(request["request_latency"] for request in requests)
    assert of(run, "duration", "window").stated == {"total": file["duration"]}
    mean = file["metrics"]["requests_per_second"]["successful"]["mean"]
    assert of(run, "request_throughput", "rate over time").stated == {"total": mean}


def test_sampled_requests_of_guidellm_are_no_samples() -> None:
    def sampled(file: dict[str, Any]) -> None:
        del file["benchmarks"][0]["requests"]["successful"][3:]

    (run,) = importing.parse(edited("guidellm.json", sampled), "x.json")
    assert not any(measure.samples for measure in run.measures)
    # the lower of the two middle ones: its percentiles do not interpolate
    middle = sorted(of(one("guidellm.json"), "ttft").samples)[2]
    assert of(run, "ttft").stated["median"] == pytest.approx(middle)
    # its statistics of those weigh requests by their tokens
    assert run.measure("tpot") is None
    assert [note for note in run.notes if "3 of 6 requests" in note]
