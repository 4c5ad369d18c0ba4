"""Workloads of batches and loads: the least work of each, what a recipe may ask, what a plan knows before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fake_engine_run import FACTS
from smbench import plan, recipe
from smbench.errors import UsageError
from smbench.plan import Here, Plan
from smbench.recipe import Recipe
from smbench.result import Work
from smbench.stacks import Stacks
from smbench.workloads import WORKLOADS, ModelFacts, gpus_of, measures_of, work_of

TINY: ModelFacts = FACTS["synthetic:tiny"]
BATCH: Mapping[str, Any] = {"dtype": "bfloat16", "batch": 8, "input_len": 100, "output_len": 11}
LOAD: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "dataset": "random",
    "num_prompts": 8,
    "input_len": 100,
    "output_len": 11,
}

TEXT = """
format = 1
name = "batches"
title = "batches"
document = "004"
protocol_version = 1
kind = "engine"
stack = "vllm"
seed = 0
template = "gptq.md.j2"
baseline = "fake"
headline = "e2e_latency"

[providers.fake]
title = "fake"
color = "#1f77b4"
selection = "library"
engine = "fake"

[profile.full]
device = "cuda"
providers = ["fake"]
time_limit_s = 60.0
engine = { max_model_len = 2048, max_num_seqs = 8, memory_fraction = 0.9 }
estimate = { startup_s = 1.0, cell_s = 1.0, source = "made up" }

[[profile.full.measure]]
name = "e2e_latency"
title = "the whole batch"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 2
window_s = 1.0

[[profile.full.measure]]
name = "decode_latency"
title = "a step"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 2
window_s = 1.0

[[profile.full.grid]]
ops = ["static_batch"]
[profile.full.grid.axes]
model = ["synthetic:tiny"]
dtype = ["bfloat16"]
batch = [1, 8]
input_len = [128]
output_len = [1, 16]
tensor_parallel = [1, 2]
graphs = ["default"]

