"""sglang's Triton decode kernel as a provider. Owns the call; the kernel and its number of splits are sglang's.

Written for sglang 0.5.16. Its cache is addressed by token: `kv_indices` has a row number for each token of each
sequence, whatever the page size. An engine writes that list and the splits of each sequence once per step for all
layers, so both are made before the timed call, which is the attention of one layer: split kernel and merge.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from smbench_kernels import hardware
from smbench_kernels.op import Inputs, Point, Prepared
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_peers import incompatible, installed_version, require_table, starts, token_rows

EXPECTED = "decode_attention_fwd and get_num_kv_splits_triton as in sglang 0.5.16"
MODULES = (
    ("sglang.kernels.ops.attention.decode_attention", "sglang.kernels.ops.attention.metadata"),
    ("sglang.srt.layers.attention.triton_ops.decode_attention", "sglang.srt.layers.attention.triton_backend"),
)
"""Where the two functions are: in 0.5.16, and before."""
MAX_SPLITS = 8
"""Default of `--triton-attention-num-kv-splits`."""
LEAST_SCHEDULED = 256


def decode(point: Point, inputs: Inputs) -> Prepared:
    """`decode_attention_fwd` over a list of tokens. UnsupportedPoint without sglang."""
    require_table(point, "sglang")
    sizes = Sizes.of(point)
    forward, choose_splits = _functions(inputs)
    device, y = inputs["q"].device, inputs["y"]
    rows = torch.cat([token_rows(inputs, sequence) for sequence in range(sizes.batch)])
    row_starts = starts(inputs["seq_lens"])
    caches = [inputs[name].view(-1, sizes.kv_heads, sizes.head_dim) for name in ("k_cache", "v_cache")]
    splits = torch.empty(sizes.batch, dtype=torch.int32, device=device)
    choose_splits[(1,)](
        splits,
        inputs["seq_lens"],
        sizes.batch,
        1,
        sizes.heads,
        sizes.kv_heads,
        MAX_SPLITS,
        hardware.of(device).sm_count,
        MAX_NUM_SEQ=max(LEAST_SCHEDULED, 1 << (sizes.batch - 1).bit_length()),
    )
    partials = torch.empty((sizes.batch, sizes.heads, MAX_SPLITS, sizes.head_dim), dtype=torch.float32, device=device)
    lse = torch.empty((sizes.batch, sizes.heads, MAX_SPLITS), dtype=torch.float32, device=device)

    def run() -> None:
        forward(inputs["q"], *caches, y, row_starts, rows, partials, lse, splits, MAX_SPLITS, sizes.scale, 1.0, 1.0)

    return Prepared(run=run, config={"MAX_SPLITS": MAX_SPLITS}, config_source="library")


def _functions(inputs: Inputs) -> tuple[Any, Any]:
    version = installed_version("sglang", inputs, triton=True)
    errors: list[object] = []
    for kernel, metadata in MODULES:
        try:
            forward = importlib.import_module(kernel).decode_attention_fwd
            choose_splits = importlib.import_module(metadata).get_num_kv_splits_triton
        except (ImportError, AttributeError) as error:
            errors.append(error)
            continue
        names = list(inspect.signature(forward).parameters)
        if names[9:13] == ["max_kv_splits", "sm_scale", "k_scale", "v_scale"]:
            return forward, choose_splits
        errors.append(f"decode_attention_fwd takes {', '.join(names)}")
    raise incompatible("sglang", version, EXPECTED, "; ".join(str(error) for error in errors))
