"""What the worker asks of a serving engine, and which engines there are.

Owns the interface and the registry. A driver is one module here with the names of `Driver`; it imports its engine in
`preload` and `start` alone, so that naming an engine costs nothing. Does not own requests and clocks (`enginecell`) nor
processes (`serving`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

ENGINES: Mapping[str, str] = {
    "fake": "smbench.worker.engines.fake",
    "sglang": "smbench.worker.engines.sglang",
    "transformers": "smbench.worker.engines.transformers",
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
    chunk_tokens: int
    attention: str
    graphs: str
    seed: int
    limits: Limits
    settings: Mapping[str, int | str | bool]
    """By smbench's names; each driver lists the ones that it knows."""


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


def driver(name: str) -> Driver:
    """The driver of an engine. KeyError lists the engines that exist."""
    if name not in ENGINES:
        raise KeyError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    return cast(Driver, importlib.import_module(ENGINES[name]))


def setup_of(job: Mapping[str, Any]) -> Setup:
    """What a job of a request asks its engine to be."""
    axes, engine = job["axes"], job["engine"]
    return Setup(
        device=engine["device"],
        model=Path(engine["model"]["path"]),
        dtype=str(axes["dtype"]),
        input_len=int(axes["input_len"]),
        output_len=int(axes["output_len"]),
        scheduling=str(axes["scheduling"]),
        chunk_tokens=int(axes["chunk_tokens"]),
        attention=str(axes["attention"]),
        graphs=str(axes["graphs"]),
        seed=int(job["seed"]),
        limits=Limits(**engine["limits"]),
        settings=engine["settings"],
    )
