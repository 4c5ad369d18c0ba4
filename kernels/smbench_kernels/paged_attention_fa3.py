"""FlashAttention 3 with a page table, from vLLM's wheel, as a provider. Owns the call; kernel and splits are its own.

Written for vLLM 0.26 (`vllm.vllm_flash_attn`). The schedule, which an engine makes once per step for all layers, is
made before the timed call.
"""

from __future__ import annotations

import importlib

import torch

from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_peers import incompatible, installed_version, require_table

EXPECTED = "vllm.vllm_flash_attn with FlashAttention 3 as in vLLM 0.26"
PAGE_MULTIPLE = 16
"""vLLM's FlashAttention backend takes blocks of multiples of this size."""
CAPABILITY = 9
"""FlashAttention 3 is for Hopper alone."""


def decode(point: Point, inputs: Inputs) -> Prepared:
    """`flash_attn_varlen_func` with a block table. UnsupportedPoint without FlashAttention 3, and for small blocks."""
    require_table(point, "FlashAttention 3")
    version = installed_version("vllm", inputs, triton=False)
    sizes = Sizes.of(point)
    if sizes.block_size % PAGE_MULTIPLE:
        raise UnsupportedPoint(
            f"FlashAttention takes blocks of a multiple of {PAGE_MULTIPLE} tokens, not {sizes.block_size}"
        )
    device, y = inputs["q"].device, inputs["y"]
    if torch.cuda.get_device_capability(device)[0] != CAPABILITY:
        raise UnsupportedPoint("FlashAttention 3 runs on GPUs of compute capability 9.x alone")
    try:
        interface = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
        forward, schedule = interface.flash_attn_varlen_func, interface.get_scheduler_metadata
        if not interface.FA3_AVAILABLE:
            raise ImportError(interface.FA3_UNAVAILABLE_REASON)
    except (ImportError, AttributeError) as error:
        raise incompatible("vllm", version, EXPECTED, error) from error
    query_starts = torch.arange(sizes.batch + 1, dtype=torch.int32, device=device)
    metadata = schedule(
        batch_size=sizes.batch,
        max_seqlen_q=1,
        max_seqlen_k=sizes.seq_len,
        num_heads_q=sizes.heads,
        num_heads_kv=sizes.kv_heads,
        headdim=sizes.head_dim,
        cache_seqlens=inputs["seq_lens"],
        qkv_dtype=sizes.dtype,
        cu_seqlens_q=query_starts,
        page_size=sizes.block_size,
        causal=True,
    )

    def run() -> None:
        forward(
            q=inputs["q"],
            k=inputs["k_cache"],
            v=inputs["v_cache"],
            out=y,
            cu_seqlens_q=query_starts,
            max_seqlen_q=1,
            seqused_k=inputs["seq_lens"],
            max_seqlen_k=sizes.seq_len,
            softmax_scale=sizes.scale,
            causal=True,
            block_table=inputs["block_tables"],
            scheduler_metadata=metadata,
            fa_version=3,
        )

    return Prepared(run=run, config={}, config_source="library")
