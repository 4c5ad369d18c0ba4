"""Shapes of models: the published configurations that synthetic checkpoints copy, and hub models that have them.

Owns these rows. Does not own what they mean for work and memory (`workloads`) nor how a checkpoint is made
(`worker.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""`architectures` of `config.json` that the formulas of `workloads.ModelFacts` describe."""

BITS = 4
GROUP = 128

QUANTIZATION: Mapping[str, Any] = {
    "quant_method": "gptq",
    "bits": BITS,
    "group_size": GROUP,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "checkpoint_format": "gptq",
    "true_sequential": True,
    "static_groups": False,
    # without this list an engine that loads dummy weights finds no quantized layer and silently runs in float16
    "modules_in_block_to_quantize": [
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
        ["self_attn.o_proj"],
        ["mlp.up_proj", "mlp.gate_proj"],
        ["mlp.down_proj"],
    ],
}
"""The `quantization_config` of all GPTQ checkpoints of Qwen2.5 with 4 bits, and of every quantized synthetic one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Qwen2 model, by their names in its `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_id: int
    source: str
    weights: Literal["gptq", "bfloat16"] = "gptq"
    """Packed weights of 4 bits beside float16, or bfloat16 throughout."""

    @property
    def config(self) -> dict[str, Any]:
        """The `config.json` of a checkpoint of this shape."""
        packed = self.weights == "gptq"
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "float16" if packed else "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
            **({"quantization_config": dict(QUANTIZATION)} if packed else {}),
        }


_QUANTIZED: Mapping[str, Shape] = {
    "tiny": Shape(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        source="ours: the least that every quantized kernel takes (128 rows a group, outputs in multiples of 128)",
    ),
    "qwen2.5-0.5b": Shape(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
        source="config.json of Qwen/Qwen2.5-0.5B-Instruct",
    ),
    "qwen2.5-7b": Shape(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
        source="config.json of Qwen/Qwen2.5-7B-Instruct",
    ),
    "qwen2.5-32b": Shape(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
        source="config.json of Qwen/Qwen2.5-32B-Instruct",
    ),
}

_PLAIN: Mapping[str, Shape] = {
    **{f"{name}-bf16": replace(shape, weights="bfloat16") for name, shape in _QUANTIZED.items()},
    "qwen2.5-14b-bf16": Shape(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
        source="config.json of Qwen/Qwen2.5-14B-Instruct",
        weights="bfloat16",
    ),
}

SHAPES: Mapping[str, Shape] = {**_QUANTIZED, **_PLAIN}
"""Name to shape; a name that ends in -bf16 is one whose weights are not quantized."""

HUB: Mapping[str, str] = {
    "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4@c83e67dfb2664f5039fd4cd99e206799e27dd800": "qwen2.5-32b",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4@e9c932ac1893a49ae0fc497ad6e1e86e2e39af20": "qwen2.5-7b",
    "Qwen/Qwen2.5-32B-Instruct@5ede1c97bbab6ce5cda5812749b4c0bdf79b18dd": "qwen2.5-32b-bf16",
    "Qwen/Qwen2.5-14B-Instruct@cf98f3b3bbb457ad9e2bb7baf9a0125b6b88caa8": "qwen2.5-14b-bf16",
    "Qwen/Qwen2.5-7B-Instruct@a09a35458c702b33eeacc393d103063234e8bc28": "qwen2.5-7b-bf16",
}
"""Pinned models of the hub whose configuration is known before they are downloaded, and their shape."""
