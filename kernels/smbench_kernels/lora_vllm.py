"""vLLM's multi-LoRA Triton kernels as providers. Owns the call; the kernels and their launch parameters are vLLM's.

Written for vLLM 0.26 to 0.33 (`vllm.lora.ops.triton_ops`), called as its `PunicaWrapperGPU` calls them for a projection
that is not fused with others. Timed is what an engine enqueues for one layer: `lora_shrink`, which first zeroes its
float32 buffer, or `lora_expand` with `add_inputs`. Not timed is what an engine does once per step for all layers:
sorting the tokens by adapter (`LoRAKernelMeta`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from smbench_kernels.lora import SCALE, token_indices
from smbench_kernels.lora_peers import incompatible, installed_version
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint

EXPECTED = "lora_shrink, lora_expand and LoRAKernelMeta of vllm.lora.ops.triton_ops as in vLLM 0.26 to 0.33"


@dataclass(frozen=True, slots=True)
class _Library:
    """What is used of vLLM."""

    lora_shrink: Callable[..., None]
    lora_expand: Callable[..., None]
    make_metadata: Callable[..., Any]
    chosen_config: Callable[..., dict[str, int | None]]
    weight_caches: tuple[dict[Any, Any], ...]
    """Tables from a weight's address to its strides. They hold the weights, so every weight ever seen stays alive."""


def shrink(point: Point, inputs: Inputs) -> Prepared:
    """`lora_shrink` over `x` [T, h] and `weights` [L, r, h], both float16 or bfloat16, into a float32 buffer [1, T, r].

    The call overwrites that buffer, while the operation adds to `y`: `finish` adds it. UnsupportedPoint without vLLM.
    """
    library = _library(inputs)
    x, weights, y = inputs["x"], inputs["weights"], inputs["y"]
    # zeros, since the call returns early if no token has an adapter
    delta = torch.zeros((1, *y.shape), dtype=torch.float32, device=y.device)
    metadata = _metadata(library, inputs)

    def run() -> None:
        library.lora_shrink(x, [weights], delta, *metadata, SCALE)

    def finish() -> None:
        y.add_(delta[0])

    rank, hidden_size = weights.shape[-2:]
    return Prepared(run, _config(library, "shrink", x, weights, hidden_size, rank), "library", finish=finish)


def expand(point: Point, inputs: Inputs) -> Prepared:
    """`lora_expand` adds `x` [T, r] times `weights` [L, h, r] to `y` [T, h]. UnsupportedPoint without vLLM."""
    library = _library(inputs)
    x, weights, y = inputs["x"], inputs["weights"], inputs["y"]
    metadata = _metadata(library, inputs)
    sliced = x.unsqueeze(0)

    def run() -> None:
        library.lora_expand(sliced, [weights], y, *metadata, offset_start=0, add_inputs=True)

    hidden_size, rank = weights.shape[-2:]
    return Prepared(run, _config(library, "expand", x, weights, hidden_size, rank, add_inputs=True), "library")


bgmv_shrink = sgmv_shrink = shrink
bgmv_expand = sgmv_expand = expand


def _library(inputs: Inputs) -> _Library:
    version = installed_version("vllm", inputs)
    try:
        ops = importlib.import_module("vllm.lora.ops.triton_ops")
        utils = importlib.import_module("vllm.lora.ops.triton_ops.utils")
        has_triton = importlib.import_module("vllm.triton_utils").HAS_TRITON
        metadata = ops.LoRAKernelMeta
        library = _Library(
            lora_shrink=ops.lora_shrink,
            lora_expand=ops.lora_expand,
            make_metadata=metadata.make,
            chosen_config=utils.get_lora_op_configs,
            weight_caches=(getattr(utils, "_LORA_A_PTR_DICT", {}), getattr(utils, "_LORA_B_PTR_DICT", {})),
        )
    except (ImportError, AttributeError) as error:
        raise incompatible("vllm", version, EXPECTED, error) from error
    if "specialize_active_lora" not in inspect.signature(metadata.meta_args).parameters:
        raise incompatible("vllm", version, EXPECTED, "meta_args takes no specialize_active_lora")
    if not has_triton:
        raise UnsupportedPoint(f"vllm {version} has disabled Triton: it finds no active driver here")
    return library


def _metadata(library: _Library, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Tokens grouped by adapter, in the order that both calls take it. Runs on the device and synchronizes."""
    for cache in library.weight_caches:
        cache.clear()
    adapters = token_indices(inputs)
    tokens = adapters.numel()
    meta = library.make_metadata(inputs["weights"].shape[0], tokens, adapters.device)
    meta.prepare_tensors(adapters)
    arguments: tuple[torch.Tensor, ...] = meta.meta_args(tokens, specialize_active_lora=False)
    return arguments


def _config(
    library: _Library,
    op_type: str,
    x: torch.Tensor,
    weights: torch.Tensor,
    hidden_size: int,
    rank: int,
    add_inputs: bool | None = None,
) -> Config:
    """The launch parameters that vLLM chooses for this call: a tuned file of the user's, or its defaults."""
    chosen = library.chosen_config(
        op_type,
        # one more than the adapters, for "none"
        max_loras=weights.shape[0] + 1,
        batch=x.shape[0],
        hidden_size=hidden_size,
        rank=rank,
        num_slices=1,
        add_inputs=add_inputs,
    )
    return {name: value for name, value in chosen.items() if value is not None}