[[profile.full.grid]]
ops = ["offline"]
[profile.full.grid.axes]
model = ["synthetic:tiny"]
dtype = ["bfloat16"]
dataset = ["random", "sharegpt"]
num_prompts = [16]
input_len = [128]
output_len = [16]
tensor_parallel = [1]
graphs = ["default"]
"""


def edited(old: str = "", new: str = "") -> Recipe:
    assert old in TEXT
    return recipe.parse(TEXT.replace(old, new, 1).encode(), "batches.toml")


class Everything(Stacks):
    def missing(self, stack: str, packages: Any) -> list[str]:
        return []


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("SMBENCH_CACHE", str(tmp_path))

    def make(gpus: int = 1, sharegpt: Path | None = None, memory_bytes: int = 141 * 10**9) -> Plan:
        here = Here("NVIDIA H200", "sm90", memory_bytes, Everything(()), gpus)
        return plan.make(edited(), TEXT.encode(), "full", here, sharegpt=sharegpt)

    return make


# --------------------------------------------------------------------------------------------------------- work


def test_a_batch_reads_weights_once_a_step_and_computes_for_every_prompt() -> None:
    found = work_of(TINY, BATCH, "static_batch")
    one = work_of(TINY, {**BATCH, "batch": 1}, "static_batch")
    weights = TINY.weight_bytes("bfloat16") + TINY.head_bytes("bfloat16")
    kv = TINY.kv_token_bytes("bfloat16")
    assert found["prefill_latency"].bytes == weights + 8 * 100 * kv
    # the middle of ten steps: five tokens more than the prompt
    assert found["decode_latency"].bytes == weights + 8 * 105 * kv
    for measure in ("prefill_latency", "decode_latency"):
        assert found[measure].flops == 8 * one[measure].flops
    prefill, step = found["prefill_latency"], found["decode_latency"]
    assert found["e2e_latency"] == Work(bytes=prefill.bytes + 10 * step.bytes, flops=prefill.flops + 10 * step.flops)


def test_a_batch_of_one_is_a_request_in_one_piece() -> None:
    one = work_of(TINY, {**BATCH, "batch": 1}, "static_batch")
    request = work_of(TINY, {**BATCH, "chunk_tokens": 100}, "generate")
    assert (one["prefill_latency"], one["decode_latency"], one["e2e_latency"]) == (
        request["ttft"],
        request["tpot"],
        request["e2e_latency"],
    )


def test_no_engine_needs_to_compute_a_shared_prefix_twice_or_a_file_s_longest_prompt() -> None:
    random = work_of(TINY, LOAD, "offline")["e2e_latency"]
    assert random == work_of(TINY, BATCH, "static_batch")["e2e_latency"]
    shared = work_of(TINY, {**LOAD, "dataset": "shared-prefix"}, "offline")["e2e_latency"]
    # two groups of four: six of eight prompts need not have their first half
    fewer = work_of(TINY, {**LOAD, "input_len": 100 - 50 * 6 // 8}, "offline")["e2e_latency"]
    assert shared == fewer
    assert work_of(TINY, {**LOAD, "dataset": "sharegpt"}, "offline") == work_of(
        TINY, {**LOAD, "input_len": 4}, "offline"
    )


def test_what_a_client_sees_between_tokens_has_no_bound() -> None:
    axes = {**LOAD, "request_rate": "inf", "max_concurrency": 0}
    found = work_of(TINY, axes, "online")
    assert found.keys() == {"ttft", "e2e_latency", "duration"}
    assert found["duration"] == work_of(TINY, LOAD, "offline")["e2e_latency"]


# -------------------------------------------------------------------------------------------------------- recipe


def test_measures_are_those_of_the_workload() -> None:
    assert measures_of("static_batch", BATCH) == ("prefill_latency", "decode_latency", "e2e_latency")
    assert measures_of("static_batch", {**BATCH, "output_len": 1}) == ("prefill_latency", "e2e_latency")
    assert measures_of("offline", LOAD) == ("e2e_latency",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'name = "decode_latency"',
            'name = "ttft"',
            "profile.full.measure: unknown measure of static_batch, offline 'ttft'; "
            "known: prefill_latency, decode_latency, e2e_latency",
        ),
        ("batch = [1, 8]", "batch = [1, 9]", "grid[0].axes.batch: 9 exceeds engine.max_num_seqs (8)"),
        ("batch = [1, 8]", "batch = [0]", "grid[0].axes.batch: batch = 0 is no integer of at least 1"),
        ("tensor_parallel = [1, 2]\n", "", "grid[0].axes: 'tensor_parallel' is missing; axes of static_batch: model,"),
        ('"sharegpt"]', '"c4"]', "dataset = 'c4' is none of random, shared-prefix, sharegpt"),
    ],
)
def test_what_a_workload_does_not_take_is_named(old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        edited(old, new)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "fine"), [("inf", True), ("4", True), ("0.5", True), ("0", False), ("-1", False), ("fast", False)]
)
def test_a_request_rate_is_inf_or_a_decimal(value: str, fine: bool) -> None:
    fault = WORKLOADS["online"]["request_rate"].fault("request_rate", value)
    assert fault is None if fine else "inf, or requests per second" in str(fault)
    assert WORKLOADS["online"]["max_concurrency"].fault("max_concurrency", 0) is None


# ---------------------------------------------------------------------------------------------------------- plan


def test_more_gpus_than_there_are_is_for_another_machine(planned: Any) -> None:
    entries = planned().entries
    skipped = [entry for entry in entries if entry.skipped and gpus_of(entry.cell.axes) == 2]
    assert len(skipped) == 4 and not any(entry.runs for entry in skipped)
    assert {entry.skipped for entry in skipped} == {
        "tensor_parallel = 2 needs as many GPUs, and this machine has 1 GPU; the same command on one that has them "
        "completes this folder"
    }
    assert all(entry.runs for entry in planned(gpus=2).entries if entry.cell.subject == "static_batch")


def test_sharegpt_is_skipped_without_the_user_s_file_and_read_with_it(planned: Any, tmp_path: Path) -> None:
    (entry,) = (entry for entry in planned().entries if entry.cell.axes.get("dataset") == "sharegpt")
    assert entry.skipped == (
        "dataset sharegpt is your own file, and nothing is downloaded: give it with SHAREGPT=FILE "
        "(smbench: --sharegpt FILE)"
    )
    file = tmp_path / "conversations.json"
    file.write_text("[]")
    (entry,) = (e for e in planned(sharegpt=file).entries if e.cell.axes.get("dataset") == "sharegpt")
    assert entry.runs and entry.job.request["sharegpt"] == str(file)
    with pytest.raises(UsageError, match=r"missing\.json: does not exist; SHAREGPT=FILE"):
        planned(sharegpt=tmp_path / "missing.json")


def test_jobs_say_what_a_cell_measures_and_its_least_work(planned: Any) -> None:
    jobs = {entry.cell.cell_id: entry.job.request for entry in planned().entries}
    for entry in planned().entries:
        axes, request = entry.cell.axes, jobs[entry.cell.cell_id]
        known = [name for name in ("e2e_latency", "decode_latency") if name in measures_of(entry.cell.subject, axes)]
        assert request["measures"] == known
        assert set(known) <= request["work"].keys()


def test_gpus_share_what_must_fit_and_a_batch_needs_its_own_cache(planned: Any) -> None:
    # of the batch of eight: 8 x 144 tokens of cache and 1024 tokens of activations
    entries = planned(gpus=2, memory_bytes=11 * 10**6).entries
    found = {
        (entry.cell.axes["batch"], gpus_of(entry.cell.axes)): entry.unsupported
        for entry in entries
        if entry.cell.subject == "static_batch" and entry.cell.axes["output_len"] == 16
    }
    assert found[8, 1] is not None and "KV cache of 1152 tokens" in found[8, 1]
    assert found[8, 2] is None and found[1, 1] is None
