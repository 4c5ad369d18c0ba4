"""FlashInfer's batch decode as a provider. Owns the call; kernels and schedule are FlashInfer's.

Written for FlashInfer 0.2 to 0.6 (`BatchDecodeWithPagedKVCacheWrapper`). `plan`, which an engine calls once per step
for all layers, is made before the timed call; the timed call is `run` in the mode for CUDA graphs.
"""

from __future__ import annotations

import importlib

import torch

from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_peers import incompatible, installed_version, require_table, starts

EXPECTED = "BatchDecodeWithPagedKVCacheWrapper as in FlashInfer 0.2 to 0.6"
WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's documentation recommends."""
LEAST_TENSOR_CORE_GROUP = 4
"""From this many query heads of a KV head on its documentation recommends the tensor-core kernel."""


def decode(point: Point, inputs: Inputs) -> Prepared:
    """`run` of a planned decode wrapper, NHD layout. UnsupportedPoint without FlashInfer."""
    require_table(point, "FlashInfer")
    version = installed_version("flashinfer", inputs, triton=False, distribution="flashinfer-python")
    sizes = Sizes.of(point)
    try:
        wrapper_type = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    except (ImportError, AttributeError) as error:
        raise incompatible("flashinfer", version, EXPECTED, error) from error
    device, y = inputs["q"].device, inputs["y"]
    lengths = inputs["seq_lens"]
    pages = -(-lengths // sizes.block_size)
    page_starts = starts(pages)
    page_list = torch.cat(
        [inputs["block_tables"][sequence, : int(count)] for sequence, count in enumerate(pages.tolist())]
    )
    last = (lengths - (pages - 1) * sizes.block_size).to(torch.int32)
    tensor_cores = sizes.group >= LEAST_TENSOR_CORE_GROUP
    wrapper = wrapper_type(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=torch.empty_like(page_starts),
        paged_kv_indices_buffer=torch.empty_like(page_list),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    try:
        wrapper.plan(
            page_starts,
            page_list,
            last,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.block_size,
            q_data_type=sizes.dtype,
            kv_data_type=sizes.dtype,
            sm_scale=sizes.scale,
        )
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedPoint(f"FlashInfer {version} refuses the point: {error}") from error
    caches = (inputs["k_cache"], inputs["v_cache"])

    def run() -> None:
        wrapper.run(inputs["q"], caches, out=y)

    return Prepared(run=run, config={"TENSOR_CORES": int(tensor_cores)}, config_source="library")
