"""sglang's chunked sgmv (csgmv) LoRA kernels as providers. Owns the call; the kernels and their blocks are sglang's.

Written for sglang 0.5.16 to 0.5.23, called as its default LoRA backend calls them for a projection that is not fused
with others. Timed is what an engine enqueues for one layer. Not timed is what it does once per step for all layers:
sorting the tokens by adapter and cutting them into chunks. The launch has one block per chunk that exists, where an
engine's decode graph pads to its largest batch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from smbench_kernels.lora import SCALE, token_indices
from smbench_kernels.lora_peers import incompatible, installed_version
from smbench_kernels.op import Config, Inputs, Point, Prepared

EXPECTED = "chunked_sgmv_lora_shrink_forward and chunked_sgmv_lora_expand_forward as in sglang 0.5.16 to 0.5.23"
FOLDERS = ("sglang.kernels.ops.lora.dense", "sglang.kernels.ops.gemm")
"""Where the kernels are: in 0.5.23, and in 0.5.16."""
CHUNK = 16
"""Tokens in a chunk: the default of `--max-lora-chunk-size`."""


@dataclass(frozen=True, slots=True)
class _Library:
    """What is used of sglang."""

    shrink: Callable[..., torch.Tensor]
    expand: Callable[..., torch.Tensor]
    shrink_config: Callable[..., Mapping[str, int]]
    expand_config: Callable[..., Mapping[str, int]]
    batch_info: Callable[..., Any]


def shrink(point: Point, inputs: Inputs) -> Prepared:
    """Chunked shrink of `x` [T, h] by `weights` [L, r, h], both float16 or bfloat16, into a new tensor [T, r].

    That tensor has the dtype of `x` and is uninitialized where a token has no adapter, while the operation adds to a
    float32 `y`: `finish` adds the rows that count. UnsupportedPoint without sglang.
    """
    library = _library(inputs)
    x, weights, y = inputs["x"], inputs["weights"], inputs["y"]
    adapters = token_indices(inputs)
    rank, hidden_size = weights.shape[-2:]
    info = _chunks(library, adapters, weights.shape[0], rank)
    has_adapter = (adapters >= 0).unsqueeze(1)
    latest: list[torch.Tensor] = []

    def run() -> None:
        latest[:] = [library.shrink(x, weights, info, 1)]

    def finish() -> None:
        y.add_(torch.where(has_adapter, latest[0], 0), alpha=SCALE)

    config = library.shrink_config(K=hidden_size, R=rank, num_slices=1, chunk_size=CHUNK)
    return Prepared(run, _with_chunk(config), "library", finish=finish)


def expand(point: Point, inputs: Inputs) -> Prepared:
    """Chunked expand: adds `x` [T, r] times `weights` [L, h, r] to `y` [T, h], the latter two of one dtype.

    sglang's shrink hands `x` on in that dtype too, while here it is float32: `begin` rounds it.
    """
    library = _library(inputs)
    x, weights, y = inputs["x"], inputs["weights"], inputs["y"]
    hidden_size, rank = weights.shape[-2:]
    info = _chunks(library, token_indices(inputs), weights.shape[0], rank)
    slice_offsets = torch.tensor([0, hidden_size], dtype=torch.int32, device=y.device)
    rounded = x.to(weights.dtype)

    def begin() -> None:
        rounded.copy_(x)

    def run() -> None:
        library.expand(rounded, weights, info, slice_offsets, hidden_size, y)

    config = library.expand_config(K=hidden_size, R=rank, num_slices=1, chunk_size=CHUNK)
    return Prepared(run, _with_chunk(config), "library", begin=begin)


bgmv_shrink = sgmv_shrink = shrink
bgmv_expand = sgmv_expand = expand


def _library(inputs: Inputs) -> _Library:
    version = installed_version("sglang", inputs)
    # sglang keeps compiled kernels by a key without rank and dtype, so a second point of a process could run the
    # kernel of the first; Triton's own cache launches the same code
    os.environ.setdefault("SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE", "0")
    errors: list[str] = []
    for folder in FOLDERS:
        try:
            shrink_module = importlib.import_module(f"{folder}.chunked_sgmv_shrink")
            expand_module = importlib.import_module(f"{folder}.chunked_sgmv_expand")
            tuning = importlib.import_module(f"{folder}.lora_tuning_config")
            return _Library(
                shrink=shrink_module.chunked_sgmv_lora_shrink_forward,
                expand=expand_module.chunked_sgmv_lora_expand_forward,
                shrink_config=tuning.get_lora_shrink_config,
                expand_config=tuning.get_lora_expand_config,
                batch_info=importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo,
            )
        except (ImportError, AttributeError) as error:
            errors.append(str(error))
    raise incompatible("sglang", version, EXPECTED, "; ".join(errors))


def _chunks(library: _Library, adapters: torch.Tensor, num_loras: int, rank: int) -> Any:
    """The metadata of a batch: tokens sorted by adapter, each adapter's tokens cut into chunks. Synchronizes."""
    device = adapters.device
    # tokens without an adapter get one more adapter, of rank 0, as the engine gives them
    slots = torch.where(adapters < 0, num_loras, adapters)
    order = torch.argsort(slots, stable=True)
    found, counts = torch.unique_consecutive(slots[order], return_counts=True)
    chunk_slots: list[int] = []
    bounds = [0]
    for slot, count in zip(found.tolist(), counts.tolist(), strict=True):
        for first in range(0, count, CHUNK):
            chunk_slots.append(slot)
            bounds.append(bounds[-1] + min(CHUNK, count - first))

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return library.batch_info(
        use_cuda_graph=False,
        bs=adapters.numel(),
        num_segments=len(chunk_slots),
        seg_indptr=on_device(bounds),
        weight_indices=on_device(chunk_slots),
        lora_ranks=on_device([rank] * num_loras + [0]),
        scalings=torch.ones(num_loras + 1, dtype=torch.float32, device=device),
        max_len=CHUNK,
        seg_lens=None,
        permutation=order.to(torch.int32),
    )


def _with_chunk(config: Mapping[str, int]) -> Config:
    return {"BLOCK_M": CHUNK, **config}
