"""The real engines on a CPU: vLLM on quantized weights and transformers, checked against the dequantized truth.

They run in their stack's Python, where `make stack STACK=vllm` has put them.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serving_requests import SAMPLES, WARMUP, Answer, job, through_the_host
from smbench import stacks
from smbench.result import Result
from smbench.workerprocess import WORKER_MODULE

pytestmark = [pytest.mark.engine("vllm"), pytest.mark.timeout(400)]

PYTHON = str(stacks.here().python("vllm"))
LONG: dict[str, Any] = {"input_len": 200, "output_len": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    command = [PYTHON, "-m", "smbench.worker.checkpoint", "tiny", "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def answer(jobs: list[dict[str, Any]], folder: Path) -> Answer:
    return through_the_host(jobs, folder, limit_s=200, worker=[PYTHON, *WORKER_MODULE])


def hashes(result: Result) -> list[str]:
    assert result.serving is not None, result.reason
    return [request.output_sha256 for request in result.serving.requests]


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Results by engine, dtype and chunk."""
    vllm = {
        "vllm float16 64": job("vllm", model, compare=True, chunk_tokens=64, **LONG),
        "vllm float16 200": job("vllm", model, compare=True, chunk_tokens=200, **LONG),
        "vllm bfloat16 64": job("vllm", model, compare=True, dtype="bfloat16", chunk_tokens=64, **LONG),
        "vllm float32 64": job("vllm", model, compare=True, dtype="float32", chunk_tokens=64, **LONG),
        "vllm triton": job("vllm", model, attention="triton", **LONG),
    }
    transformers = {
        "transformers float32 64": job("transformers", model, compare=True, dtype="float32", chunk_tokens=64, **LONG),
        "transformers float32 200": job("transformers", model, compare=True, dtype="float32", chunk_tokens=200, **LONG),
    }
    found = {}
    for jobs in (vllm, transformers):
        said = answer(list(jobs.values()), tmp_path_factory.mktemp("run"))
        found.update({name: said.result(asked) for name, asked in jobs.items()})
    return found


MEASURED = [
    "vllm float16 64",
    "vllm float16 200",
    "vllm bfloat16 64",
    "transformers float32 64",
    "transformers float32 200",
]


@pytest.mark.parametrize("name", MEASURED)
def test_a_real_engine_does_what_was_asked(served: dict[str, Result], name: str) -> None:
    result = served[name]
    assert (result.status, result.reason) == ("ok", None)
    assert result.serving is not None
    assert len(result.serving.requests) == WARMUP + SAMPLES
    for request in result.serving.requests:
        assert (request.prompt_tokens, request.completion_tokens, request.finish_reason) == (200, 8, "length")
        assert request.cached_tokens == 0
        assert request.ttft_s is not None and 0 < request.ttft_s < request.e2e_s
    assert [row.name for row in result.measurements] == ["e2e_latency", "ttft", "tpot"]


@pytest.mark.parametrize("name", MEASURED)
def test_its_outputs_are_those_of_the_dequantized_model(served: dict[str, Result], name: str) -> None:
    serving = served[name].serving
    assert serving is not None and serving.output is not None
    assert serving.output.passed, serving.output.faults
    assert serving.output.tokens == 16
    assert serving.output.logprob_error is not None
    if "float32" in name:
        assert serving.output.equal_tokens == 16


def test_kernels_are_those_that_the_model_has(served: dict[str, Result]) -> None:
    vllm, transformers = served["vllm float16 64"].serving, served["transformers float32 64"].serving
    assert vllm is not None and transformers is not None
    # four quantized layers in each of four blocks, three of them fused
    assert vllm.kernels["linear"] == {"CPUWNA16LinearKernel": 16}
    assert vllm.kernels["attention"] == {"CPU_ATTN": 4}
    assert transformers.kernels["linear"] == {"torch Linear": 28}


def test_settings_are_those_that_were_asked(served: dict[str, Result]) -> None:
    for chunk in (64, 200):
        serving = served[f"vllm float16 {chunk}"].serving
        assert serving is not None
        settings = serving.settings
        assert settings["max_num_batched_tokens"] == chunk
        assert (settings["enable_prefix_caching"], settings["enable_chunked_prefill"]) == (False, True)
        assert (settings["dtype"], settings["max_model_len"], settings["max_num_seqs"]) == ("float16", 2048, 4)
        assert serving.memory["kv_cache_tokens"] * 2 * 4 * 2 * 64 * 2 <= 64 << 20
        assert str(Path.home()) not in json.dumps(settings)


def test_in_float32_neither_chunks_nor_the_cache_change_a_token(served: dict[str, Result]) -> None:
    assert hashes(served["transformers float32 64"]) == hashes(served["transformers float32 200"])


def test_what_vllm_has_not_is_unsupported(served: dict[str, Result]) -> None:
    assert [served[name].status for name in ("vllm float32 64", "vllm triton")] == ["unsupported", "unsupported"]
    assert "torch.float32 is not supported for quantization method auto_gptq" in (
        served["vllm float32 64"].reason or ""
    )


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = Path(__file__).with_name("mutants.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, str(program), str(tmp_path_factory.mktemp("mutants"))],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_right_weights_pass(examined: dict[str, Any]) -> None:
    assert examined["right"]["passed"], examined["right"]["faults"]


@pytest.mark.parametrize("name", ["scales", "nibbles", "zeros", "truncated"])
def test_one_wrong_layer_or_a_truncated_prompt_is_noticed(examined: dict[str, Any], name: str) -> None:
    assert not examined[name]["passed"]
    assert examined[name]["logprob_error"] > 2 * examined[name]["logprob_bound"]
