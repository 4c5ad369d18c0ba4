"""hstu_attention_forward, hstu_attention_backward: the attention of a layer alone. Owns our providers and PyTorch's.

The definitions are in `hstu_definition`, the kernels in `hstu_attention` (Triton, portable) and `hstu_attention_sm90`
(Hopper), other projects' in `hstu_ops_peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from smbench_kernels import hstu, hstu_attention, hstu_attention_triton
from smbench_kernels import hstu_attention_configs as configurations
from smbench_kernels import hstu_definition as definition
from smbench_kernels.hstu import Jagged
from smbench_kernels.op import Config, Inputs, Op, Point, Prepared, UnsupportedPoint

FORWARD = Op(
    name="hstu_attention_forward",
    doc="y = silu(alpha q k^T) / N, masked, @ v, over jagged sequences; q, k and v are views of one tensor",
    axes=definition.ATTENTION_AXES,
    make_inputs=definition.forward_inputs,
    reference=definition.forward_reference,
    work=definition.forward_work,
    tolerance=definition.attention_tolerance,
    providers={
        "torch": "smbench_kernels.hstu_ops_attention:torch_forward",
        "smbench": "smbench_kernels.hstu_ops_attention:portable_forward",
        "smbench-sm90": "smbench_kernels.hstu_ops_attention:hopper_forward",
        "meta-triton": "smbench_kernels.hstu_ops_peers:meta_forward",
        "nvidia-triton": "smbench_kernels.hstu_ops_peers:nvidia_forward",
        "nvidia-cutlass": "smbench_kernels.hstu_ops_peers:cutlass_forward",
    },
    baseline="meta-triton",
    redraw=definition.redraw,
    tunable="smbench_kernels.hstu_attention_tuning:FORWARD",
)

BACKWARD = Op(
    name="hstu_attention_backward",
    doc="the gradients of hstu_attention_forward with respect to q, k and v, from those of y",
    axes=definition.ATTENTION_AXES,
    make_inputs=definition.backward_inputs,
    reference=definition.backward_reference,
    work=definition.backward_work,
    tolerance=definition.attention_tolerance,
    providers={
        "torch": "smbench_kernels.hstu_ops_attention:torch_backward",
        "smbench": "smbench_kernels.hstu_ops_attention:portable_backward",
        "smbench-sm90": "smbench_kernels.hstu_ops_attention:hopper_backward",
        "meta-triton": "smbench_kernels.hstu_ops_peers:meta_backward",
        "nvidia-triton": "smbench_kernels.hstu_ops_peers:nvidia_backward",
        "nvidia-cutlass": "smbench_kernels.hstu_ops_peers:cutlass_backward",
    },
    baseline="meta-triton",
    redraw=definition.redraw,
    outputs=("dq", "dk", "dv"),
    tunable="smbench_kernels.hstu_attention_tuning:BACKWARD",
)

HOPPER = "smbench_kernels.hstu_attention_sm90"


def portable_forward(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench`: our Triton kernel, on any arch."""
    _require_half(point)
    config = configurations.default_forward(hstu_attention.capability(inputs["uvqk"].device), int(point["head_dim"]))
    return _forward(point, inputs, partial(hstu_attention.portable_forward, config=config), config)


def portable_backward(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench`: our Triton kernels, on any arch."""
    _require_half(point)
    shape, batch = definition.Sizes.of(point).shape, definition.batch_of(point, inputs)
    problem = hstu_attention_triton.Problem(batch, shape.heads, shape.head_dim, shape.alpha)
    fits = hstu_attention_triton.turn(problem, inputs["uvqk"].element_size()) > 0
    capability = hstu_attention.capability(inputs["uvqk"].device)
    config = configurations.default_backward(capability, shape.head_dim, fits)
    return _backward(point, inputs, partial(hstu_attention.portable_backward, config=config), config)


def _require_half(point: Point) -> None:
    if definition.Sizes.of(point).dtype not in hstu_attention.DTYPES:
        raise UnsupportedPoint(f"our kernels take bfloat16 and float16, not {point['dtype']}")


def hopper_forward(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench-sm90`. UnsupportedPoint where it says why not."""
    return _forward(point, inputs, _hopper(point, inputs).forward)


def hopper_backward(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench-sm90`. UnsupportedPoint where it says why not."""
    return _backward(point, inputs, _hopper(point, inputs).backward)


def _hopper(point: Point, inputs: Inputs) -> Any:
    module: Any = importlib.import_module(HOPPER)
    q, _, _ = definition.split(point, inputs["uvqk"])
    if not q.is_cuda:
        raise UnsupportedPoint("the Hopper kernels need an NVIDIA GPU of compute capability 9.0")
    if reason := module.supports(q, definition.batch_of(point, inputs)):
        raise UnsupportedPoint(str(reason))
    return module


def _forward(
    point: Point, inputs: Inputs, call: Callable[..., torch.Tensor], config: Config = MappingProxyType({})
) -> Prepared:
    q, k, v = definition.split(point, inputs["uvqk"])
    batch, alpha, y = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha, inputs["y"]

    def run() -> None:
        call(q, k, v, batch, alpha, out=y)

    return Prepared(run, config, "default")


def _backward(
    point: Point, inputs: Inputs, call: Callable[..., object], config: Config = MappingProxyType({})
) -> Prepared:
    q, k, v = definition.split(point, inputs["uvqk"])
    batch, alpha = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha
    gradients = {name: inputs[name] for name in ("dq", "dk", "dv")}

    def run() -> None:
        call(inputs["dout"], q, k, v, batch, alpha, **gradients)

    return Prepared(run, config, "default")


def torch_forward(point: Point, inputs: Inputs) -> Prepared:
    """The definition in the inputs' own dtype, sequence by sequence: what anyone would write first."""
    q, k, v = definition.split(point, inputs["uvqk"])
    batch, alpha, y = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha, inputs["y"]
    attend = by_sequence(batch, alpha)

    def run() -> None:
        y.copy_(attend(q, k, v))

    return Prepared(run, {}, "library")


def torch_backward(point: Point, inputs: Inputs) -> Prepared:
    """What autograd makes of `torch_forward`, whose own time is in it: nothing is kept between calls."""
    batch, alpha = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha
    attend = by_sequence(batch, alpha)

    def run() -> None:
        leaves = [part.detach().requires_grad_() for part in definition.split(point, inputs["uvqk"])]
        gradients = torch.autograd.grad(attend(*leaves), leaves, inputs["dout"])
        for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
            inputs[name].copy_(gradient)

    return Prepared(run, {}, "library")


def by_sequence(batch: Jagged, alpha: float) -> Callable[..., torch.Tensor]:
    """PyTorch's attention with lengths and masks looked up once: a timed call may not wait for the device."""
    spans = batch.sequences()
    hidden = [~_mask(batch, span) for span in spans]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outputs = []
        for span, mask in zip(spans, hidden, strict=True):
            queries, keys, values = (part[span.rows].transpose(0, 1) for part in (q, k, v))
            scores = torch.nn.functional.silu(queries @ keys.transpose(1, 2) * alpha) / batch.max_seqlen
            outputs.append((scores.masked_fill(mask, 0.0) @ values).transpose(0, 1))
        return torch.cat(outputs)

    return attend


def _mask(batch: Jagged, span: hstu.Span) -> torch.Tensor:
    return hstu.visible(span.length, span.targets, span.contextuals, batch.causal, batch.offsets.device)
