"""sglang's offline engine, 0.5.16 and the 0.5.2x line. Owns how a cell is said in sglang's words, and its answers.

The GPU is used by a scheduler process that sglang spawns, so nothing of the model can be looked at from here: kernels
are what sglang's own resolved settings say, with no count of layers. Written against the sources of 0.5.16 and 0.5.23;
its GPTQ path needs a GPU. A batch is handed over as one message, and its steps are seen in the stream: the low-level
functions of sglang's bench_one_batch would put the model into this process, but have no scheduler to hand it to. Run
by us on a CPU, bf16 and 0.5.23: static and offline batches, a trace, the server. Does not own requests.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from smbench.worker.engines import BatchAnswer, Completion, ServeCommand, Setup, UnsupportedByEngine
from smbench.worker.engines.plain import plain
from smbench.worker.engines.streaming import Arrivals

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # cells are forked after importing, so nothing may ask CUDA itself whether there is a GPU
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
SETTINGS: Mapping[str, str] = {
    "linear_kernel": "kernel of quantized linear layers: default or marlin, the only one that sglang still has",
    "page_size": "tokens of a page of the KV cache; sglang decides where it is not given",
    "disable_overlap_schedule": "whether the next step is planned only after one has run",
    "prefix_caching": "whether prompts with a prefix in common by design may be answered from a cache",
}

ATTENTION: Mapping[str, str] = {"flash-attention": "fa3", "flashinfer": "flashinfer", "triton": "triton"}
"""Value of the axis to sglang's attention_backend."""
QUANTIZATION: Mapping[str, str] = {"marlin": "gptq_marlin"}
"""Kernel to sglang's quantization."""
SERVED = "model"
"""What the server calls its model."""
GIB = 1 << 30
FLOAT_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def preload() -> None:
    """Import the front of the engine; its scheduler imports everything again in a process of its own."""
    from sglang.srt.entrypoints.engine import Engine  # noqa: F401
    from sglang.srt.server_args import ServerArgs  # noqa: F401


def start(setup: Setup) -> Sglang:
    """A running engine. UnsupportedByEngine for what this version does not offer."""
    arguments = arguments_of(setup)
    from sglang.srt.entrypoints.engine import Engine

    return Sglang(Engine(**arguments), arguments)


def serve_command(setup: Setup, host: str, port: int) -> ServeCommand:
    """sglang's own server, with the arguments that the engine would get here."""
    arguments = {name: value for name, value in arguments_of(setup).items() if name != "skip_tokenizer_init"}
    options = [part for name, value in arguments.items() for part in _option(name, value)]
    given = ["--host", host, "--port", str(port), "--served-model-name", SERVED, "--enable-cache-report"]
    return ServeCommand(
        argv=(sys.executable, "-m", "sglang.launch_server", *given, *options),
        model=SERVED,
        version=_version(),
        settings=plain(arguments),
    )


def _option(name: str, value: Any) -> list[str]:
    """A server argument on the command line; one that is off is left out."""
    if value is False:
        return []
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    return [option, *map(str, value if isinstance(value, list) else [value])]


def arguments_of(setup: Setup) -> dict[str, Any]:
    """What Engine() is called with."""
    if setup.scheduling == "v0-default":
        raise UnsupportedByEngine("the scheduler of vLLM 0.6 is not in sglang")
    limits = setup.limits
    wanted: dict[str, Any] = {
        "model_path": str(setup.model),
        "skip_tokenizer_init": True,
        "device": setup.device,
        "dtype": setup.dtype,
        "random_seed": setup.seed,
        "context_length": limits.max_model_len,
        "max_running_requests": limits.max_num_seqs,
        "mem_fraction_static": limits.memory_fraction,
        "disable_radix_cache": not setup.prefix_caching,
        "grammar_backend": "none",
        # its log is evidence
        "log_level": "info",
        # per-request times come with the metrics
        "enable_metrics": True,
    }
    if setup.scheduling != "default":
        # -1 turns chunks off
        wanted["chunked_prefill_size"] = -1 if setup.scheduling == "whole" else setup.chunk_tokens
    if setup.scheduling == "one-step":
        # all prompts in one step, which is over before the next one is planned
        wanted |= {"max_prefill_tokens": setup.chunk_tokens, "disable_overlap_schedule": True, "stream_interval": 1}
    if setup.tensor_parallel > 1:
        wanted["tp_size"] = setup.tensor_parallel
    if limits.kv_cache_bytes is not None:
        wanted["max_total_tokens"] = limits.kv_cache_bytes // _kv_token_bytes(setup)
    for name in ("page_size", "disable_overlap_schedule"):
        if name in setup.settings:
            wanted[name] = setup.settings[name]
    wanted |= _linear(setup) | _attention(setup) | _graphs(setup)
    for name in wanted.keys() - _fields():
        raise UnsupportedByEngine(f"sglang {_version()} has no server argument {name!r}")
    page = wanted.get("page_size")
    if page is not None and setup.scheduling in ("chunked", "one-step") and setup.chunk_tokens % int(page):
        raise UnsupportedByEngine(f"chunks of {setup.chunk_tokens} tokens are not whole pages of {page}")
    return wanted


