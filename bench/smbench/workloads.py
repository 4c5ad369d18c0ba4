"""What engines are asked to do: workloads, their axes, and the least work that any engine needs for them.

Owns the definitions and the arithmetic. Does not own how an engine is driven (`worker.serving`) nor which cells a
recipe has (`recipe`).
"""

from __future__ import annotations

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

    def fault(self, name: str, value: AxisValue) -> str | None:
        """What is wrong with a value, None where nothing is."""
        if self.text:
            return None if isinstance(value, str) and value else f"{name} = {value!r} is no text"
        if self.choices:
            return None if value in self.choices else f"{name} = {value!r} is none of {', '.join(self.choices)}"
        if isinstance(value, int) and value >= self.minimum:
            return None
        return f"{name} = {value!r} is no integer of at least {self.minimum}"


WORKLOADS: Mapping[str, Mapping[str, AxisRule]] = {
    "generate": {
        "model": AxisRule("which weights: NAME@REVISION of a hub, synthetic:SHAPE or folder:NAME@HASH", text=True),
        "dtype": AxisRule("activations and KV cache", choices=tuple(FLOAT_BYTES)),
        "input_len": AxisRule("prompt tokens of a request"),
        "output_len": AxisRule("tokens that a request generates", minimum=2),
        "scheduling": AxisRule(
            "chunked: a prompt is processed in chunks; whole: in one piece; v0-default: the scheduler of vLLM 0.6",
            choices=("chunked", "whole", "v0-default"),
        ),
        "chunk_tokens": AxisRule("most tokens that one step processes; the context limit where prompts are whole"),
        "attention": AxisRule("attention backend", choices=("default", "flash-attention", "flashinfer", "triton")),
        "graphs": AxisRule(
            "default: the engine's own choice (compiled, piecewise graphs); full: whole steps as CUDA graphs, not "
            "compiled; eager: neither",
            choices=("default", "full", "eager"),
        ),
    },
}
"""Workload to its axes. `generate`: requests one after the other, each a prompt of token ids and a fixed length."""

MEASURES = ("e2e_latency", "ttft", "tpot")
"""What a `generate` cell measures of each request; names of metrics."""


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


def work_of(facts: ModelFacts, axes: Mapping[str, AxisValue]) -> Mapping[str, Work]:
    """The least work of one request of a `generate` cell, by measure.

    A prefill reads all linear weights once a chunk and the keys and values of all earlier chunks; a decode step reads
    all weights, the head and the whole KV cache. Attention counts half of the square, since it is causal.
    """
    dtype = str(axes["dtype"])
    length, output = int(axes["input_len"]), int(axes["output_len"])
    chunk = min(length, int(axes["chunk_tokens"]))
    chunks = -(-length // chunk)
    kv, head, weights = facts.kv_token_bytes(dtype), facts.head_bytes(dtype), facts.weight_bytes(dtype)
    earlier_tokens = sum(i * chunk for i in range(chunks))
    width = facts.layers * facts.heads * facts.head_dim
    head_flops = 2 * facts.hidden * facts.vocabulary
    prefill = Work(
        bytes=chunks * weights + head + kv * (earlier_tokens + length),
        flops=2 * facts.linear_parameters * length + 2 * width * length**2 + head_flops,
    )
    # the mean step: half of the output is in the cache
    seen = length + output // 2
    step = Work(
        bytes=weights + head + kv * seen,
        flops=2 * facts.linear_parameters + 4 * width * seen + head_flops,
    )
    whole = Work(
        bytes=prefill.bytes + (output - 1) * step.bytes,
        flops=prefill.flops + (output - 1) * step.flops,
    )
    return {"e2e_latency": whole, "ttft": prefill, "tpot": step}
