"""What engines are asked to do: workloads, their axes, and the least work that any engine needs for them.

Owns the definitions and the arithmetic. Does not own how an engine is driven (`worker.serving`) nor which cells a
recipe has (`recipe`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smbench.result import Work

AxisValue = int | str
FLOAT_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class AxisRule:
    """What an axis of a workload takes: one of some words, or an integer of at least `minimum`; any string for text."""

    meaning: str
    choices: tuple[str, ...] = ()
    minimum: int = 1
    text: bool = False
    form: str = ""
    """A regular expression that a text must match, where not any will do; `meaning` says it in words."""

    def fault(self, name: str, value: AxisValue) -> str | None:
        """What is wrong with a value, None where nothing is."""
        if self.text:
            if not isinstance(value, str) or not value:
                return f"{name} = {value!r} is no text"
            return (
                None if not self.form or re.fullmatch(self.form, value) else f"{name} = {value!r} is not {self.meaning}"
            )
        if self.choices:
            return None if value in self.choices else f"{name} = {value!r} is none of {', '.join(self.choices)}"
        if isinstance(value, int) and value >= self.minimum:
            return None
        return f"{name} = {value!r} is no integer of at least {self.minimum}"


_MODEL = AxisRule("which weights: NAME@REVISION of a hub, synthetic:SHAPE or folder:NAME@HASH", text=True)
_DTYPE = AxisRule("activations and KV cache", choices=tuple(FLOAT_BYTES))
_GRAPHS = AxisRule(
    "default: the engine's own choice (compiled, piecewise graphs); full: whole steps as CUDA graphs, not "
    "compiled; eager: neither",
    choices=("default", "full", "eager"),
)
_TENSOR_PARALLEL = AxisRule("GPUs that share every layer")
_DATASET = AxisRule(
    "random: seeded tokens; shared-prefix: the first half of a prompt is common to groups of four; sharegpt: first "
    "questions of the user's file",
    choices=("random", "shared-prefix", "sharegpt"),
)
_NUM_PROMPTS = AxisRule("requests")
_PROMPT = AxisRule("prompt tokens of a request; with sharegpt the most that one has")

WORKLOADS: Mapping[str, Mapping[str, AxisRule]] = {
    "generate": {
        "model": _MODEL,
        "dtype": _DTYPE,
        "input_len": AxisRule("prompt tokens of a request"),
        "output_len": AxisRule("tokens that a request generates", minimum=2),
        "scheduling": AxisRule(
            "chunked: a prompt is processed in chunks; whole: in one piece; v0-default: the scheduler of vLLM 0.6",
            choices=("chunked", "whole", "v0-default"),
        ),
        "chunk_tokens": AxisRule("most tokens that one step processes; the context limit where prompts are whole"),
        "attention": AxisRule("attention backend", choices=("default", "flash-attention", "flashinfer", "triton")),
        "graphs": _GRAPHS,
    },
    "static_batch": {
        "model": _MODEL,
        "dtype": _DTYPE,
        "batch": AxisRule("prompts that are handed over together and stay together"),
        "input_len": AxisRule("prompt tokens of each"),
        "output_len": AxisRule("tokens that each generates"),
        "tensor_parallel": _TENSOR_PARALLEL,
        "graphs": _GRAPHS,
    },
    "offline": {
        "model": _MODEL,
        "dtype": _DTYPE,
        "dataset": _DATASET,
        "num_prompts": _NUM_PROMPTS,
        "input_len": _PROMPT,
        "output_len": AxisRule("tokens that each generates"),
        "tensor_parallel": _TENSOR_PARALLEL,
        "graphs": _GRAPHS,
    },
    "online": {
        "model": _MODEL,
        "dtype": _DTYPE,
        "dataset": _DATASET,
        "num_prompts": _NUM_PROMPTS,
        "input_len": _PROMPT,
        "output_len": AxisRule("tokens that each generates", minimum=2),
        "request_rate": AxisRule(
            "the word inf, or requests per second as a decimal above 0", text=True, form=r"inf|(?=.*[1-9])\d+(\.\d+)?"
        ),
        "max_concurrency": AxisRule("most requests at a time; 0 for no limit", minimum=0),
        "tensor_parallel": _TENSOR_PARALLEL,
        "graphs": _GRAPHS,
    },
}
"""Workload to its axes.