def _linear(setup: Setup) -> dict[str, Any]:
    kernel = str(setup.settings.get("linear_kernel", "default"))
    if kernel == "default":
        return {}
    if setup.device == "cpu":
        raise UnsupportedByEngine("sglang has no GPTQ kernel in its package for CPUs")
    if kernel not in QUANTIZATION:
        raise UnsupportedByEngine(
            f"sglang {_version()} has no GPTQ kernel {kernel!r}; known: {', '.join(QUANTIZATION)}"
        )
    return {"quantization": QUANTIZATION[kernel]}


def _attention(setup: Setup) -> dict[str, Any]:
    if setup.device == "cpu":
        if setup.attention != "default":
            raise UnsupportedByEngine(f"on a CPU sglang runs torch's attention, not {setup.attention!r}")
        return {"attention_backend": "torch_native", "sampling_backend": "pytorch"}
    return {} if setup.attention == "default" else {"attention_backend": ATTENTION[setup.attention]}


def _graphs(setup: Setup) -> dict[str, Any]:
    """CUDA graphs. `full`: a graph for every step that a request is made of: a token, a chunk, what is left."""
    if setup.graphs == "eager" or setup.device == "cpu":
        if setup.graphs == "full":
            raise UnsupportedByEngine("there are no CUDA graphs on a CPU")
        return {"disable_cuda_graph": True}
    if setup.graphs == "default":
        return {}
    if setup.workload != "generate":
        # prompts of a batch are too many tokens for a graph
        only = {"cuda_graph_bs_decode": [setup.batch]} if setup.workload == "static_batch" else {}
        return {"cuda_graph_backend_decode": "full", **only}
    chunk = min(setup.chunk_tokens, setup.input_len)
    return {
        "cuda_graph_backend_decode": "full",
        "cuda_graph_bs_decode": [1],
        # its Triton attention knows no graph of a whole prefill step, only one that is broken at each attention
        "cuda_graph_backend_prefill": "breakable" if setup.attention == "triton" else "full",
        "cuda_graph_bs_prefill": sorted({chunk, setup.input_len % chunk or chunk}),
    }


