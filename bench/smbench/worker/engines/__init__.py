"""What the worker asks of a serving engine, and which engines there are.

Owns the interface and the registry. A driver is one module here with the names of `Driver`; it imports its engine in
`preload` and `start` alone, so that naming an engine costs nothing. Does not own requests and clocks (`enginecell`) nor
processes (`serving`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

ENGINES: Mapping[str, str] = {
    "fake": "smbench.worker.engines.fake",
    "lmdeploy": "smbench.worker.engines.lmdeploy",
    "sglang": "smbench.worker.engines.sglang",
    "transformers": "smbench.worker.engines.transformers",
    "trtllm": "smbench.worker.engines.trtllm",
    "vllm": "smbench.worker.engines.vllm",
}
"""Name to module, loaded on demand."""


class UnsupportedByEngine(Exception):
    """The engine, in this version and on this device, does not offer what a cell asks; the message says what."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What all engines of a profile are given alike."""

    max_model_len: int
    max_num_seqs: int
    memory_fraction: float
    kv_cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that an engine is started with: the axes of a cell, its limits, its provider's settings."""

    device: str
    """`cuda` or `cpu`."""
    model: Path
    """Folder of the checkpoint."""
    dtype: str
    input_len: int
    output_len: int
    scheduling: str
    """`chunked`, `whole` or `v0-default` as the cell says; `one-step`: all prompts of a batch in one step of
    `chunk_tokens`; `default`: the engine's own way."""
    chunk_tokens: int
    """Most tokens of a step; 0 where scheduling is `default`."""
    attention: str
    graphs: str
    seed: int
    limits: Limits
    settings: Mapping[str, int | str | bool]
    """By smbench's names; each driver lists the ones that it knows."""
    workload: str = "generate"
    batch: int = 1
    """Prompts that are handed over together: those of a batch, or all of an offline cell; 1 of a server's."""
    tensor_parallel: int = 1
    """GPUs that share every layer."""
    prefix_caching: bool = False
    """Whether prompts may be answered from a cache of earlier ones: where the provider asks for it (setting
    `prefix_caching`) and the prompts of the dataset have prefixes in common by design."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine says of one request. Its time is not for the engine to say."""

    token_ids: Sequence[int]
    """Generated tokens."""
    prompt_tokens: int
    """As the engine counts them."""
    finish_reason: str
    cached_tokens: int | None
    """Prompt tokens from a prefix cache; None where the engine does not say."""
    ttft_s: float | None
    """From handing over the prompt to its first token, by the engine's own clock; None where it has none."""
    logprobs: Sequence[Mapping[int, float]] | None = None
    """For each generated token the log-probabilities, in nats, of the likeliest and of itself; None unless asked."""


StepClock = Literal["engine-step", "stream", "none"]


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What an engine says of a batch of prompts."""

    token_ids: Sequence[Sequence[int]]
    """Generated tokens of each prompt, in the order of the prompts."""
    prompt_tokens: Sequence[int]
    """Of each prompt, as the engine counts them."""
    finish_reasons: Sequence[str]
    """Of each prompt."""
    cached_tokens: int | None
    """Prompt tokens from a prefix cache, of all prompts; None where the engine does not say."""
    prefill_s: float | None = None
    """Host clock, from handing over the batch to having all first tokens; None where nobody saw it."""
    step_s: Sequence[float] = ()
    """Host clock of each decode step of the whole batch; empty where nobody saw them."""
    step_clock: StepClock = "none"
    """`engine-step`: around each synchronous step of the engine; `stream`: when the last prompt's token of a step came
    out of the engine's stream; `none`: only the whole was timed."""


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """The command of an engine's own OpenAI-compatible server, which listens on one host and port."""

    argv: Sequence[str]
    """Begins with this stack's own Python."""
    model: str
    """What requests have to name."""
    version: str
    settings: Mapping[str, Any]
    """What the server is told, under the engine's own names: JSON, no absolute path."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beyond the driver's ENVIRONMENT."""
    ready: str = "/health"
    """Path that answers 200 once requests can come."""


class Engine(Protocol):
    """A running engine."""

    version: str
    settings: Mapping[str, Any]
    """Every setting as the engine resolved it: JSON, no absolute path."""
    kernels: Mapping[str, Mapping[str, int]]
    """What really runs, by role (`linear`, `attention`, `head`): name of the implementation to number of layers."""

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """Greedy continuation of one prompt by exactly `output_len` tokens, end-of-text or not; nothing is detokenized.

        `top_logprobs` > 0 asks for that many log-probabilities of each token, which may cost time.
        """

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """Greedy continuation of all prompts by exactly `output_len` tokens each, handed over at once.

        `stepwise`: one step for all prompts, then one for each further token of all of them, each timed. Otherwise as
        fast as the engine can. RuntimeError where a step was not what it should have been.
        """

    def tracer(self, folder: Path) -> AbstractContextManager[None] | None:
        """What has the engine's own processes write traces of torch's profiler into `folder` meanwhile.

        None where everything is computed or launched by this very process. UnsupportedByEngine where it cannot be had.
        """

    def memory(self) -> Mapping[str, int]:
        """Bytes and tokens as of now: `weights_bytes`, `kv_cache_tokens`, `peak_bytes`; absent what it cannot tell."""

    def close(self) -> None:
        """End what the engine started."""


class Driver(Protocol):
    """A module of this package."""

    ENVIRONMENT: Mapping[str, str]
    """Environment variables that are set before anything of the engine is imported."""
    SETTINGS: Mapping[str, str]
    """Keys of `Setup.settings` to what they mean."""

    def preload(self) -> None:
        """Import the engine. Must neither touch a GPU nor start a thread: cells are forked from this process."""

    def start(self, setup: Setup) -> Engine:
        """A running engine. UnsupportedByEngine says what it does not offer."""

    def serve_command(self, setup: Setup, host: str, port: int) -> ServeCommand:
        """Its server's command; starts nothing. UnsupportedByEngine where it has none, or not for such a cell."""


def driver(name: str) -> Driver:
    """The driver of an engine. KeyError lists the engines that exist."""
    if name not in ENGINES:
        raise KeyError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    return cast(Driver, importlib.import_module(ENGINES[name]))


def setup_of(job: Mapping[str, Any]) -> Setup:
    """What a job of a request asks its engine to be."""
    axes, engine, workload = job["axes"], job["engine"], str(job["subject"])
    input_len, output_len = int(axes["input_len"]), int(axes["output_len"])
    batch = int(axes.get("batch", axes["num_prompts"] if workload == "offline" else 1))
    scheduling = str(axes.get("scheduling", "one-step" if workload == "static_batch" else "default"))
    return Setup(
        device=engine["device"],
        model=Path(engine["model"]["path"]),
        dtype=str(axes["dtype"]),
        input_len=input_len,
        output_len=output_len,
        scheduling=scheduling,
        chunk_tokens=batch * input_len if scheduling == "one-step" else int(axes.get("chunk_tokens", 0)),
        attention=str(axes.get("attention", "default")),
        graphs=str(axes["graphs"]),
        seed=int(job["seed"]),
        limits=Limits(**engine["limits"]),
        settings=engine["settings"],
        workload=workload,
        batch=batch,
        tensor_parallel=int(axes.get("tensor_parallel", 1)),
        prefix_caching=axes.get("dataset") == "shared-prefix" and bool(engine["settings"].get("prefix_caching")),
    )