`generate`: requests one after the other, each a prompt of token ids and a fixed length. `static_batch`: one batch whose
prompts are processed in one step and whose tokens follow in lockstep. `offline`: many prompts at once, scheduled as the
engine likes. `online`: the engine's own server under a load client.
"""

MEASURES: Mapping[str, tuple[str, ...]] = {
    "generate": ("e2e_latency", "ttft", "tpot"),
    "static_batch": ("prefill_latency", "decode_latency", "e2e_latency"),
    "offline": ("e2e_latency",),
    "online": ("ttft", "tpot", "itl", "e2e_latency", "duration"),
}
"""Workload to what its cells measure; names of metrics.

A sample is of a request in `generate` and `online`, but for `duration`, which is the whole load's; of a repetition of
the whole batch in `static_batch` and `offline`, where the sample of `decode_latency` is the median step.
"""

SHARING = 4
"""Prompts of a group that have a prefix in common, with dataset `shared-prefix`."""
SHORTEST_SHAREGPT = 4
"""Prompt tokens of the shortest conversation that counts: sglang and vLLM drop shorter ones."""


def measures_of(workload: str, axes: Mapping[str, AxisValue]) -> tuple[str, ...]:
    """What a cell measures: a single output token has no decode step."""
    names = MEASURES[workload]
    return tuple(n for n in names if n not in ("decode_latency", "tpot")) if axes["output_len"] == 1 else names


def gpus_of(axes: Mapping[str, AxisValue]) -> int:
    """GPUs that a cell computes on."""
    return int(axes.get("tensor_parallel", 1))


def prompts_of(workload: str, axes: Mapping[str, AxisValue]) -> int:
    """Prompts of one request, batch or load."""
    return int(axes["batch"] if workload == "static_batch" else axes.get("num_prompts", 1))


def shared_tokens(axes: Mapping[str, AxisValue]) -> int:
    """Leading tokens that a prompt has in common with the others of its group."""
    return int(axes["input_len"]) // 2 if axes.get("dataset") == "shared-prefix" else 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The numbers of a dense decoder-only transformer with gated MLP that its work follows from."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    bits: int | None
    """Width of quantized weights; None where linear layers are in the activations' dtype."""
    group: int | None
    """Rows that share a scale and a zero; None where nothing is quantized."""
    tied_embeddings: bool
    context: int
    """Most positions that the model was made for."""

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all linear layers but the head: with quantization, scales of 16 bits and packed zeros included."""
        if self.bits is None:
            return self.linear_parameters * FLOAT_BYTES[dtype]
        per_weight_bits = self.bits + ((16 + self.bits) / self.group if self.group else 0.0)
        return round(self.linear_parameters * per_weight_bits / 8)

    def head_bytes(self, dtype: str) -> int:
        """Bytes of the output head."""
        return self.hidden * self.vocabulary * FLOAT_BYTES[dtype]

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * FLOAT_BYTES[dtype]

    def resident_bytes(self, dtype: str) -> int:
        """Bytes of all weights on the device, embeddings included."""
        embeddings = 1 if self.tied_embeddings else 2
        return self.weight_bytes(dtype) + embeddings * self.head_bytes(dtype)


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    """The facts in a Hugging Face `config.json` of the Llama or Qwen2 family.

    KeyError names a key that is missing; ValueError for an architecture whose work these formulas do not describe.
    """
    if config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts"):
        raise ValueError("mixtures of experts are not described by the formulas of a dense model")
    heads = int(config["num_attention_heads"])
    quantization = config.get("quantization_config") or {}
    bits = quantization.get("bits")
    group = quantization.get("group_size")
    return ModelFacts(
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        vocabulary=int(config["vocab_size"]),
        bits=int(bits) if bits is not None else None,
        group=int(group) if group is not None and int(group) > 0 else None,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        context=int(config["max_position_embeddings"]),
    )


def work_of(facts: ModelFacts, axes: Mapping[str, AxisValue], workload: str = "generate") -> Mapping[str, Work]:
    """The least work of one sample of a cell, by measure; a measure for which nothing is sure is absent.

    With several GPUs it is what all of them do together.
    """
    return _WORK[workload](facts, axes)


def _generate(facts: ModelFacts, axes: Mapping[str, AxisValue]) -> Mapping[str, Work]:
    """Of one request.

    A prefill reads all linear weights once a chunk and the keys and values of all earlier chunks; a decode step reads
    all weights, the head and the whole KV cache. Attention counts half of the square, since it is causal.
    """
    dtype = str(axes["dtype"])
    length, output = int(axes["input_len"]), int(axes["output_len"])
    chunk = min(length, int(axes["chunk_tokens"]))
    chunks = -(-length // chunk)
    earlier_tokens = sum(i * chunk for i in range(chunks))
    once = _prefill(facts, dtype, 1, length)
    prefill = Work(
        bytes=once.bytes + (chunks - 1) * facts.weight_bytes(dtype) + facts.kv_token_bytes(dtype) * earlier_tokens,
        flops=once.flops,
    )
    step = _step(facts, dtype, 1, length, output)
    return {"e2e_latency": _sum(prefill, step, output - 1), "ttft": prefill, "tpot": step}


def _static_batch(facts: ModelFacts, axes: Mapping[str, AxisValue]) -> Mapping[str, Work]:
    """Of one repetition: a single prefill step of all prompts, then output_len - 1 steps."""
    dtype, batch = str(axes["dtype"]), int(axes["batch"])
    length, output = int(axes["input_len"]), int(axes["output_len"])
    prefill = _prefill(facts, dtype, batch, length)
    step = _step(facts, dtype, batch, length, output)
    return {
        "prefill_latency": prefill,
        "decode_latency": step,
        "e2e_latency": _sum(prefill, step, output - 1),
    }


def _offline(facts: ModelFacts, axes: Mapping[str, AxisValue]) -> Mapping[str, Work]:
    """Of all requests: as if all were served in one batch, and a prefix that several share computed and read once."""
    dtype, output = str(axes["dtype"]), int(axes["output_len"])
    prompts, length = int(axes["num_prompts"]), _least_prompt(axes)
    # tokens of a prompt that are its own on average, a group's first prompt standing for what is shared
    groups = -(-prompts // SHARING)
    own = length - shared_tokens(axes) * (prompts - groups) // prompts
    prefill, step = _prefill(facts, dtype, prompts, own), _step(facts, dtype, prompts, own, output)
    return {"e2e_latency": _sum(prefill, step, output - 1)}


def _online(facts: ModelFacts, axes: Mapping[str, AxisValue]) -> Mapping[str, Work]:
    """Of one request, and of the whole load.

    A client sees tokens when it reads them, and may read several at once: the time between two has no least work.
    """
    dtype, output = str(axes["dtype"]), int(axes["output_len"])
    own = _least_prompt(axes) - shared_tokens(axes)
    first = _prefill(facts, dtype, 1, own)
    return {
        "ttft": first,
        "e2e_latency": _sum(first, _step(facts, dtype, 1, own, output), output - 1),
        "duration": _offline(facts, axes)["e2e_latency"],
    }


_WORK = {"generate": _generate, "static_batch": _static_batch, "offline": _offline, "online": _online}


def _least_prompt(axes: Mapping[str, AxisValue]) -> int:
    """The least tokens of a prompt: a conversation of somebody's file may be short."""
    length = int(axes["input_len"])
    return min(length, SHORTEST_SHAREGPT) if axes["dataset"] == "sharegpt" else length


