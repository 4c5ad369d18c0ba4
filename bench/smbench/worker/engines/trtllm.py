"""TensorRT-LLM's LLM API with its PyTorch backend, 1.2 line. Owns how a cell is said in its words, and its answers.

Written against the sources of its repository in the 1.2 line: `tensorrt_llm/llmapi/llm.py` and `commands/serve.py` at
commit 4c05a748, `llmapi/llm_args.py` and `executor/result.py` of the same time. It computes in worker processes that
MPI starts, so nothing of the model can be looked at from here. Never run by us: it needs a GPU and NVIDIA's image.
Does not own requests.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smbench.worker.engines import BatchAnswer, Completion, ServeCommand, Setup, UnsupportedByEngine
from smbench.worker.engines.plain import plain
from smbench.worker.engines.streaming import Arrivals

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRTLLM_NO_USAGE_STATS": "1",
}
SETTINGS: Mapping[str, str] = {
    "prefix_caching": "whether prompts with a prefix in common by design may be answered from a cache",
    "disable_overlap_scheduler": "whether the next step is planned only after one has run; TensorRT-LLM decides",
}
ATTENTION: Mapping[str, str] = {"flashinfer": "FLASHINFER"}
"""Value of the axis to attn_backend; `default` is its own, TRTLLM."""
NO_END = -1
"""An id that no token has, for requests that go on past the end of text."""


def preload() -> None:
    """Import the LLM API."""
    from tensorrt_llm import LLM, SamplingParams  # noqa: F401


def start(setup: Setup) -> TensorRtLlm:
    """A running engine. UnsupportedByEngine for what this version does not offer."""
    arguments = arguments_of(setup)
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

    classes = {"kv_cache_config": KvCacheConfig, "cuda_graph_config": CudaGraphConfig}
    built = {
        name: classes[name](**value) if name in classes and value is not None else value
        for name, value in arguments.items()
    }
    llm = LLM(model=str(setup.model), skip_tokenizer_init=True, **built)
    return TensorRtLlm(llm, arguments)


def serve_command(setup: Setup, host: str, port: int) -> ServeCommand:
    """`trtllm-serve` with the arguments that the engine would get here, most of them in a file."""
    arguments = arguments_of(setup)
    file = _options(json.dumps(arguments))
    given = ["--host", host, "--port", str(port), "--backend", "pytorch", "--extra_llm_api_options", str(file)]
    sizes = {
        "--max_batch_size": "max_batch_size",
        "--max_num_tokens": "max_num_tokens",
        "--max_seq_len": "max_seq_len",
        "--tp_size": "tensor_parallel_size",
    }
    # on the command line as well, since these have other defaults there than none
    given += [part for option, name in sizes.items() if name in arguments for part in (option, str(arguments[name]))]
    return ServeCommand(
        argv=(sys.executable, "-m", "tensorrt_llm.commands.serve", "serve", str(setup.model), *given),
        # its server calls a model by the name of its folder
        model=setup.model.name,
        version=_version(),
        settings=plain(arguments),
    )


@functools.cache
def _options(text: str) -> Path:
    """A file with options as YAML, of which JSON is a part: one file for equal options, since commands are compared."""
    file = Path(tempfile.mkdtemp(prefix="smbench-trtllm-")) / "options.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def arguments_of(setup: Setup) -> dict[str, Any]:
    """What LLM() is called with, its configurations as mappings; memory_fraction is of what is free after loading."""
    if setup.device != "cuda":
        raise UnsupportedByEngine("TensorRT-LLM runs on a GPU only")
    if setup.scheduling not in ("one-step", "default", "chunked"):
        raise UnsupportedByEngine(f"TensorRT-LLM has no such scheduler as {setup.scheduling}")
    if setup.attention != "default" and setup.attention not in ATTENTION:
        raise UnsupportedByEngine(f"TensorRT-LLM has no attention backend {setup.attention!r}")
    limits = setup.limits
    cache: dict[str, Any] = {
        "enable_block_reuse": setup.prefix_caching,
        "free_gpu_memory_fraction": limits.memory_fraction,
    }
    if limits.kv_cache_bytes is not None:
        # the smaller of the two counts, and this one is the total of one GPU
        cache["max_gpu_total_bytes"] = limits.kv_cache_bytes // setup.tensor_parallel
    arguments: dict[str, Any] = {
        "dtype": setup.dtype,
        "tensor_parallel_size": setup.tensor_parallel,
        "max_batch_size": limits.max_num_seqs,
        "max_seq_len": limits.max_model_len,
        "kv_cache_config": cache,
        # every token comes out at once
        "stream_interval": 1,
        "cuda_graph_config": _graphs(setup),
    }
    if setup.attention != "default":
        arguments["attn_backend"] = ATTENTION[setup.attention]
    if setup.scheduling != "default":
        arguments["max_num_tokens"] = max(setup.chunk_tokens, limits.max_num_seqs)
        arguments["enable_chunked_prefill"] = setup.scheduling == "chunked"
    if setup.scheduling == "one-step":
        # a step is over before the next one is planned
        arguments["disable_overlap_scheduler"] = True
    if "disable_overlap_scheduler" in setup.settings:
        arguments["disable_overlap_scheduler"] = bool(setup.settings["disable_overlap_scheduler"])
    return arguments


def _graphs(setup: Setup) -> dict[str, Any] | None:
    """Graphs of decode steps; None for none."""
    if setup.graphs == "full":
        raise UnsupportedByEngine("TensorRT-LLM captures decode steps alone: graphs = default")
    if setup.graphs == "eager":
        return None
    sizes = {"batch_sizes": [setup.batch]} if setup.workload == "static_batch" else {}
    return {"enable_padding": not sizes, **sizes}


class TensorRtLlm:
    """A running `LLM`."""

    def __init__(self, llm: Any, arguments: Mapping[str, Any]) -> None:
        self._llm = llm
        self.version = _version()
        resolved = plain(llm.args.model_dump())
        self.settings: Mapping[str, Any] = {
            **(resolved if isinstance(resolved, dict) else {}),
            "arguments": plain(dict(arguments)),
        }
        attention = self.settings.get("attn_backend")
        # which layers run it is not said
        self.kernels: Mapping[str, Mapping[str, int]] = {"attention": {str(attention): 0}} if attention else {}

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """One request, streamed so that its first token can be timed."""
        first: list[float] = []
        began = time.perf_counter()
        (answer,), _ = asyncio.run(self._all([prompt], _sampling(output_len, top_logprobs), True, first))
        (choice,) = answer.outputs
        return Completion(
            token_ids=[int(token) for token in choice.token_ids],
            prompt_tokens=len(answer.prompt_token_ids),
            finish_reason=str(choice.finish_reason),
            cached_tokens=getattr(answer, "cached_tokens", None),
            ttft_s=first[0] - began if first else None,
            logprobs=_logprobs(choice.logprobs) if top_logprobs else None,
        )

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """All prompts at once; stepwise means that the stream is watched."""
        answers, arrivals = asyncio.run(self._all(prompts, _sampling(output_len, 0), stepwise, []))
        cached = [getattr(answer, "cached_tokens", None) for answer in answers]
        told = BatchAnswer(
            token_ids=[[int(token) for token in answer.outputs[0].token_ids] for answer in answers],
            prompt_tokens=[len(answer.prompt_token_ids) for answer in answers],
            finish_reasons=[str(answer.outputs[0].finish_reason) for answer in answers],
            cached_tokens=None if any(count is None for count in cached) else sum(count or 0 for count in cached),
        )
        return arrivals.timed(told) if stepwise else told

    def tracer(self, folder: Path) -> None:
        """It profiles its workers by numbers of steps that are fixed before it starts."""
        raise UnsupportedByEngine(
            "TensorRT-LLM computes in processes of its own, which torch's profiler does not reach"
        )

    def memory(self) -> Mapping[str, int]:
        """It says nothing of the kind here."""
        return {}

    def close(self) -> None:
        """End the workers."""
        self._llm.shutdown()

    async def _all(
        self, prompts: Sequence[Sequence[int]], sampling: Any, streamed: bool, first: list[float]
    ) -> tuple[list[Any], Arrivals]:
        """Every request's answer, whole; `first` gets the time of each chunk."""
        arrivals = Arrivals(len(prompts))
        # handed over within the loop, or their queues would not belong to it
        asked = [self._llm.generate_async(list(prompt), sampling, streaming=streamed) for prompt in prompts]

        async def follow(i: int, request: Any) -> Any:
            if not streamed:
                return await request.aresult()
            async for chunk in request:
                arrivals.saw(i, len(chunk.outputs[0].token_ids))
                first.append(time.perf_counter())
            return request

        return list(await asyncio.gather(*(follow(i, request) for i, request in enumerate(asked)))), arrivals


def _sampling(output_len: int, top_logprobs: int) -> Any:
    from tensorrt_llm import SamplingParams

    return SamplingParams(
        max_tokens=output_len,
        # greedy, by whichever sampler
        top_k=1,
        ignore_eos=True,
        # without a tokenizer it has to be told
        end_id=NO_END,
        pad_id=NO_END,
        detokenize=False,
        logprobs=top_logprobs or None,
    )


def _logprobs(rows: Any) -> list[dict[int, float]] | None:
    """Of each token; None where there are none, or only the chosen tokens' own."""
    if not rows or not isinstance(rows[0], Mapping):
        return None
    return [{int(token): float(entry.logprob) for token, entry in row.items()} for row in rows]


def _version() -> str:
    from tensorrt_llm.version import __version__

    return str(__version__)
