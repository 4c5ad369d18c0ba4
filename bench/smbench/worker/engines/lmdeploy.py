"""lmdeploy's two engines, TurboMind and the PyTorch one. Owns how a cell is said in lmdeploy's words, and its answers.

Written against the sources of lmdeploy 0.18.0: `TurboMind.from_pretrained` and `Engine.from_pretrained` with the
engine configurations of `lmdeploy.messages`, and `async_stream_infer` of an instance, as lmdeploy's own
profile_throughput.py drives them: token ids in and out, no detokenizing inside the interval. TurboMind computes in
threads of this process. Its configuration classes and its command line take what is written here (0.18.0); the engines
need a GPU, and were never run by us. Does not own requests.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from smbench.worker.engines import BatchAnswer, Completion, ServeCommand, Setup, UnsupportedByEngine
from smbench.worker.engines.plain import plain
from smbench.worker.engines.streaming import Arrivals

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # its log is evidence
    "TM_LOG_LEVEL": "WARNING",
    # cells are forked after importing, so nothing may ask CUDA itself whether there is a GPU
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
SETTINGS: Mapping[str, str] = {
    "backend": "which of its engines: turbomind, which it is without this setting, or pytorch",
    "block_size": "tokens of a block of the KV cache, 64 where it is not given",
    "prefix_caching": "whether prompts with a prefix in common by design may be answered from a cache",
}
BACKENDS = ("turbomind", "pytorch")
BLOCK = 64
SERVED = "model"
"""What the server calls its model."""
WAIT_S = 60.0
"""For the thread of the event loop to end."""
FLOAT_BYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2}


def preload() -> None:
    """Import what both engines share; the rest is imported when one starts, since it may look for a GPU."""
    import lmdeploy.messages  # noqa: F401


def start(setup: Setup) -> Lmdeploy:
    """A running engine. UnsupportedByEngine for what this version does not offer."""
    backend, fields = backend_of(setup), fields_of(setup)
    from lmdeploy import messages

    if backend == "turbomind":
        engine_class = importlib.import_module("lmdeploy.turbomind").TurboMind
        config = messages.TurbomindEngineConfig(**fields)
    else:
        engine_class = importlib.import_module("lmdeploy.pytorch.engine").Engine
        config = messages.PytorchEngineConfig(**fields)
    return Lmdeploy(setup, engine_class.from_pretrained(str(setup.model), engine_config=config), fields)


def serve_command(setup: Setup, host: str, port: int) -> ServeCommand:
    """`lmdeploy serve api_server` with the fields that the engine would get here."""
    backend, fields = backend_of(setup), fields_of(setup)
    options: list[str] = []
    for name, value in fields.items():
        option = OPTIONS.get(name)
        if option is None or value is False:
            continue
        listed = value if isinstance(value, list) else [value]
        options += [option, *([] if value is True else map(str, listed))]
    given = ["--backend", backend, "--server-name", host, "--server-port", str(port), "--model-name", SERVED]
    return ServeCommand(
        argv=(sys.executable, "-m", "lmdeploy", "serve", "api_server", str(setup.model), *given, *options),
        model=SERVED,
        version=_version(),
        settings=plain({"backend": backend, **fields}),
    )


OPTIONS: Mapping[str, str] = {
    "dtype": "--dtype",
    "tp": "--tp",
    "session_len": "--session-len",
    "max_batch_size": "--max-batch-size",
    "cache_max_entry_count": "--cache-max-entry-count",
    "num_gpu_blocks": "--num-gpu-blocks",
    "cache_block_seq_len": "--cache-block-seq-len",
    "block_size": "--cache-block-seq-len",
    "enable_prefix_caching": "--enable-prefix-caching",
    "max_prefill_token_num": "--max-prefill-token-num",
    "model_format": "--model-format",
    "eager_mode": "--eager-mode",
    "cudagraph_capture_batch_sizes": "--cudagraph-capture-batch-sizes",
}
"""Field of an engine configuration to the server's option; a field that is not here is the server's default."""


def backend_of(setup: Setup) -> str:
    """Which of the two engines."""
    backend = str(setup.settings.get("backend", BACKENDS[0]))
    if backend not in BACKENDS:
        raise UnsupportedByEngine(f"lmdeploy has no engine {backend!r}; known: {', '.join(BACKENDS)}")
    return backend


def fields_of(setup: Setup) -> dict[str, Any]:
    """The fields of the engine configuration that a cell decides.

    memory_fraction is of what is free once the weights are there, which is how lmdeploy counts.
    """
    if setup.device != "cuda":
        raise UnsupportedByEngine("lmdeploy runs on a GPU only")
    if setup.scheduling not in ("one-step", "default", "chunked"):
        raise UnsupportedByEngine(f"lmdeploy has no such scheduler as {setup.scheduling}")
    if setup.attention != "default":
        raise UnsupportedByEngine(f"lmdeploy chooses its attention itself, not {setup.attention!r}")
    turbomind, limits = backend_of(setup) == "turbomind", setup.limits
    block = int(setup.settings.get("block_size", BLOCK))
    fields: dict[str, Any] = {
        "dtype": setup.dtype,
        "tp": setup.tensor_parallel,
        "session_len": limits.max_model_len,
        "max_batch_size": limits.max_num_seqs,
        "cache_max_entry_count": limits.memory_fraction,
        "cache_block_seq_len" if turbomind else "block_size": block,
        "enable_prefix_caching": setup.prefix_caching,
        # what it says of cached tokens comes with the metrics
        "enable_metrics": True,
    }
    if limits.kv_cache_bytes is not None:
        blocks = limits.kv_cache_bytes // (block * _kv_token_bytes(setup))
        # a number above 1 is one of blocks to TurboMind; the other has a field of its own for it
        fields["cache_max_entry_count" if turbomind else "num_gpu_blocks"] = blocks
    if setup.chunk_tokens:
        fields["max_prefill_token_num"] = setup.chunk_tokens
    if setup.scheduling == "chunked" and turbomind:
        fields["num_tokens_per_iter"] = setup.chunk_tokens
        fields["max_prefill_iters"] = -(-limits.max_model_len // setup.chunk_tokens)
    return fields | (_turbomind(setup) if turbomind else _pytorch(setup))


def _turbomind(setup: Setup) -> dict[str, Any]:
    if setup.graphs != "default":
        raise UnsupportedByEngine(f"TurboMind decides itself what it captures, not graphs = {setup.graphs!r}")
    return {}


def _pytorch(setup: Setup) -> dict[str, Any]:
    """Log-probabilities as the model has them, for the comparison of outputs; they cost nothing unless asked for."""
    if setup.graphs == "full":
        raise UnsupportedByEngine("lmdeploy's PyTorch engine captures decode steps alone: graphs = default")
    captured = [setup.batch] if setup.workload == "static_batch" and setup.graphs == "default" else None
    sizes = {} if captured is None else {"cudagraph_capture_batch_sizes": captured}
    return {"eager_mode": setup.graphs == "eager", "logprobs_mode": "raw_logprobs", **sizes}


class Lmdeploy:
    """A running engine, and a thread whose event loop its requests run on, as lmdeploy's own pipeline has it."""

    def __init__(self, setup: Setup, engine: Any, fields: Mapping[str, Any]) -> None:
        self._setup = setup
        self._engine = engine
        self.version = _version()
        self.kernels: Mapping[str, Mapping[str, int]] = {}
        config = getattr(engine, "engine_config", None)
        resolved = plain(config)
        self.settings: Mapping[str, Any] = {
            **(resolved if isinstance(resolved, dict) else {}),
            "backend": backend_of(setup),
            "arguments": plain(dict(fields)),
        }
        self._instances: list[Any] = []
        self._sessions = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        if hasattr(engine, "start_loop"):
            self._await(self._begin())

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """One request, streamed so that its first token can be timed."""
        began = time.perf_counter()
        first: list[float] = []
        answered, (request,) = self._ask(
            [prompt], output_len, top_logprobs, on_token=lambda: first.append(time.perf_counter())
        )
        return Completion(
            token_ids=answered.token_ids[0],
            prompt_tokens=answered.prompt_tokens[0],
            finish_reason=answered.finish_reasons[0],
            cached_tokens=answered.cached_tokens,
            ttft_s=first[0] - began if first else None,
            logprobs=request.logprobs if top_logprobs and request.logprobs else None,
        )

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """All prompts at once; stepwise means that the stream is watched."""
        return self._ask(prompts, output_len, 0, stepwise=stepwise)[0]

    def tracer(self, folder: Path) -> None:
        """Nothing of its own where the engine computes in this process."""
        if backend_of(self._setup) == "pytorch" and self._setup.tensor_parallel > 1:
            raise UnsupportedByEngine("with several GPUs lmdeploy's PyTorch engine computes in other processes")

    def memory(self) -> Mapping[str, int]:
        """What the PyTorch engine says of its cache; TurboMind says nothing here."""
        config = getattr(self._engine, "engine_config", None)
        blocks, block = getattr(config, "num_gpu_blocks", 0), getattr(config, "block_size", 0)
        return {"kv_cache_tokens": int(blocks) * int(block)} if blocks and block else {}

    def close(self) -> None:
        """End the engine and the loop."""
        self._engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _begin(self) -> None:
        self._engine.start_loop()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        output_len: int,
        top_logprobs: int,
        stepwise: bool = False,
        on_token: Any = None,
    ) -> tuple[BatchAnswer, list[_Request]]:
        while len(self._instances) < len(prompts):
            self._instances.append(self._engine.create_instance())
        requests = [_Request(list(prompt)) for prompt in prompts]
        # a request is streamed only where somebody looks at its tokens
        streamed = stepwise or on_token is not None
        arrivals = self._await(self._all(requests, _generation(output_len, top_logprobs), streamed, on_token))
        cached = [request.cached_tokens for request in requests]
        answer = BatchAnswer(
            token_ids=[request.tokens for request in requests],
            prompt_tokens=[len(request.prompt) for request in requests],
            finish_reasons=[request.finish_reason for request in requests],
            cached_tokens=None if any(count is None for count in cached) else sum(count or 0 for count in cached),
        )
        return (arrivals.timed(answer) if stepwise else answer), requests

    async def _all(self, requests: Sequence[_Request], config: Any, streamed: bool, on_token: Any) -> Arrivals:
        arrivals = Arrivals(len(requests))
        asked = [
            self._one(instance, request, config, streamed, i, arrivals, on_token)
            for i, (instance, request) in enumerate(zip(self._instances, requests, strict=False))
        ]
        await asyncio.gather(*asked)
        return arrivals

    async def _one(
        self, instance: Any, request: _Request, config: Any, streamed: bool, i: int, arrivals: Arrivals, on_token: Any
    ) -> None:
        stream = instance.async_stream_infer(
            next(self._sessions), input_ids=request.prompt, gen_config=config, stream_output=streamed
        )
        async with aclosing(stream):
            async for output in stream:
                request.take(output)
                arrivals.saw(i, len(request.tokens))
                if on_token is not None:
                    on_token()


