"""vLLM in this very process, from 0.26 on, on GPU and CPU. Owns how a cell is said in vLLM's words, and its answers.

Where GPUs share layers, vLLM's own worker processes compute and its core still steps in this one. The server is
`vllm.entrypoints.openai.api_server` of 0.32.0.

An argument exists where this version's EngineArgs has the field; what it has not is `unsupported`, never guessed. The
kernels are read from the loaded model itself; what vLLM's log claims is held against that. Does not own requests.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import re
import resource
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smbench.worker.engines import BatchAnswer, Completion, ServeCommand, Setup, UnsupportedByEngine, vllm_batch
from smbench.worker.engines.plain import plain
from smbench.worker.engines.vllm_kernels import SAID, kernels_of, look, with_log

__all__ = ["ENVIRONMENT", "SETTINGS", "kernels_of", "preload", "serve_command", "start"]

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # the engine's core in this process: no queue between it and the clock, and its model can be looked at
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # its log is evidence, whatever the user's shell says
    "VLLM_LOGGING_LEVEL": "INFO",
    # cells are forked after importing, so nothing may ask CUDA itself whether there is a GPU
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
SETTINGS: Mapping[str, str] = {
    "linear_kernel": "kernel of quantized linear layers: default, or a value of vLLM's linear_backend",
    "async_scheduling": "whether the next step is planned while one runs; vLLM decides where it is not given",
    "block_size": "tokens of a block of the KV cache; vLLM decides where it is not given",
    "prefix_caching": "whether prompts with a prefix in common by design may be answered from a cache",
}

ATTENTION: Mapping[str, str] = {
    "flash-attention": "FLASH_ATTN",
    "flashinfer": "FLASHINFER",
    "triton": "TRITON_ATTN",
}
"""Value of the axis to a name of vLLM's AttentionBackendEnum."""

KERNEL_CLASSES: Mapping[str, str] = {
    "marlin": "MarlinLinearKernel",
    "machete": "MacheteLinearKernel",
    "exllama": "ExllamaLinearKernel",
    "conch": "ConchLinearKernel",
    "cutlass": "CutlassW4A8LinearKernel",
    "triton": "TritonW4A16LinearKernel",
    "humming": "HummingLinearKernel",
}
"""Values of linear_backend to the classes that VLLM_DISABLED_KERNELS names, for versions without linear_backend."""

DECLINED = re.compile(
    r"Failed to find a kernel that can implement|kernel exists for mixed-precision layers"
    r"|is not supported for quantization|is not valid for this configuration|Selected backend .* is not valid"
    r"|does not support|not supported on|is not supported by|Unknown vLLM environment|Unknown attention backend"
)
"""How vLLM says, when it starts, that it does not offer what it was asked."""

LONGEST_REASON = 500
SERVED = "model"
"""What the server calls its model."""
NOT_OF_A_SERVER = ("skip_tokenizer_init", "disable_log_stats")
"""Arguments that a server decides itself: text comes in, and its log says how it fares."""


def preload() -> None:
    """Import vLLM's engine and the model's code, which takes 10 to 20 s."""
    os.environ.update(_sampler())
    from vllm import LLM, EngineArgs, SamplingParams  # noqa: F401
    from vllm.model_executor.models import qwen2  # noqa: F401
    from vllm.v1.engine.llm_engine import LLMEngine  # noqa: F401


def _sampler() -> dict[str, str]:
    """Has vLLM sample without FlashInfer where that is not installed: it would import it all the same."""
    return {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def start(setup: Setup) -> Vllm:
    """A running engine. UnsupportedByEngine for what this version or device does not offer."""
    arguments = arguments_of(setup)
    from vllm import LLM

    with _log_of("vllm") as said:
        try:
            llm = LLM(**arguments)
        except (ValueError, NotImplementedError, AssertionError) as error:
            # pydantic's errors are ValueErrors
            if DECLINED.search(str(error)):
                raise UnsupportedByEngine(f"vLLM {_version()}: {_sentence(error)}") from error
            raise
    return Vllm(setup, llm, arguments, said)


def serve_command(setup: Setup, host: str, port: int) -> ServeCommand:
    """vLLM's own server, with the arguments that the engine would get here."""
    arguments = {name: value for name, value in arguments_of(setup).items() if name not in NOT_OF_A_SERVER}
    options = [part for name, value in arguments.items() for part in _option(name, value)]
    given = ["--host", host, "--port", str(port), "--served-model-name", SERVED, "--enable-prompt-tokens-details"]
    return ServeCommand(
        argv=(sys.executable, "-m", "vllm.entrypoints.openai.api_server", *given, *options),
        model=SERVED,
        version=_version(),
        settings=plain(arguments),
        # as vLLM runs it: the core in a process of its own, beside the one that answers HTTP
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **_sampler()},
    )


