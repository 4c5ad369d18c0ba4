"""vLLM's Triton paged-attention kernels as providers. Owns the calls; kernels and launch parameters are vLLM's.

Written for vLLM 0.26 (`vllm.v1.attention.ops`). `unified` is what its Triton backend enqueues for a decode step: a
kernel with 16 segments of each sequence and their merge where the batch is small, one program for each sequence and
KV head elsewhere. `split_decode` is the flash-decoding kernel, with the number of splits that its MLA backend takes
where it has no other wish. Buffers are made once, as an engine does.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from smbench_kernels import hardware
from smbench_kernels.launch import next_power_of_two
from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_peers import incompatible, installed_version, require_table

EXPECTED = "unified_attention and decode_attention_fwd of vllm.v1.attention.ops as in vLLM 0.26"
SEGMENTS = 16
"""NUM_PAR_SOFTMAX_SEGMENTS of vLLM's Triton backend."""
LEAST_GRID = 128
"""MIN_LAUNCH_GRID_SIZE_2D of the same."""
LEAST_SPLIT = 512
"""_MIN_WORK_PER_SPLIT of its Triton MLA backend."""
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Batch sizes of vLLM's decode graphs by default: the backend's threshold is the nearest of them."""


def unified(point: Point, inputs: Inputs) -> Prepared:
    """`unified_attention` with the backend's own choice of segments. UnsupportedPoint without vLLM."""
    module = _ops("triton_unified_attention", point, inputs)
    sizes = Sizes.of(point)
    if next_power_of_two(sizes.block_size) != sizes.block_size:
        raise UnsupportedPoint(f"vLLM's kernel takes block sizes that are powers of two, not {sizes.block_size}")
    device, y = inputs["q"].device, inputs["y"]
    threshold = min(CAPTURE_SIZES, key=lambda size: abs(size - LEAST_GRID // sizes.kv_heads))
    buffers = (max(threshold, sizes.batch), sizes.heads, SEGMENTS)
    segments = torch.empty((*buffers, next_power_of_two(sizes.head_dim)), dtype=torch.float32, device=device)
    highest, sums = (torch.empty(buffers, dtype=torch.float32, device=device) for _ in range(2))
    query_starts = torch.arange(sizes.batch + 1, dtype=torch.int32, device=device)

    def run() -> None:
        module.unified_attention(
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
            window_size=(-1, -1),
            block_table=inputs["block_tables"],
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=segments,
            softmax_segm_max=highest,
            softmax_segm_expsum=sums,
        )

    return Prepared(run=run, config={"SEGMENTS": SEGMENTS, "THRESHOLD_3D": threshold}, config_source="library")


def split_decode(point: Point, inputs: Inputs) -> Prepared:
    """`decode_attention_fwd` over a table of pages. UnsupportedPoint without vLLM."""
    module = _ops("triton_decode_attention", point, inputs)
    sizes = Sizes.of(point)
    device, y = inputs["q"].device, inputs["y"]
    splits = decode_splits(sizes, hardware.of(device).sm_count)
    partials = torch.empty((sizes.batch, sizes.heads, splits, sizes.head_dim + 1), dtype=torch.float32, device=device)
    lse = torch.empty((sizes.batch, sizes.heads), dtype=torch.float32, device=device)
    one = torch.ones((), dtype=torch.float32, device=device)

    def run() -> None:
        module.decode_attention_fwd(
            inputs["q"],
            inputs["k_cache"],
            inputs["v_cache"],
            y,
            lse,
            inputs["block_tables"],
            inputs["seq_lens"],
            partials,
            splits,
            sizes.scale,
            sizes.block_size,
            k_scale=one,
            v_scale=one,
        )

    return Prepared(run=run, config={"SPLITS": splits}, config_source="library")


def decode_splits(sizes: Sizes, sm_count: int) -> int:
    """Splits of each sequence, by the rule of vLLM's Triton MLA backend."""
    return min(next_power_of_two(max(1, sizes.seq_len // LEAST_SPLIT)), 2 * sm_count)


def _ops(name: str, point: Point, inputs: Inputs) -> Any:
    require_table(point, "vLLM")
    version = installed_version("vllm", inputs, triton=True)
    try:
        module = importlib.import_module(f"vllm.v1.attention.ops.{name}")
        function = module.unified_attention if "unified" in name else module.decode_attention_fwd
        has_triton = importlib.import_module("vllm.triton_utils").HAS_TRITON
    except (ImportError, AttributeError) as error:
        raise incompatible("vllm", version, EXPECTED, error) from error
    wanted = "softmax_segm_output" if "unified" in name else "lse"
    if wanted not in inspect.signature(function).parameters:
        raise incompatible("vllm", version, EXPECTED, f"{function.__name__} takes no {wanted}")
    if not has_triton:
        raise UnsupportedPoint(f"vllm {version} has disabled Triton: it finds no active driver here")
    return module