class _Request:
    """A prompt, and what came back so far."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs: list[dict[int, float]] = []
        self.cached_tokens: int | None = None
        self.finish_reason = "unfinished"

    def take(self, output: Any) -> None:
        """A part of the answer. RuntimeError where it is an error."""
        status = str(output.status.name)
        if status not in ("SUCCESS", "FINISH", "CANCEL"):
            raise RuntimeError(f"lmdeploy ended a request with {status}")
        self.tokens += [int(token) for token in output.token_ids]
        for entry in output.logprobs or ():
            self.logprobs.append({int(token): float(logprob) for token, logprob in entry.items()})
        if output.req_metrics is not None:
            self.cached_tokens = int(output.req_metrics.cached_tokens)
        if status != "SUCCESS":
            # with the end of text ignored, lmdeploy itself calls every end that it chose `length`
            self.finish_reason = "length" if status == "FINISH" else "abort"


def _generation(output_len: int, top_logprobs: int) -> Any:
    from lmdeploy.messages import GenerationConfig

    return GenerationConfig(
        max_new_tokens=output_len,
        do_sample=False,
        top_k=1,
        temperature=1.0,
        ignore_eos=True,
        logprobs=top_logprobs or None,
    )


def _kv_token_bytes(setup: Setup) -> int:
    config = json.loads((setup.model / "config.json").read_text(encoding="utf-8"))
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config["num_hidden_layers"]) * kv_heads * width * FLOAT_BYTES[setup.dtype]


def _version() -> str:
    from lmdeploy.version import __version__

    return str(__version__)
