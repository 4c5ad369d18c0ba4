"""Which operations exist. A new operation is one file and one row here."""

from __future__ import annotations

from typing import cast

from smbench_kernels.op import Op, load

OPS = {
    "bgmv_shrink": "smbench_kernels.bgmv_shrink:OP",
    "bgmv_expand": "smbench_kernels.bgmv_expand:OP",
    "sgmv_shrink": "smbench_kernels.sgmv_shrink:OP",
    "sgmv_expand": "smbench_kernels.sgmv_expand:OP",
    "lora_linear": "smbench_kernels.lora_linear:OP",
    "lora_metadata": "smbench_kernels.lora_metadata:OP",
    "paged_attention": "smbench_kernels.paged_attention:OP",
    "hstu_attention_forward": "smbench_kernels.hstu_ops_attention:FORWARD",
    "hstu_attention_backward": "smbench_kernels.hstu_ops_attention:BACKWARD",
    "hstu_layer": "smbench_kernels.hstu_ops_layer:OP",
    "hstu_layer_silu_u": "smbench_kernels.hstu_ops_layer:SILU_U",
    "hstu_block": "smbench_kernels.hstu_block_ops:OP",
    "hstu_request": "smbench_kernels.hstu_request_ops:OP",
    "hstu_bookkeeping": "smbench_kernels.hstu_bookkeeping:OP",
}
"""Operation name to `module:attribute`, imported on demand."""


def op(name: str) -> Op:
    """The operation of that name. KeyError lists the known names."""
    if name not in OPS:
        msg = f"unknown op {name!r}; known: {', '.join(OPS)}"
        raise KeyError(msg)
    return cast(Op, load(OPS[name]))