class Sglang:
    """A running `Engine`."""

    def __init__(self, engine: Any, arguments: Mapping[str, Any]) -> None:
        self._engine = engine
        self.version = _version()
        told: Mapping[str, Any] = engine.get_server_info()
        self.settings = _settings(told, arguments)
        self.kernels = kernels_of(told)

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """One request through the synchronous interface, answered as a whole."""
        sampling = {"temperature": 0.0, "max_new_tokens": output_len, "ignore_eos": True}
        asked: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": sampling}
        if top_logprobs:
            # from the last prompt token on: -1 asks for generated tokens alone
            asked |= {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": top_logprobs}
        answer = self._engine.generate(**asked)
        told = answer["meta_info"]
        return Completion(
            token_ids=_tokens(answer),
            prompt_tokens=int(told["prompt_tokens"]),
            finish_reason=_finish_reason(told["finish_reason"]),
            cached_tokens=told.get("cached_tokens"),
            ttft_s=_ttft_s(told),
            logprobs=_logprobs(told) if top_logprobs else None,
        )

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """All prompts in one message; stepwise means that the stream is watched."""
        sampling = {"temperature": 0.0, "max_new_tokens": output_len, "ignore_eos": True}
        asked = {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": sampling}
        if not stepwise:
            return _batch_answer(self._engine.generate(**asked))
        arrivals = Arrivals(len(prompts))
        last: dict[int, Mapping[str, Any]] = {}
        for chunk in self._engine.generate(**asked, stream=True):
            # the ids grow in place until a request is finished, the count does not
            arrivals.saw(chunk["index"], int(chunk["meta_info"]["completion_tokens"]))
            last[chunk["index"]] = chunk
        return arrivals.timed(_batch_answer([last[i] for i in range(len(prompts))]))

    def tracer(self, folder: Path) -> AbstractContextManager[None]:
        """The scheduler's own profiler, which writes a file for each GPU."""

        @contextmanager
        def profiled() -> Iterator[None]:
            self._engine.start_profile(output_dir=str(folder), activities=["CPU", "GPU"])
            try:
                yield
            finally:
                self._engine.stop_profile()

        return profiled()

    def memory(self) -> Mapping[str, int]:
        """What the scheduler says it took, in its own rounding: two or three digits of a GiB."""
        states = self._engine.get_server_info().get("internal_states") or [{}]
        usage: Mapping[str, Any] = states[0].get("memory_usage") or {}
        found = {}
        if "weight" in usage:
            found["weights_bytes"] = round(float(usage["weight"]) * GIB)
        if "kvcache" in usage:
            found["kv_cache_bytes"] = round(float(usage["kvcache"]) * GIB)
        if "token_capacity" in usage:
            found["kv_cache_tokens"] = int(usage["token_capacity"])
        return found

    def close(self) -> None:
        """End the scheduler."""
        self._engine.shutdown()


def kernels_of(told: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What sglang's resolved settings name. Layers are 0: it does not say how many run which kernel."""
    found = {}
    if told.get("quantization"):
        found["linear"] = {str(told["quantization"]): 0}
    prefill, decode = told.get("prefill_attention_backend"), told.get("decode_attention_backend")
    backends = {str(name) for name in (prefill, decode) if name} or {str(told.get("attention_backend") or "")}
    found["attention"] = {name: 0 for name in sorted(backends - {""})}
    return {role: names for role, names in found.items() if names}


def _settings(told: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The server's own account but for what is no setting."""
    no_settings = ("internal_states", "launch_command", "startup_time", "version")
    resolved = plain({name: value for name, value in told.items() if name not in no_settings})
    return {**resolved, "arguments": plain(dict(arguments))}


def _batch_answer(answers: Sequence[Mapping[str, Any]]) -> BatchAnswer:
    told = [answer["meta_info"] for answer in answers]
    cached = [entry.get("cached_tokens") for entry in told]
    return BatchAnswer(
        token_ids=[_tokens(answer) for answer in answers],
        prompt_tokens=[int(entry["prompt_tokens"]) for entry in told],
        finish_reasons=[_finish_reason(entry["finish_reason"]) for entry in told],
        cached_tokens=None if any(count is None for count in cached) else sum(int(count or 0) for count in cached),
    )


def _tokens(answer: Mapping[str, Any]) -> list[int]:
    """The generated ids. RuntimeError where sglang counts others than it returns."""
    tokens = [int(token) for token in answer["output_ids"]]
    counted = int(answer["meta_info"]["completion_tokens"])
    if len(tokens) != counted:
        raise RuntimeError(f"sglang counts {counted} generated tokens and returns {len(tokens)}")
    return tokens


def _finish_reason(told: Any) -> str:
    """sglang gives a mapping such as {"type": "length", "length": 16}."""
    return str(told["type"] if isinstance(told, Mapping) else told)


def _ttft_s(told: Mapping[str, Any]) -> float | None:
    """First token by the scheduler's clock: 0.5.2x says the latency, 0.5.16 when the prompt was done."""
    if "first_token_latency" in told:
        return float(told["first_token_latency"])
    received, first = told.get("request_received_ts"), told.get("prefill_finished_time")
    return None if received is None or first is None else float(first) - float(received)


def _logprobs(told: Mapping[str, Any]) -> list[dict[int, float]]:
    """For each generated token the likeliest ones and itself; sglang gives (log-probability, id, text)."""
    top = told["output_top_logprobs"]
    own = told["output_token_logprobs"]
    return [
        {int(entry[1]): float(entry[0]) for entry in [*likeliest, chosen]}
        for likeliest, chosen in zip(top, own, strict=True)
    ]


def _kv_token_bytes(setup: Setup) -> int:
    config = json.loads((setup.model / "config.json").read_text(encoding="utf-8"))
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return 2 * int(config["num_hidden_layers"]) * int(config["num_key_value_heads"]) * width * FLOAT_BYTES[setup.dtype]


def _fields() -> frozenset[str]:
    from sglang.srt.server_args import ServerArgs

    if dataclasses.is_dataclass(ServerArgs):
        return frozenset(field.name for field in dataclasses.fields(ServerArgs))
    # from 0.5.2x on it is a msgspec.Struct
    return frozenset(getattr(ServerArgs, "__struct_fields__", None) or inspect.signature(ServerArgs).parameters)


def _version() -> str:
    from sglang.version import __version__

    return str(__version__)
