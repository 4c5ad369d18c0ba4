"""The driver of TensorRT-LLM, against a recording of its LLM API: what it is told, what is read from its answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_setups import LIMITS, setup
from smbench.worker.engines import Setup, UnsupportedByEngine
from smbench.worker.engines import trtllm as trtllm_driver


@dataclasses.dataclass
class RecordedKvCacheConfig:
    """Those fields of KvCacheConfig that the driver knows of, as in the 1.2 line."""

    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float = 0.9
    max_gpu_total_bytes: int = 0


@dataclasses.dataclass
class RecordedCudaGraphConfig:
    """Those fields of CudaGraphConfig that the driver knows of, as in the 1.2 line."""

    batch_sizes: list[int] | None = None
    max_batch_size: int = 0
    enable_padding: bool = False


@dataclasses.dataclass
class RecordedSamplingParams:
    """Those fields of SamplingParams that the driver knows of, as in the 1.2 line."""

    max_tokens: int = 32
    top_k: int | None = None
    ignore_eos: bool = False
    end_id: int | None = None
    pad_id: int | None = None
    detokenize: bool = True
    logprobs: int | None = None


@dataclasses.dataclass
class RecordedArgs:
    """Those fields of TorchLlmArgs that the driver knows of, as in the 1.2 line."""

    model: str
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    enable_chunked_prefill: bool = False
    kv_cache_config: RecordedKvCacheConfig | None = None
    cuda_graph_config: RecordedCudaGraphConfig | None = dataclasses.field(default_factory=RecordedCudaGraphConfig)
    disable_overlap_scheduler: bool = False
    attn_backend: str = "TRTLLM"
    stream_interval: int = 1

    def model_dump(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int


@dataclasses.dataclass
class Choice:
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[Any] = dataclasses.field(default_factory=list)


class RecordedRequest:
    """A result that grows: streamed it yields itself, and its tokens are all those so far."""

    def __init__(self, llm: RecordedLlm, prompt: list[int], sampling: RecordedSamplingParams, streaming: bool) -> None:
        # as in 1.2, whose queues belong to the loop that runs when a request is made
        asyncio.get_running_loop()
        self.prompt_token_ids = prompt
        self.cached_tokens = llm.cached
        self.outputs = [Choice([])]
        self._left = [sum(prompt) + i for i in range(sampling.max_tokens)]
        self._sampling = sampling
        self._streaming = streaming

    def __aiter__(self) -> RecordedRequest:
        assert self._streaming
        return self

    async def __anext__(self) -> RecordedRequest:
        if not self._left:
            raise StopAsyncIteration
        await asyncio.sleep(0.001)
        self._take(1)
        return self

    async def aresult(self) -> RecordedRequest:
        await asyncio.sleep(0.001)
        self._take(len(self._left))
        return self

    def _take(self, count: int) -> None:
        (choice,) = self.outputs
        for token in self._left[:count]:
            choice.token_ids.append(token)
            if self._sampling.logprobs:
                choice.logprobs.append({3: Logprob(-0.25, 1), token: Logprob(-0.5, 2)})
        del self._left[:count]
        choice.finish_reason = None if self._left else "length"


class RecordedLlm:
    def __init__(self, **arguments: Any) -> None:
        self.args = RecordedArgs(**arguments)
        self.asked: list[tuple[list[int], RecordedSamplingParams, bool]] = []
        self.cached, self.ended = 0, False

    def generate_async(
        self, inputs: list[int], sampling_params: RecordedSamplingParams, streaming: bool = False
    ) -> RecordedRequest:
        self.asked.append((inputs, sampling_params, streaming))
        return RecordedRequest(self, inputs, sampling_params, streaming)

    def shutdown(self) -> None:
        self.ended = True


@pytest.fixture
def trtllm(monkeypatch: pytest.MonkeyPatch) -> None:
    contents: Mapping[str, Mapping[str, Any]] = {
        "tensorrt_llm": {"LLM": RecordedLlm, "SamplingParams": RecordedSamplingParams},
        "tensorrt_llm.llmapi": {"KvCacheConfig": RecordedKvCacheConfig, "CudaGraphConfig": RecordedCudaGraphConfig},
        "tensorrt_llm.version": {"__version__": "1.2.0"},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


def static(**changes: Any) -> Setup:
    """A batch of four prompts of 128 tokens."""
    given: dict[str, Any] = {"workload": "static_batch", "scheduling": "one-step", "batch": 4, "chunk_tokens": 512}
    return setup(**{**given, **changes})


def started(**changes: Any) -> tuple[trtllm_driver.TensorRtLlm, RecordedLlm]:
    engine = trtllm_driver.start(static(**changes))
    assert isinstance(engine._llm, RecordedLlm)
    return engine, engine._llm


def test_a_batch_in_the_words_of_tensorrt_llm(trtllm: None) -> None:
    assert trtllm_driver.arguments_of(static(tensor_parallel=2)) == {
        "dtype": "float16",
        "tensor_parallel_size": 2,
        "max_batch_size": 4,
        "max_seq_len": 9000,
        "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.9},
        "stream_interval": 1,
        # a graph of the very batch
        "cuda_graph_config": {"batch_sizes": [4], "enable_padding": False},
        # all prompts in one step, which is over before the next one is planned
        "max_num_tokens": 512,
        "enable_chunked_prefill": False,
        "disable_overlap_scheduler": True,
    }


def test_what_axes_and_limits_add(trtllm: None) -> None:
    limits = dataclasses.replace(LIMITS, kv_cache_bytes=1 << 30)
    found = trtllm_driver.arguments_of(static(limits=limits, tensor_parallel=4, attention="flashinfer", graphs="eager"))
    # of each GPU
    assert found["kv_cache_config"]["max_gpu_total_bytes"] == 1 << 28
    assert (found["attn_backend"], found["cuda_graph_config"]) == ("FLASHINFER", None)
    served = trtllm_driver.arguments_of(static(workload="online", scheduling="default", prefix_caching=True))
    assert not {"max_num_tokens", "disable_overlap_scheduler"} & served.keys()
    assert served["kv_cache_config"]["enable_block_reuse"] is True
    assert served["cuda_graph_config"] == {"enable_padding": True}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "TensorRT-LLM runs on a GPU only"),
        ({"scheduling": "v0-default"}, "TensorRT-LLM has no such scheduler as v0-default"),
        ({"attention": "triton"}, "TensorRT-LLM has no attention backend 'triton'"),
        ({"graphs": "full"}, "TensorRT-LLM captures decode steps alone: graphs = default"),
    ],
)
def test_what_it_does_not_offer_is_said_before_it_starts(trtllm: None, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedByEngine) as refusal:
        trtllm_driver.start(static(**changes))
    assert str(refusal.value) == reason


def test_configurations_are_its_own_classes(trtllm: None) -> None:
    _, llm = started()
    assert llm.args.kv_cache_config == RecordedKvCacheConfig(False, 0.9)
    assert llm.args.cuda_graph_config == RecordedCudaGraphConfig([4])
    assert (llm.args.model, llm.args.skip_tokenizer_init) == ("model", True)
    assert started(graphs="eager")[1].args.cuda_graph_config is None


def test_the_steps_of_a_batch_are_those_of_its_stream(trtllm: None) -> None:
    engine, llm = started()
    answer = engine.batch([[1, 2], [3, 4]], 4, stepwise=True)
    assert answer.token_ids == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert (answer.prompt_tokens, answer.finish_reasons, answer.cached_tokens) == ([2, 2], ["length"] * 2, 0)
    assert (answer.step_clock, len(answer.step_s)) == ("stream", 3)
    assert answer.prefill_s is not None and answer.prefill_s >= 0.001 and sum(answer.step_s) >= 0.002
    sampling = RecordedSamplingParams(4, 1, True, -1, -1, False, None)
    assert llm.asked == [([1, 2], sampling, True), ([3, 4], sampling, True)]


def test_an_offline_batch_is_not_streamed(trtllm: None) -> None:
    engine, llm = started(workload="offline", scheduling="default")
    llm.cached = 16
    answer = engine.batch([[1, 2], [3, 4]], 4, stepwise=False)
    assert answer.token_ids == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert (answer.prefill_s, answer.step_clock, answer.cached_tokens) == (None, "none", 32)
    assert not any(streaming for _, _, streaming in llm.asked)


def test_one_request_with_log_probabilities(trtllm: None) -> None:
    engine, _ = started()
    completion = engine.generate([1, 2], 2, top_logprobs=1)
    assert (completion.token_ids, completion.finish_reason, completion.prompt_tokens) == ([3, 4], "length", 2)
    assert completion.logprobs == [{3: -0.5}, {3: -0.25, 4: -0.5}]
    assert completion.ttft_s is not None and completion.ttft_s >= 0.001
    assert engine.generate([1, 2], 2).logprobs is None


def test_log_probabilities_of_chosen_tokens_alone_are_none(trtllm: None) -> None:
    assert trtllm_driver._logprobs([-0.5, -0.25]) is None


def test_what_it_says_of_itself(trtllm: None) -> None:
    engine, llm = started()
    assert engine.version == "1.2.0"
    assert engine.kernels == {"attention": {"TRTLLM": 0}}
    assert (engine.settings["max_seq_len"], engine.settings["kv_cache_config"]["enable_block_reuse"]) == (9000, False)
    with pytest.raises(UnsupportedByEngine, match="processes of its own"):
        engine.tracer(Path())
    engine.close()
    assert llm.ended


def test_its_server_gets_the_same_in_a_file(trtllm: None) -> None:
    asked = static(folder=Path("/models/tiny"), workload="online", scheduling="default", tensor_parallel=2)
    served = trtllm_driver.serve_command(asked, "127.0.0.1", 4321)
    words = list(served.argv)
    assert words[:5] == [sys.executable, "-m", "tensorrt_llm.commands.serve", "serve", "/models/tiny"]
    wanted = {
        "--host": "127.0.0.1",
        "--port": "4321",
        "--tp_size": "2",
        "--max_seq_len": "9000",
        "--max_batch_size": "4",
    }
    assert {option: words[words.index(option) + 1] for option in wanted} == wanted
    options = json.loads(Path(words[words.index("--extra_llm_api_options") + 1]).read_text(encoding="utf-8"))
    assert options == trtllm_driver.arguments_of(asked)
    assert (served.model, served.version, served.ready) == ("tiny", "1.2.0", "/health")