def _option(name: str, value: Any) -> list[str]:
    """An engine argument on the server's command line."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


def arguments_of(setup: Setup) -> dict[str, Any]:
    """What LLM() is called with."""
    if setup.scheduling == "v0-default":
        raise UnsupportedByEngine(f"vLLM {_version()} has no scheduler of version 0 any more")
    whole = setup.scheduling == "whole"
    limits = setup.limits
    wanted: dict[str, Any] = {
        "model": str(setup.model),
        "skip_tokenizer_init": True,
        "dtype": setup.dtype,
        "seed": setup.seed,
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "enable_prefix_caching": setup.prefix_caching,
        "gpu_memory_utilization": limits.memory_fraction,
        # per-request times come with the statistics
        "disable_log_stats": False,
    }
    if setup.scheduling != "default":
        # without chunks vLLM insists that the longest prompt fits into one step, and always that all sequences do
        least = limits.max_model_len if whole else limits.max_num_seqs if setup.scheduling == "one-step" else 0
        wanted["max_num_batched_tokens"] = max(setup.chunk_tokens, least)
        wanted["enable_chunked_prefill"] = not whole
    if setup.scheduling == "one-step":
        # a step then has ended when step() returns
        wanted["async_scheduling"] = False
    if setup.tensor_parallel > 1:
        wanted["tensor_parallel_size"] = setup.tensor_parallel
    if limits.kv_cache_bytes is not None:
        wanted["kv_cache_memory_bytes"] = limits.kv_cache_bytes
    for name in ("async_scheduling", "block_size"):
        if name in setup.settings:
            wanted[name] = setup.settings[name]
    wanted |= _linear(str(setup.settings.get("linear_kernel", "default")), setup.device)
    wanted |= _attention(setup) | _graphs(setup)
    for name in wanted.keys() - _fields():
        raise UnsupportedByEngine(f"vLLM {_version()} has no engine argument {name!r}")
    return wanted


def _linear(kernel: str, device: str) -> dict[str, Any]:
    """The choice of a kernel for quantized linear layers."""
    if kernel == "default":
        return {}
    if device == "cpu":
        raise UnsupportedByEngine(f"vLLM's CPU backend has one kernel for quantized layers, not {kernel!r}")
    if "linear_backend" in _fields():
        known = _choices("linear_backend")
        if known and kernel not in known:
            raise UnsupportedByEngine(f"vLLM {_version()} has no linear_backend {kernel!r}; known: {', '.join(known)}")
        return {"linear_backend": kernel}
    if kernel not in KERNEL_CLASSES:
        raise UnsupportedByEngine(f"vLLM {_version()} has no way to choose {kernel!r}")
    others = [name for name in KERNEL_CLASSES.values() if name != KERNEL_CLASSES[kernel]]
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(others)
    return {}


def _attention(setup: Setup) -> dict[str, Any]:
    if setup.attention == "default":
        return {}
    if setup.device == "cpu":
        raise UnsupportedByEngine(f"vLLM's CPU backend has an attention of its own, not {setup.attention!r}")
    if setup.attention == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
        raise UnsupportedByEngine("the Python package 'flashinfer' is not installed here")
    return {"attention_backend": ATTENTION[setup.attention]}


def _graphs(setup: Setup) -> dict[str, Any]:
    """Compilation and CUDA graphs. `full`: not compiled, and a graph for every step that a request is made of."""
    if setup.graphs == "default":
        return {}
    if setup.graphs == "eager":
        return {"enforce_eager": True}
    if setup.device == "cpu":
        raise UnsupportedByEngine("there are no CUDA graphs on a CPU")
    if setup.workload != "generate":
        # a graph of all prompts of a batch would be as large as the memory that it saves time in
        sizes = {"cudagraph_capture_sizes": [setup.batch], "max_cudagraph_capture_size": setup.batch}
        only = sizes if setup.workload == "static_batch" else {}
        return {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", **only}}
    steps = _steps(setup)
    return {
        "compilation_config": {
            # CompilationMode.NONE
            "mode": 0,
            "cudagraph_mode": "FULL",
            "cudagraph_capture_sizes": steps,
            "max_cudagraph_capture_size": steps[-1],
        }
    }


def _steps(setup: Setup) -> list[int]:
    """Tokens of the steps that one request at a time is made of: one, a whole chunk, and what is left of the prompt.

    vLLM pads a step to the next size that was captured, so a size that is missing costs arithmetic: a prompt of 4000
    tokens in a graph of 9000 took 1.7 times as long.
    """
    chunk = min(setup.chunk_tokens, setup.input_len)
    return sorted({1, chunk, setup.input_len % chunk or chunk})


class Vllm:
    """A running `LLM`."""

    def __init__(self, setup: Setup, llm: Any, arguments: Mapping[str, Any], said: Sequence[str]) -> None:
        self._setup = setup
        self._llm = llm
        self.version = _version()
        # of several processes that share layers, each has a part of all of them
        seen, *_ = looked = llm.apply_model(look)
        self.kernels = with_log(seen[0], said)
        self._weights_bytes = sum(weights_bytes for _, weights_bytes in looked)
        self.settings = self._resolved(arguments, said)

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """One request through the synchronous interface."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            logprobs=top_logprobs or None,
        )
        with self._uncompiled_sampler(top_logprobs):
            (answer,) = self._llm.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)
        (choice,) = answer.outputs
        # the class of `metrics` changed more than once; what it lacks is not known
        ttft_s = getattr(answer.metrics, "first_token_latency", None)
        return Completion(
            token_ids=list(choice.token_ids),
            prompt_tokens=len(answer.prompt_token_ids),
            finish_reason=str(choice.finish_reason),
            cached_tokens=answer.num_cached_tokens,
            ttft_s=ttft_s or None,
            logprobs=_logprobs(choice.logprobs) if top_logprobs else None,
        )

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """All prompts at once; stepwise by the engine's own synchronous step, each of which must serve all of them."""
        return (vllm_batch.steps if stepwise else vllm_batch.at_once)(self._llm, prompts, output_len)

    def tracer(self, folder: Path) -> None:
        """Nothing of its own: the engine computes in this process."""
        if self._setup.tensor_parallel > 1:
            raise UnsupportedByEngine(
                "with several GPUs vLLM computes in other processes: trace it with tensor_parallel 1"
            )

    def memory(self) -> Mapping[str, int]:
        """Weights, KV cache as vLLM planned it, and the most that was in use."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        found = {"weights_bytes": self._weights_bytes}
        if cache.num_gpu_blocks and cache.block_size:
            found["kv_cache_tokens"] = int(cache.num_gpu_blocks) * int(cache.block_size)
        if self._setup.device == "cuda":
            import torch

            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        else:
            # Linux counts in KiB
            found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return found

    def close(self) -> None:
        """The process ends, and with it an engine that lives in it."""

    def _resolved(self, arguments: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
        import torch

        config = self._llm.llm_engine.vllm_config
        groups = [field.name for field in dataclasses.fields(config) if field.name.endswith("_config")]
        resolved = {name: plain(getattr(config, name)) for name in groups}
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "enable_chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "enable_prefix_caching": config.cache_config.enable_prefix_caching,
            "kv_cache_dtype": str(config.cache_config.cache_dtype),
            "threads": torch.get_num_threads(),
            "disabled_kernels": os.environ.get("VLLM_DISABLED_KERNELS", ""),
            "arguments": plain(dict(arguments)),
            "log": list(said),
            **{name: group for name, group in resolved.items() if isinstance(group, dict)},
        }

    @contextmanager
    def _uncompiled_sampler(self, top_logprobs: int) -> Iterator[None]:
        """Ranking log-probabilities is a torch.compile'd function of its own: 18 s on a CPU, for a few comparisons."""
        if not top_logprobs or self._setup.graphs != "eager":
            yield
            return
        import torch

        torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            torch.compiler.set_stance("default")


def _logprobs(rows: Any) -> list[dict[int, float]] | None:
    if rows is None:
        return None
    return [{int(token): float(entry.logprob) for token, entry in row.items()} for row in rows]


@contextmanager
def _log_of(name: str) -> Iterator[list[str]]:
    """Lines of a logger that say what was selected, as they come."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if SAID.search(message) and message not in lines:
                lines.append(message)

    keep = Keep()
    logger = logging.getLogger(name)
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)


def _fields() -> frozenset[str]:
    from vllm import EngineArgs

    return frozenset(field.name for field in dataclasses.fields(EngineArgs))


def _choices(name: str) -> tuple[str, ...]:
    """The words that an argument takes, where its type lists them."""
    from vllm import EngineArgs

    try:
        annotation = typing.get_type_hints(EngineArgs).get(name)
    except NameError:
        # vLLM 0.26 annotates with names that it imports for type checkers only; it judges the word when it starts
        return ()
    return tuple(str(word) for word in typing.get_args(annotation))


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _sentence(error: Exception) -> str:
    """What is not offered, in one line and without what pydantic adds: a heading before, what it was given after."""
    words = " ".join(str(error).split()).rpartition("Value error, ")[2]
    return words.split(" [type=")[0][:LONGEST_REASON]
