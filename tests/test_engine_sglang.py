"""The driver of sglang, against a recording of its interface: what it is told, and what is read from its answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_setups import LIMITS, setup
from smbench.worker.engines import Completion, Setup, UnsupportedByEngine
from smbench.worker.engines import sglang as sglang_driver


@dataclasses.dataclass
class RecordedServerArgs:
    """Those fields of sglang's ServerArgs that the driver knows of, as in 0.5.16 and 0.5.23."""

    model_path: str = ""
    skip_tokenizer_init: bool = False
    device: str | None = None
    dtype: str = "auto"
    random_seed: int | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    chunked_prefill_size: int | None = None
    disable_radix_cache: bool = False
    grammar_backend: str | None = None
    log_level: str = "info"
    enable_metrics: bool = False
    page_size: int | None = None
    disable_overlap_schedule: bool = False
    quantization: str | None = None
    attention_backend: str | None = None
    sampling_backend: str | None = None
    disable_cuda_graph: bool = False
    cuda_graph_backend_decode: str | None = None
    cuda_graph_backend_prefill: str | None = None
    cuda_graph_bs_decode: list[int] | None = None
    cuda_graph_bs_prefill: list[int] | None = None
    max_prefill_tokens: int | None = None
    stream_interval: int = 1
    tp_size: int = 1


