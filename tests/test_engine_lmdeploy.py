"""The driver of lmdeploy, against a recording of its interface: what it is told, and what is read from its answers."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_setups import LIMITS, setup
from smbench.worker.engines import Setup, UnsupportedByEngine
from smbench.worker.engines import lmdeploy as lmdeploy_driver


@dataclasses.dataclass
class RecordedTurbomindConfig:
    """Those fields of TurbomindEngineConfig that the driver knows of, as in 0.18.0."""

    dtype: str = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = False
    max_prefill_token_num: int = 8192
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    enable_metrics: bool = True


@dataclasses.dataclass
class RecordedPytorchConfig:
    """Those fields of PytorchEngineConfig that the driver knows of, as in 0.18.0."""

    dtype: str = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    block_size: int = 64
    num_gpu_blocks: int = 0
    enable_prefix_caching: bool = False
    max_prefill_token_num: int = 8192
    cudagraph_capture_batch_sizes: list[int] | None = None
    eager_mode: bool = False
    enable_metrics: bool = True
    logprobs_mode: str | None = None


@dataclasses.dataclass
class RecordedGenerationConfig:
    """Those fields of GenerationConfig that the driver knows of, as in 0.18.0."""

    max_new_tokens: int = 512
    do_sample: bool = False
    top_k: int = 50
    temperature: float = 0.8
    ignore_eos: bool = False
    logprobs: int | None = None


class ResponseType(enum.Enum):
    SUCCESS = enum.auto()
    FINISH = enum.auto()
    INTERNAL_ENGINE_ERROR = enum.auto()


@dataclasses.dataclass
class Metrics:
    cached_tokens: int


@dataclasses.dataclass
class Output:
    """EngineOutput: the tokens that are new."""

    status: ResponseType
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None
    req_metrics: Metrics | None = None


class RecordedInstance:
    """Streams one token at a time, then ends with none, as 0.18.0 does."""

    def __init__(self, engine: RecordedEngine) -> None:
        self._engine = engine

    async def async_stream_infer(
        self, session_id: int, input_ids: list[int], gen_config: RecordedGenerationConfig, stream_output: bool
    ) -> AsyncIterator[Output]:
        asked = {"session": session_id, "prompt": input_ids, "config": gen_config, "stream": stream_output}
        self._engine.asked.append(asked)
        count = gen_config.max_new_tokens
        tokens = [sum(input_ids) + i for i in range(count)]
        metrics = Metrics(self._engine.cached)
        chunk = self._engine.chunk if stream_output else count
        for first in range(0, count, chunk):
            await asyncio.sleep(0.001)
            some = tokens[first : first + chunk]
            logprobs = [{token: -0.5, 3: -0.25} for token in some] if gen_config.logprobs else None
            if self._engine.fails:
                yield Output(ResponseType.INTERNAL_ENGINE_ERROR, [])
                return
            yield Output(ResponseType.SUCCESS, some, logprobs, metrics)
        yield Output(ResponseType.FINISH, [], None, metrics)


class RecordedEngine:
    """TurboMind and the PyTorch engine alike, but for `start_loop`, which only the latter has."""

    def __init__(self, path: str, config: Any) -> None:
        self.path = path
        self.engine_config = config
        self.asked: list[dict[str, Any]] = []
        self.chunk, self.cached, self.fails, self.closed, self.instances = 1, 0, False, False, 0

    @classmethod
    def from_pretrained(cls, path: str, engine_config: Any) -> RecordedEngine:
        return cls(path, engine_config)

    def create_instance(self) -> RecordedInstance:
        self.instances += 1
        return RecordedInstance(self)

    def close(self) -> None:
        self.closed = True


class RecordedPytorchEngine(RecordedEngine):
    loop: asyncio.AbstractEventLoop | None = None

    def start_loop(self) -> None:
        # it belongs to the loop that runs it
        self.loop = asyncio.get_running_loop()


@pytest.fixture
def lmdeploy(monkeypatch: pytest.MonkeyPatch) -> None:
    contents: Mapping[str, Mapping[str, Any]] = {
        "lmdeploy.messages": {
            "TurbomindEngineConfig": RecordedTurbomindConfig,
            "PytorchEngineConfig": RecordedPytorchConfig,
            "GenerationConfig": RecordedGenerationConfig,
        },
        "lmdeploy.turbomind": {"TurboMind": RecordedEngine},
        "lmdeploy.pytorch": {},
        "lmdeploy.pytorch.engine": {"Engine": RecordedPytorchEngine},
        "lmdeploy.version": {"__version__": "0.18.0"},
    }
    package = ModuleType("lmdeploy")
    monkeypatch.setitem(sys.modules, "lmdeploy", package)
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
        package.__dict__[name.rpartition(".")[2]] = module


PYTORCH: Mapping[str, int | str | bool] = {"backend": "pytorch"}


def static(folder: Path = Path("model"), **changes: Any) -> Setup:
    """A batch of four prompts of 128 tokens."""
    given: dict[str, Any] = {"workload": "static_batch", "scheduling": "one-step", "batch": 4, "chunk_tokens": 512}
    return setup(folder, **{**given, **changes})


@pytest.fixture
def started(lmdeploy: None) -> Iterator[tuple[lmdeploy_driver.Lmdeploy, RecordedEngine]]:
    engine = lmdeploy_driver.start(static())
    recorded = engine._engine
    assert isinstance(recorded, RecordedEngine)
    yield engine, recorded
    engine.close()
    assert recorded.closed


def test_a_batch_in_the_words_of_turbomind(lmdeploy: None) -> None:
    assert lmdeploy_driver.fields_of(static(tensor_parallel=2, prefix_caching=True)) == {
        "dtype": "float16",
        "tp": 2,
        "session_len": 9000,
        "max_batch_size": 4,
        "cache_max_entry_count": 0.9,
        "cache_block_seq_len": 64,
        "enable_prefix_caching": True,
        "enable_metrics": True,
        # all prompts in one step
        "max_prefill_token_num": 512,
    }


def test_a_batch_in_the_words_of_the_pytorch_engine(lmdeploy: None) -> None:
    fields = lmdeploy_driver.fields_of(static(settings=PYTORCH))
    assert (fields["block_size"], fields["eager_mode"], fields["cudagraph_capture_batch_sizes"]) == (64, False, [4])
    assert RecordedPytorchConfig(**fields).max_prefill_token_num == 512
    assert lmdeploy_driver.fields_of(static(settings=PYTORCH, graphs="eager"))["eager_mode"] is True


def test_a_server_schedules_as_it_likes(lmdeploy: None) -> None:
    fields = lmdeploy_driver.fields_of(setup(workload="online", scheduling="default", chunk_tokens=0))
    assert not {"max_prefill_token_num", "num_tokens_per_iter"} & fields.keys()


@pytest.mark.parametrize(("settings", "field"), [({}, "cache_max_entry_count"), (PYTORCH, "num_gpu_blocks")])
def test_the_cache_is_given_in_blocks(lmdeploy: None, tmp_path: Path, settings: Any, field: str) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    limits = dataclasses.replace(LIMITS, kv_cache_bytes=1 << 20)
    # keys and values x 2 layers x 2 heads x 64 numbers x 2 bytes x 64 tokens
    assert lmdeploy_driver.fields_of(static(tmp_path, limits=limits, settings=settings))[field] == (1 << 20) // 65536


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "lmdeploy runs on a GPU only"),
        ({"scheduling": "whole"}, "lmdeploy has no such scheduler as whole"),
        ({"attention": "flashinfer"}, "lmdeploy chooses its attention itself, not 'flashinfer'"),
        ({"graphs": "eager"}, "TurboMind decides itself what it captures, not graphs = 'eager'"),
        (
            {"graphs": "full", "settings": PYTORCH},
            "lmdeploy's PyTorch engine captures decode steps alone: graphs = default",
        ),
        ({"settings": {"backend": "torch"}}, "lmdeploy has no engine 'torch'; known: turbomind, pytorch"),
    ],
)
def test_what_lmdeploy_does_not_offer_is_said_before_it_starts(
    lmdeploy: None, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedByEngine) as refusal:
        lmdeploy_driver.start(static(**changes))
    assert str(refusal.value) == reason


def test_the_steps_of_a_batch_are_those_of_its_stream(started: Any) -> None:
    engine, recorded = started
    answer = engine.batch([[1, 2], [3, 4], [5, 6]], 4, stepwise=True)
    assert answer.token_ids == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
    assert (answer.prompt_tokens, answer.finish_reasons) == ([2, 2, 2], ["length"] * 3)
    assert (answer.step_clock, len(answer.step_s), answer.cached_tokens) == ("stream", 3, 0)
    # each token takes a millisecond
    assert answer.prefill_s >= 0.001 and min(answer.step_s) >= 0
    assert sum(answer.step_s) >= 0.002
    assert len({asked["session"] for asked in recorded.asked}) == 3
    config = recorded.asked[0]["config"]
    assert config == RecordedGenerationConfig(4, False, 1, 1.0, True, None)


def test_instances_are_made_once(started: Any) -> None:
    engine, recorded = started
    engine.batch([[1]] * 3, 2, stepwise=True)
    engine.batch([[1]] * 3, 2, stepwise=True)
    assert recorded.instances == 3


def test_tokens_that_come_together_are_no_steps(started: Any, capfd: pytest.CaptureFixture[str]) -> None:
    engine, recorded = started
    recorded.chunk = 2
    answer = engine.batch([[1, 2], [3, 4]], 4, stepwise=True)
    assert [len(tokens) for tokens in answer.token_ids] == [4, 4]
    assert (answer.prefill_s, answer.step_s, answer.step_clock) == (None, (), "none")
    assert "4 of 8 tokens came together with others" in capfd.readouterr().err


def test_an_offline_batch_is_not_streamed(started: Any) -> None:
    engine, recorded = started
    recorded.cached = 1
    answer = engine.batch([[1, 2], [3, 4]], 4, stepwise=False)
    assert answer.token_ids == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert (answer.step_clock, answer.cached_tokens) == ("none", 2)
    assert not any(asked["stream"] for asked in recorded.asked)


def test_one_request_with_log_probabilities(started: Any) -> None:
    engine, _ = started
    completion = engine.generate([1, 2], 2, top_logprobs=1)
    assert (completion.token_ids, completion.finish_reason) == ([3, 4], "length")
    assert completion.logprobs == [{3: -0.25}, {4: -0.5, 3: -0.25}]
    assert completion.ttft_s > 0


def test_a_request_that_lmdeploy_gives_up_is_an_error(started: Any) -> None:
    engine, recorded = started
    recorded.fails = True
    with pytest.raises(RuntimeError, match="lmdeploy ended a request with INTERNAL_ENGINE_ERROR"):
        engine.batch([[1, 2]], 4, stepwise=True)


def test_the_pytorch_engine_is_started_on_the_loop_of_its_requests(lmdeploy: None) -> None:
    engine = lmdeploy_driver.start(static(settings=PYTORCH))
    recorded = engine._engine
    assert isinstance(recorded, RecordedPytorchEngine)
    assert recorded.loop is engine._loop
    recorded.engine_config.num_gpu_blocks = 100
    assert engine.memory() == {"kv_cache_tokens": 6400}
    engine.close()


def test_what_lmdeploy_says_of_itself(started: Any) -> None:
    engine, recorded = started
    assert (engine.version, recorded.path) == ("0.18.0", "model")
    assert (engine.settings["session_len"], engine.settings["backend"]) == (9000, "turbomind")
    assert engine.memory() == {}
    assert engine.tracer(Path()) is None


def test_its_server_gets_the_same(lmdeploy: None) -> None:
    asked = setup(Path("/models/tiny"), workload="online", scheduling="default", chunk_tokens=0, tensor_parallel=2)
    served = lmdeploy_driver.serve_command(asked, "127.0.0.1", 4321)
    words = list(served.argv)
    assert words[:6] == [sys.executable, "-m", "lmdeploy", "serve", "api_server", "/models/tiny"]
    for option, value in {
        "--backend": "turbomind",
        "--server-name": "127.0.0.1",
        "--server-port": "4321",
        "--model-name": served.model,
        "--tp": "2",
        "--session-len": "9000",
        "--max-batch-size": "4",
        "--cache-max-entry-count": "0.9",
    }.items():
        assert words[words.index(option) + 1] == value
    # a flag that is off is left out
    assert "--enable-prefix-caching" not in words
    assert (served.version, served.ready) == ("0.18.0", "/health")
    assert "/models" not in json.dumps(served.settings)
    eager = dataclasses.replace(asked, settings=PYTORCH, graphs="eager", prefix_caching=True)
    assert {"--eager-mode", "--enable-prefix-caching"} < set(lmdeploy_driver.serve_command(eager, "h", 1).argv)
