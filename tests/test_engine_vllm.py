"""The driver of vLLM: what a cell becomes in its words, what is read from its model, what it does not offer.

vLLM stands here as a recording of its interface, since most of this needs a GPU; `engine/` runs the real one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from engine_setups import LIMITS, setup
from smbench.worker.engines import UnsupportedByEngine, vllm_batch
from smbench.worker.engines import vllm as vllm_driver


@dataclasses.dataclass
class RecordedArguments:
    """Those fields of vLLM's EngineArgs that the driver knows of, as in 0.26.0 and 0.32.0."""

    model: str = ""
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    disable_log_stats: bool = False
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1
    block_size: int | None = None
    linear_backend: str = "auto"
    attention_backend: str | None = None
    enforce_eager: bool = False
    compilation_config: Mapping[str, Any] | None = None


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.__dict__.update(EngineArgs=RecordedArguments, __version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    # so that the driver's own changes of it are undone
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "")
    return module


def test_a_cell_in_the_words_of_vllm(vllm: ModuleType) -> None:
    assert vllm_driver.arguments_of(setup()) == {
        "model": "model",
        "skip_tokenizer_init": True,
        "dtype": "float16",
        "seed": 3,
        "max_model_len": 9000,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.9,
        "disable_log_stats": False,
    }


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"scheduling": "whole"}, {"enable_chunked_prefill": False, "max_num_batched_tokens": 9000}),
        ({"attention": "flash-attention"}, {"attention_backend": "FLASH_ATTN"}),
        ({"attention": "triton"}, {"attention_backend": "TRITON_ATTN"}),
        ({"graphs": "eager"}, {"enforce_eager": True}),
        (
            {"graphs": "full"},
            {
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL",
                    "cudagraph_capture_sizes": [1, 64, 256],
                    "max_cudagraph_capture_size": 256,
                }
            },
        ),
        ({"settings": {"linear_kernel": "exllama"}}, {"linear_backend": "exllama"}),
        ({"settings": {"linear_kernel": "default"}}, {}),
        ({"settings": {"async_scheduling": False, "block_size": 16}}, {"async_scheduling": False, "block_size": 16}),
        ({"limits": dataclasses.replace(LIMITS, kv_cache_bytes=1 << 30)}, {"kv_cache_memory_bytes": 1 << 30}),
        ({"tensor_parallel": 2}, {"tensor_parallel_size": 2}),
        ({"prefix_caching": True}, {"enable_prefix_caching": True}),
        # all prompts in one step, which is over before the next one is planned
        (
            {"workload": "static_batch", "scheduling": "one-step", "batch": 4, "chunk_tokens": 512},
            {"max_num_batched_tokens": 512, "async_scheduling": False},
        ),
        (
            {"workload": "static_batch", "scheduling": "one-step", "chunk_tokens": 2, "graphs": "full"},
            {
                "max_num_batched_tokens": 4,
                "async_scheduling": False,
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": [1],
                    "max_cudagraph_capture_size": 1,
                },
            },
        ),
        (
            {"workload": "online", "scheduling": "default", "chunk_tokens": 0, "graphs": "full"},
            {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
        ),
    ],
)
def test_what_an_axis_or_a_setting_adds(vllm: ModuleType, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = vllm_driver.arguments_of(setup(**changes))
    plain_cell = vllm_driver.arguments_of(setup())
    assert {name: value for name, value in found.items() if plain_cell.get(name) != value} == wanted


def test_offline_and_online_vllm_schedules_as_it_likes(vllm: ModuleType) -> None:
    found = vllm_driver.arguments_of(setup(workload="offline", scheduling="default", chunk_tokens=0))
    assert not {"max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling"} & found.keys()


def test_a_server_of_vllm_gets_the_same(vllm: ModuleType) -> None:
    asked = setup(workload="online", scheduling="default", chunk_tokens=0, tensor_parallel=2, graphs="full")
    served = vllm_driver.serve_command(asked, "127.0.0.1", 4321)
    words = list(served.argv)
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    wanted = {
        "--host": "127.0.0.1",
        "--port": "4321",
        "--served-model-name": served.model,
        "--model": "model",
        "--max-model-len": "9000",
        "--tensor-parallel-size": "2",
        "--compilation-config": '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',
    }
    assert {option: words[words.index(option) + 1] for option in wanted} == wanted
    assert "--no-enable-prefix-caching" in words and "--skip-tokenizer-init" not in words
    # its core is a process of its own there
    assert served.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert served.version == "0.32.0"


@pytest.mark.parametrize("installed", [True, False])
def test_a_server_samples_as_the_engine_does_here(
    vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """A server starts where no engine did before, so that nothing may hang on what an earlier cell has set."""
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    asked = setup(workload="online", scheduling="default", chunk_tokens=0)
    served = vllm_driver.serve_command(asked, "127.0.0.1", 4321)
    assert served.environment.get("VLLM_USE_FLASHINFER_SAMPLER") == (None if installed else "0")


class Stepped:
    """An engine whose steps are told: for each the prompts that get a token."""

    def __init__(self, steps: list[list[int]], unfinished: bool = False) -> None:
        self.llm_engine = self
        self._steps, self._unfinished = iter(steps), unfinished
        self.names: list[str] = []
        self.aborted: list[str] = []

    def add_request(self, name: str, prompt: Mapping[str, Any], sampling: Any) -> None:
        assert sampling["output_kind"] == "delta"
        self.names.append(name)

    def step(self) -> list[Any]:
        return [
            SimpleNamespace(
                request_id=self.names[i],
                prompt_token_ids=[1, 2],
                num_cached_tokens=0,
                outputs=[SimpleNamespace(token_ids=[7], finish_reason="length")],
            )
            for i in next(self._steps)
        ]

    def has_unfinished_requests(self) -> bool:
        return self._unfinished

    def abort_request(self, names: list[str]) -> None:
        self.aborted = names


@pytest.fixture
def sampling(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.__dict__["SamplingParams"] = dict
    module = ModuleType("vllm.sampling_params")
    module.__dict__["RequestOutputKind"] = SimpleNamespace(DELTA="delta", FINAL_ONLY="final")
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module)


def test_a_batch_of_vllm_goes_step_by_step(sampling: None) -> None:
    answer = vllm_batch.steps(Stepped([[0, 1], [1, 0], [0, 1]]), [[1, 2], [1, 2]], 3)
    assert answer.token_ids == [[7, 7, 7], [7, 7, 7]]
    assert (answer.step_clock, len(answer.step_s), answer.cached_tokens) == ("engine-step", 2, 0)
    assert answer.prefill_s is not None and answer.prefill_s > 0


@pytest.mark.parametrize(
    ("steps", "unfinished", "words"),
    [
        ([[0]], False, "step 0 of a batch of 2: 1 of it did not get their one token"),
        ([[0, 1], [1, 1]], False, "step 1 of a batch of 2: 2 of it did not get their one token"),
        ([[0, 1], [0, 1]], True, "a batch goes on after 2 steps"),
    ],
)
def test_a_step_of_vllm_that_does_not_serve_all_is_no_measurement(
    sampling: None, steps: list[list[int]], unfinished: bool, words: str
) -> None:
    engine = Stepped(steps, unfinished)
    with pytest.raises(RuntimeError, match=words):
        vllm_batch.steps(engine, [[1, 2], [1, 2]], 2)
    assert engine.aborted == engine.names


def test_a_version_without_linear_backend_has_the_other_kernels_disabled(
    vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [field.name for field in dataclasses.fields(RecordedArguments) if field.name != "linear_backend"]
    vllm.__dict__["EngineArgs"] = dataclasses.make_dataclass("EngineArgs", fields)
    assert "linear_backend" not in vllm_driver.arguments_of(setup(settings={"linear_kernel": "exllama"}))
    disabled = os.environ["VLLM_DISABLED_KERNELS"].split(",")
    assert {"MarlinLinearKernel", "MacheteLinearKernel"} < set(disabled)
    assert "ExllamaLinearKernel" not in disabled


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduling": "v0-default"}, "vLLM 0.32.0 has no scheduler of version 0 any more"),
        ({"device": "cpu", "graphs": "full"}, "there are no CUDA graphs on a CPU"),
        ({"device": "cpu", "attention": "triton"}, "vLLM's CPU backend has an attention of its own, not 'triton'"),
        (
            {"device": "cpu", "settings": {"linear_kernel": "marlin"}},
            "vLLM's CPU backend has one kernel for quantized layers, not 'marlin'",
        ),
        ({"attention": "flashinfer"}, "the Python package 'flashinfer' is not installed here"),
    ],
)
def test_what_vllm_does_not_offer_is_said_before_it_starts(
    vllm: ModuleType, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedByEngine) as refusal:
        vllm_driver.arguments_of(setup(**changes))
    assert str(refusal.value) == reason


def test_an_argument_that_a_version_lacks_is_named(vllm: ModuleType) -> None:
    vllm.__dict__["EngineArgs"] = dataclasses.make_dataclass(
        "EngineArgs", [f.name for f in dataclasses.fields(RecordedArguments) if f.name != "attention_backend"]
    )
    with pytest.raises(UnsupportedByEngine, match="has no engine argument 'attention_backend'"):
        vllm_driver.arguments_of(setup(attention="triton"))


DECLINES = {
    "dtype": (
        "1 validation error for VllmConfig\n  Value error, torch.float32 is not supported for quantization method "
        "auto_gptq. Supported dtypes: [torch.float16, torch.bfloat16] [type=value_error, input_value=ArgsKwargs((), {",
        "vLLM 0.32.0: torch.float32 is not supported for quantization method auto_gptq. Supported dtypes: "
        "[torch.float16, torch.bfloat16]",
    ),
    "kernel": (
        "Failed to find a kernel that can implement the WNA16 linear layer. Reasons: \nMacheteLinearKernel requires "
        "capability 90, current compute  capability is 89",
        "vLLM 0.32.0: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: "
        "MacheteLinearKernel requires capability 90, current compute capability is 89",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_what_vllm_declines_when_it_starts_is_unsupported(vllm: ModuleType, name: str) -> None:
    said, reason = DECLINES[name]

    def decline(**_: Any) -> None:
        raise ValueError(said)

    vllm.__dict__["LLM"] = decline
    with pytest.raises(UnsupportedByEngine) as refusal:
        vllm_driver.start(setup())
    assert str(refusal.value) == reason


def test_any_other_error_of_vllm_is_a_crash(vllm: ModuleType) -> None:
    def fail(**_: Any) -> None:
        raise ValueError("There is no module or parameter named 'x' in Qwen2ForCausalLM")

    vllm.__dict__["LLM"] = fail
    with pytest.raises(ValueError, match="There is no module"):
        vllm_driver.start(setup())


class LinearBase(nn.Module):
    """Named like vLLM's."""

    def __init__(self, method: object) -> None:
        super().__init__()
        self.quant_method = method


class ParallelLMHead(LinearBase):
    """Named like vLLM's, where it is no LinearBase."""


ParallelLMHead.__bases__ = (nn.Module,)


class AutoGPTQLinearMethod:
    def __init__(self, kernel: object | None) -> None:
        self.kernel = kernel


class MarlinLinearKernel: ...


class UnquantizedLinearMethod: ...


class FlashBackend:
    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_backend = FlashBackend
        self.impl = type("Impl", (), {"vllm_flash_attn_version": 3})()


def model(*methods: object) -> nn.Module:
    return nn.ModuleList([LinearBase(method) for method in methods] + [Attention()])


def test_kernels_are_read_from_the_model() -> None:
    quantized = AutoGPTQLinearMethod(MarlinLinearKernel())
    assert vllm_driver.kernels_of(model(quantized, quantized)) == {
        "linear": {"MarlinLinearKernel": 2},
        "attention": {"FLASH_ATTN 3": 1},
    }


def test_layers_that_are_silently_not_quantized_show() -> None:
    # what a dummy load without `modules_in_block_to_quantize` makes of a GPTQ model
    found = vllm_driver.kernels_of(model(UnquantizedLinearMethod(), UnquantizedLinearMethod()))
    assert found["linear"] == {"UnquantizedLinearMethod": 2}


def test_a_log_that_names_another_kernel_than_the_model_shows() -> None:
    said = [
        "Using ExllamaLinearKernel for AutoGPTQLinearMethod",
        "Using AttentionBackendEnum.FLASHINFER backend.",
        "Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'FLASHINFER'].",
    ]
    found = vllm_driver.kernels_of(model(AutoGPTQLinearMethod(MarlinLinearKernel())), said)
    assert found["linear"] == {"MarlinLinearKernel": 1, "ExllamaLinearKernel": 0}
    assert found["attention"] == {"FLASH_ATTN 3": 1, "FLASHINFER": 0}