class RecordedEngine:
    """Answers with what sglang 0.5.23 returns for one request of token ids without a tokenizer."""

    def __init__(self, **arguments: Any) -> None:
        RecordedServerArgs(**arguments)
        self.arguments = arguments
        self.asked: list[dict[str, Any]] = []
        self.changes: dict[str, Any] = {}

    def generate(self, **asked: Any) -> Any:
        self.asked.append(asked)
        if isinstance(asked["input_ids"][0], list):
            return (
                self._stream(asked) if asked.get("stream") else [self._answer(asked, ids) for ids in asked["input_ids"]]
            )
        return self._answer(asked, asked["input_ids"])

    def _stream(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every prompt's tokens one at a time, the prompts in turn: all ids so far, in a list that grows in place."""
        whole = [self._answer(asked, ids) for ids in asked["input_ids"]]
        grown: list[list[int]] = [[] for _ in whole]
        for count in range(1, asked["sampling_params"]["max_new_tokens"] + 1):
            for index, answer in enumerate(whole):
                grown[index].append(answer["output_ids"][count - 1])
                meta = {**answer["meta_info"], "completion_tokens": count}
                yield {"index": index, "output_ids": grown[index], "meta_info": meta}

    def start_profile(self, **asked: Any) -> None:
        self.asked.append({"start_profile": asked})

    def stop_profile(self) -> None:
        self.asked.append({"stop_profile": True})

    def _answer(self, asked: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        count = asked["sampling_params"]["max_new_tokens"]
        meta: dict[str, Any] = {
            "id": "0",
            "finish_reason": {"type": "length", "length": count},
            "prompt_tokens": len(ids),
            "completion_tokens": count,
            "cached_tokens": 0,
            "e2e_latency": 1.5,
            "request_received_ts": 1000.0,
            "prefill_finished_time": 1001.25,
        }
        if asked.get("return_logprob"):
            meta["output_token_logprobs"] = [(-0.5, 7 + i, None) for i in range(count)]
            meta["output_top_logprobs"] = [[(-0.25, 3, None), (-0.5, 7 + i, None)] for i in range(count)]
        return {"output_ids": [7 + i for i in range(count)], "meta_info": {**meta, **self.changes}}

    def get_server_info(self) -> dict[str, Any]:
        usage = {"weight": 18.25, "kvcache": 2.5, "token_capacity": 9216, "graph": {}}
        return {
            **self.arguments,
            "attention_backend": "fa3",
            "kv_cache_dtype": "auto",
            "launch_command": "Engine(model_path='/home/somebody/model')",
            "internal_states": [{"memory_usage": usage}],
            "version": "0.5.23",
        }

    def shutdown(self) -> None:
        self.asked.append({"shutdown": True})


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    contents: Mapping[str, Mapping[str, Any]] = {
        "sglang": {},
        "sglang.version": {"__version__": "0.5.23"},
        "sglang.srt": {},
        "sglang.srt.entrypoints": {},
        "sglang.srt.entrypoints.engine": {"Engine": RecordedEngine},
        "sglang.srt.server_args": {"ServerArgs": RecordedServerArgs},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


MARLIN: Mapping[str, int | str | bool] = {"linear_kernel": "marlin"}


def started(**changes: Any) -> tuple[sglang_driver.Sglang, RecordedEngine]:
    engine = sglang_driver.start(setup(settings=MARLIN, **changes))
    recorded = engine._engine
    assert isinstance(recorded, RecordedEngine)
    return engine, recorded


def test_a_cell_in_the_words_of_sglang(sglang: None) -> None:
    assert sglang_driver.arguments_of(setup(settings=MARLIN, attention="flashinfer", graphs="eager")) == {
        "model_path": "model",
        "skip_tokenizer_init": True,
        "device": "cuda",
        "dtype": "float16",
        "random_seed": 3,
        "context_length": 9000,
        "max_running_requests": 4,
        "mem_fraction_static": 0.9,
        "chunked_prefill_size": 256,
        "disable_radix_cache": True,
        "grammar_backend": "none",
        "log_level": "info",
        "enable_metrics": True,
        "quantization": "gptq_marlin",
        "attention_backend": "flashinfer",
        "disable_cuda_graph": True,
    }


def test_whole_prompts_and_full_graphs_of_sglang(sglang: None) -> None:
    assert sglang_driver.arguments_of(setup(scheduling="whole"))["chunked_prefill_size"] == -1
    full = sglang_driver.arguments_of(setup(graphs="full"))
    assert (full["cuda_graph_backend_decode"], full["cuda_graph_bs_decode"]) == ("full", [1])
    assert (full["cuda_graph_backend_prefill"], full["cuda_graph_bs_prefill"]) == ("full", [64, 256])


def test_the_cache_of_sglang_is_given_in_tokens(sglang: None, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    limits = dataclasses.replace(LIMITS, kv_cache_bytes=1 << 20)
    # keys and values x 2 layers x 2 heads x 64 numbers x 2 bytes
    assert sglang_driver.arguments_of(setup(tmp_path, limits=limits))["max_total_tokens"] == (1 << 20) // 1024


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduling": "v0-default"}, "the scheduler of vLLM 0.6 is not in sglang"),
        ({"settings": {"linear_kernel": "exllama"}}, "sglang 0.5.23 has no GPTQ kernel 'exllama'; known: marlin"),
        ({"settings": {"page_size": 96}}, "chunks of 256 tokens are not whole pages of 96"),
        ({"device": "cpu", "settings": MARLIN}, "sglang has no GPTQ kernel in its package for CPUs"),
    ],
)
def test_what_sglang_does_not_offer_is_said_before_it_starts(
    sglang: None, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedByEngine) as refusal:
        sglang_driver.arguments_of(setup(**changes))
    assert str(refusal.value) == reason


def test_an_answer_of_sglang(sglang: None) -> None:
    engine, recorded = started()
    assert engine.generate([1, 2, 3], 4) == Completion(
        token_ids=[7, 8, 9, 10],
        prompt_tokens=3,
        finish_reason="length",
        cached_tokens=0,
        ttft_s=1.25,
    )
    (asked,) = recorded.asked
    assert asked == {
        "input_ids": [1, 2, 3],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
    }
    assert engine.generate([1], 2, top_logprobs=2).logprobs == [{3: -0.25, 7: -0.5}, {3: -0.25, 8: -0.5}]


def test_the_first_token_by_whichever_clock_sglang_has(sglang: None) -> None:
    engine, recorded = started()
    recorded.changes = {"first_token_latency": 0.75}
    assert engine.generate([1], 2).ttft_s == 0.75
    recorded.changes = {"prefill_finished_time": None}
    assert engine.generate([1], 2).ttft_s is None


def test_a_count_that_sglang_does_not_keep_is_no_answer(sglang: None) -> None:
    engine, recorded = started()
    recorded.changes = {"completion_tokens": 16}
    with pytest.raises(RuntimeError, match="sglang counts 16 generated tokens and returns 4"):
        engine.generate([1], 4)


def test_what_sglang_says_of_itself(sglang: None) -> None:
    engine, recorded = started()
    assert engine.version == "0.5.23"
    assert engine.kernels == {"linear": {"gptq_marlin": 0}, "attention": {"fa3": 0}}
    assert engine.settings["context_length"] == 9000
    assert "somebody" not in json.dumps(engine.settings)
    assert engine.memory() == {
        "weights_bytes": round(18.25 * 2**30),
        "kv_cache_bytes": round(2.5 * 2**30),
        "kv_cache_tokens": 9216,
    }
    engine.close()
    assert recorded.asked == [{"shutdown": True}]


def static(**changes: Any) -> Setup:
    """A batch of four prompts of 128 tokens."""
    given: dict[str, Any] = {"workload": "static_batch", "scheduling": "one-step", "batch": 4, "chunk_tokens": 512}
    return setup(**{**given, **changes})


def test_a_batch_in_the_words_of_sglang(sglang: None) -> None:
    found = sglang_driver.arguments_of(static(tensor_parallel=4))
    wanted = {
        # all prompts in one step, which is over before the next one is planned
        "chunked_prefill_size": 512,
        "max_prefill_tokens": 512,
        "disable_overlap_schedule": True,
        "stream_interval": 1,
        "tp_size": 4,
        "disable_radix_cache": True,
    }
    assert {name: found[name] for name in wanted} == wanted
    graphs = sglang_driver.arguments_of(static(graphs="full"))
    assert (graphs["cuda_graph_backend_decode"], graphs["cuda_graph_bs_decode"]) == ("full", [4])
    assert "cuda_graph_bs_prefill" not in graphs


def test_a_server_of_sglang_schedules_as_it_likes(sglang: None) -> None:
    asked = setup(workload="online", scheduling="default", chunk_tokens=0, prefix_caching=True, settings=MARLIN)
    found = sglang_driver.arguments_of(asked)
    assert not {"chunked_prefill_size", "max_prefill_tokens", "disable_overlap_schedule"} & found.keys()
    assert found["disable_radix_cache"] is False
    served = sglang_driver.serve_command(asked, "127.0.0.1", 4321)
    words = list(served.argv)
    assert words[:3] == [sys.executable, "-m", "sglang.launch_server"]
    wanted = {
        "--host": "127.0.0.1",
        "--port": "4321",
        "--served-model-name": served.model,
        "--model-path": "model",
        "--dtype": "float16",
        "--context-length": "9000",
        "--mem-fraction-static": "0.9",
        "--quantization": "gptq_marlin",
    }
    assert {option: words[words.index(option) + 1] for option in wanted} == wanted
    # what is off is left out, and a server reads text
    assert not {"--disable-radix-cache", "--skip-tokenizer-init"} & set(words)
    assert {"--enable-metrics", "--enable-cache-report"} < set(words)
    graphs = sglang_driver.serve_command(static(graphs="full"), "h", 1).argv
    assert graphs[graphs.index("--cuda-graph-bs-decode") + 1] == "4"


def test_the_steps_of_a_batch_of_sglang_are_those_of_its_stream(sglang: None) -> None:
    engine, recorded = started(**{"workload": "static_batch", "scheduling": "one-step", "batch": 2})
    answer = engine.batch([[1, 2, 3], [4, 5, 6]], 4, stepwise=True)
    assert answer.token_ids == [[7, 8, 9, 10]] * 2
    assert (answer.prompt_tokens, answer.finish_reasons, answer.cached_tokens) == ([3, 3], ["length"] * 2, 0)
    assert (answer.step_clock, len(answer.step_s)) == ("stream", 3)
    assert answer.prefill_s is not None and answer.prefill_s > 0
    # one message for the whole batch
    (asked,) = recorded.asked
    assert (asked["input_ids"], asked["stream"]) == ([[1, 2, 3], [4, 5, 6]], True)


def test_an_offline_batch_of_sglang_is_not_streamed(sglang: None) -> None:
    engine, recorded = started()
    recorded.changes = {"cached_tokens": 2}
    answer = engine.batch([[1, 2, 3], [4, 5]], 4, stepwise=False)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.step_clock) == ([3, 2], 4, "none")
    assert "stream" not in recorded.asked[0]


def test_sglang_profiles_its_own_scheduler(sglang: None, tmp_path: Path) -> None:
    engine, recorded = started()
    with engine.tracer(tmp_path):
        engine.batch([[1]], 2, stepwise=False)
    begun, _, ended = recorded.asked
    assert begun == {"start_profile": {"output_dir": str(tmp_path), "activities": ["CPU", "GPU"]}}
    assert ended == {"stop_profile": True}
