"""Other projects' whole HSTU layers as providers, forward and backward. Owns the calls; layers and kernels are theirs.

- NVIDIA's: `FusedHSTULayerFunction` of NVIDIA/recsys-examples (July 2026, commit 43465aea), with its Triton attention.
  It is the layer that document 003 measures as `fused`: SiLU on u, v, q and k. To be on the path: the folders
  `examples` and `examples/hstu`, and PyPI's `nvtx`. Its module imports the package `hstu` (CUTLASS) at its head, which
  only its other branch needs: where that is not installed, the two imports have to go from a copy of the module.
- Meta's: `triton_hstu_preprocess_and_attention` and `triton_hstu_compute_output` of the package
  `generative_recommenders` (facebookresearch/generative-recommenders, June 2025, commit 2e81fab). SiLU on u alone.

Both have kernels that take a random number for dropout, which is off here, and draw one on the host where none is
given; whether it is a multiple of 16 makes Triton compile anew. They are given one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from smbench_kernels import hstu_definition as definition
from smbench_kernels.hstu import EPS, Jagged, Shape
from smbench_kernels.hstu_layer_native import Layer
from smbench_kernels.hstu_ops_layer import bind
from smbench_kernels.hstu_ops_peers import causal_without_context, require, triton_module
from smbench_kernels.op import Inputs, Point, Prepared

NVIDIA, NVIDIA_BACKENDS = "ops.fused_hstu_op", "configs"
META_FIRST = "generative_recommenders.ops.triton.triton_hstu_preprocess_and_attention"
META_SECOND = "generative_recommenders.ops.triton.triton_hstu_linear"
SEED = 1
"""Of a dropout that is off."""


def nvidia(point: Point, inputs: Inputs, *, norm: bool = False, silu: bool = False) -> Prepared:
    """NVIDIA's fused layer, what it computes again by its own two settings. UnsupportedPoint where it is not here."""
    package = "recsys-examples"
    require(NVIDIA, package, inputs["x"])
    causal_without_context(point)
    module = triton_module(NVIDIA, package, ("fused_hstu_op",))
    backend = triton_module(NVIDIA_BACKENDS, package, ("KernelBackend",)).KernelBackend.TRITON
    layer = nvidia_layer(module, backend, definition.Sizes.of(point).shape, norm=norm, silu=silu)
    return bind(point, inputs, layer, "library")


def nvidia_layer(module: Any, backend: object, shape: Shape, *, norm: bool, silu: bool) -> Layer:
    """The layer of NVIDIA's module on an attention of its own."""

    def run(x: torch.Tensor, params: Mapping[str, torch.Tensor], batch: Jagged) -> torch.Tensor:
        result: torch.Tensor = module.fused_hstu_op(
            input=x,
            seqlen_offsets=batch.offsets,
            max_seqlen=batch.max_seqlen,
            scaling_seqlen=batch.max_seqlen,
            linear_uvqk_weight=params["uvqk_weight"],
            linear_uvqk_bias=params["uvqk_bias"],
            linear_proj_weight=params["out_weight"],
            num_heads=shape.heads,
            linear_dim_per_head=shape.head_dim,
            attention_dim_per_head=shape.head_dim,
            ln_eps=EPS,
            dropout_ratio=0.0,
            training=False,
            input_norm_weight=params["norm_weight"],
            input_norm_bias=params["norm_bias"],
            output_norm_weight=params["out_norm_weight"],
            output_norm_bias=params["out_norm_bias"],
            attn_backend=backend,
            num_targets=batch.num_targets,
            num_contextuals=None,
            target_group_size=1,
            alpha=shape.alpha,
            causal=True,
            seed=SEED,
            residual=True,
            wgrad_stream=None,
            wgrad_event=None,
            recompute_input_layernorm=norm,
            recompute_input_silu=silu,
        )
        return result

    return run


def meta(point: Point, inputs: Inputs, *, again: bool = False) -> Prepared:
    """Meta's fused layer; `again` computes all that it can in its backward pass. UnsupportedPoint as above."""
    package = "generative_recommenders"
    require(META_FIRST, package, inputs["x"])
    causal_without_context(point)
    first = triton_module(META_FIRST, package, ("triton_hstu_preprocess_and_attention",))
    second = triton_module(META_SECOND, package, ("triton_hstu_compute_output",))
    layer = meta_layer(first, second, definition.Sizes.of(point).shape, again=again)
    return bind(point, inputs, layer, "library")


def meta_layer(first: Any, second: Any, shape: Shape, *, again: bool) -> Layer:
    """The layer of the two halves that are in Meta's modules."""

    def run(x: torch.Tensor, params: Mapping[str, torch.Tensor], batch: Jagged) -> torch.Tensor:
        u, attended = first.triton_hstu_preprocess_and_attention(
            x=x,
            norm_weight=params["norm_weight"],
            norm_bias=params["norm_bias"],
            norm_eps=EPS,
            num_heads=shape.heads,
            attn_dim=shape.head_dim,
            hidden_dim=shape.head_dim,
            uvqk_weight=params["uvqk_weight"],
            uvqk_bias=params["uvqk_bias"],
            max_seq_len=batch.max_seqlen,
            seq_offsets=batch.offsets,
            attn_alpha=shape.alpha,
            num_targets=batch.num_targets,
            recompute_uvqk_in_backward=again,
            recompute_normed_x_in_backward=again,
        )
        result: torch.Tensor = second.triton_hstu_compute_output(
            attn=attended.reshape(-1, shape.width),
            u=u,
            x=x,
            norm_weight=params["out_norm_weight"],
            norm_bias=params["out_norm_bias"],
            output_weight=params["out_weight"],
            eps=EPS,
            dropout_ratio=0.0,
            training=False,
            num_heads=shape.heads,
            linear_dim=shape.head_dim,
            seed=SEED,
            recompute_y_in_backward=again,
        )
        return result

    return run


nvidia_fused = nvidia
nvidia_fused_ln = partial(nvidia, norm=True)
nvidia_fused_ln_silu = partial(nvidia, norm=True, silu=True)
meta_fused = meta
meta_fused_least = partial(meta, again=True)