def _prefill(facts: ModelFacts, dtype: str, prompts: int, length: int) -> Work:
    """One step over whole prompts: all weights read once, keys and values written, one token for each prompt."""
    width = facts.layers * facts.heads * facts.head_dim
    flops = 2 * facts.linear_parameters * length + 2 * width * length**2 + 2 * facts.hidden * facts.vocabulary
    return Work(
        bytes=facts.weight_bytes(dtype) + facts.head_bytes(dtype) + prompts * facts.kv_token_bytes(dtype) * length,
        flops=prompts * flops,
    )


def _step(facts: ModelFacts, dtype: str, sequences: int, length: int, output: int) -> Work:
    """The mean decode step of sequences that began with `length` tokens: half of the output is in the cache."""
    seen = length + output // 2
    width = facts.layers * facts.heads * facts.head_dim
    flops = 2 * facts.linear_parameters + 4 * width * seen + 2 * facts.hidden * facts.vocabulary
    return Work(
        bytes=facts.weight_bytes(dtype) + facts.head_bytes(dtype) + sequences * facts.kv_token_bytes(dtype) * seen,
        flops=sequences * flops,
    )


def _sum(prefill: Work, step: Work, steps: int) -> Work:
    return Work(bytes=prefill.bytes + steps * step.bytes, flops=prefill.flops + steps * step.flops)
