"""Batches in the real engines on a CPU: vLLM step by step and at once, transformers beside it, the same tokens in both.

They run in their stack's Python, where `make stack STACK=vllm` has put them.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from serving_requests import SAMPLES, WARMUP, batch_job, through_the_host
from smbench import stacks
from smbench.result import Result
from smbench.workerprocess import WORKER_MODULE

pytestmark = [pytest.mark.engine("vllm"), pytest.mark.timeout(300)]

PYTHON = str(stacks.here().python("vllm"))
STATIC: dict[str, Any] = {"batch": 3, "input_len": 200, "output_len": 6}
# half of a prompt is a whole block of vLLM's cache
SHARED: dict[str, Any] = {"dataset": "shared-prefix", "num_prompts": 6, "input_len": 256, "output_len": 4}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Results by engine and workload; every cell also traced once."""
    folder = tmp_path_factory.mktemp("models")
    for shape in ("tiny", "tiny-bf16"):
        command = [PYTHON, "-m", "smbench.worker.checkpoint", shape, "--out", str(folder / shape)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    quantized, plain = folder / "tiny", folder / "tiny-bf16"
    jobs = {
        "vllm": {
            "static": batch_job("static_batch", "vllm", quantized, compare=True, **STATIC),
            "plain": batch_job("static_batch", "vllm", plain, dtype="float32", **STATIC),
            "shared": batch_job("offline", "vllm", quantized, prefix_caching=True, **SHARED),
        },
        "transformers": {
            "plain": batch_job("static_batch", "transformers", plain, dtype="float32", **STATIC),
            "offline": batch_job("offline", "transformers", plain, dtype="float32", num_prompts=6),
        },
    }
    found = {}
    for engine, asked in jobs.items():
        place = tmp_path_factory.mktemp(engine)
        said = through_the_host(list(asked.values()), place, 200, [PYTHON, *WORKER_MODULE], "torch")
        found.update({f"{engine} {name}": said.result(job) for name, job in asked.items()})
        for result in found.values():
            trace = result.serving.trace if result.serving else None
            assert trace is None or trace.file is None or trace.kernels, result.cell.label()
        assert sorted(path.suffix for path in (place / "traces").iterdir()) == [".json"] * len(asked)
        for path in (place / "traces").iterdir():
            assert json.loads(path.read_bytes())["traceEvents"]
    return found


def test_every_batch_is_what_was_asked(served: dict[str, Result]) -> None:
    for name, result in served.items():
        assert (result.status, result.reason) == ("ok", None), name
        assert result.serving is not None
        assert len(result.serving.batches) == WARMUP + SAMPLES
        axes = result.cell.axes
        count = int(axes.get("batch", axes.get("num_prompts", 0)))
        for batch in result.serving.batches:
            assert batch.batch == count
            assert batch.prompt_tokens == count * int(axes["input_len"])
            assert batch.completion_tokens == count * int(axes["output_len"])
            assert batch.finish_reasons == {"length": count}


@pytest.mark.parametrize("name", ["vllm static", "vllm plain", "transformers plain"])
def test_a_static_batch_is_one_prefill_and_a_step_for_each_further_token(served: dict[str, Result], name: str) -> None:
    serving = served[name].serving
    assert serving is not None and serving.step_clock == "engine-step"
    for batch in serving.batches:
        assert len(batch.step_s) == 5 and batch.prefill_s is not None
        # 600 tokens take longer than three
        assert batch.prefill_s > min(batch.step_s) > 0
        assert batch.e2e_s == pytest.approx(batch.prefill_s + sum(batch.step_s))
    assert [row.name for row in served[name].measurements] == ["prefill_latency", "decode_latency", "e2e_latency"]


def test_in_float32_both_engines_generate_the_same_tokens(served: dict[str, Result]) -> None:
    ours, theirs = served["vllm plain"].serving, served["transformers plain"].serving
    assert ours is not None and theirs is not None
    assert ours.prompts == theirs.prompts
    assert [batch.output_sha256 for batch in ours.batches] == [batch.output_sha256 for batch in theirs.batches]


def test_quantized_outputs_of_a_batch_are_those_of_the_dequantized_model(served: dict[str, Result]) -> None:
    serving = served["vllm static"].serving
    assert serving is not None and serving.output is not None
    assert serving.output.passed, serving.output.faults
    # the first and the last prompt of a batch
    assert serving.output.tokens == 12
    assert serving.settings["scheduler_config"]["async_scheduling"] is False


def test_a_shared_prefix_is_found_within_a_batch_and_nowhere_else(served: dict[str, Result]) -> None:
    serving = served["vllm shared"].serving
    assert serving is not None and serving.settings["enable_prefix_caching"] is True
    # two groups: four of six prompts find theirs, in a first repetition as in the last
    assert [batch.cached_tokens for batch in serving.batches] == [4 * 128] * (WARMUP + SAMPLES)


def test_a_trace_names_what_took_the_time(served: dict[str, Result]) -> None:
    for name in ("vllm plain", "transformers plain"):
        serving = served[name].serving
        assert serving is not None and serving.trace is not None
        assert serving.trace.note is None
        assert serving.trace.kernels[0].share > 0.1
        assert sum(kernel.device_s for kernel in serving.trace.kernels) < serving.trace.repetition_s
