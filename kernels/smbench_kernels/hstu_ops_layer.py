"""hstu_layer, hstu_layer_silu_u: a training step of an HSTU layer, or of several, through autograd. Owns our providers.

The two differ in what SiLU is applied to: u, v, q and k, as in document 003, or u alone, as in Meta's layer. They are
two operations and not an axis, since no axis has a default: every cell of the first would have got another identity.

The variants are in `hstu_layer`, the definition in `hstu_definition`, other projects' layers in `hstu_ops_layer_peers`.
A call is a step with gradients that were reset:
forward pass, then the gradients of the input and of every parameter in new tensors, which `finish` copies. Its halves
are what document 003 times: there gradients are added to those of the steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from smbench_kernels import hstu, hstu_layer
from smbench_kernels import hstu_definition as definition
from smbench_kernels.hstu import Jagged
from smbench_kernels.hstu_ops_attention import by_sequence
from smbench_kernels.op import Inputs, Op, Passes, Point, Prepared, UnsupportedPoint

Layer = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Jagged], torch.Tensor]

OP = Op(
    name="hstu_layer",
    doc="x -> LayerNorm, linear, SiLU, attention, LayerNorm * u, linear, + x, and every gradient of it",
    axes=definition.LAYER_AXES,
    make_inputs=definition.layer_inputs,
    reference=definition.layer_reference,
    work=definition.layer_work,
    tolerance=definition.layer_tolerance,
    providers={
        "torch": "smbench_kernels.hstu_ops_layer:torch_layer",
        "native": "smbench_kernels.hstu_ops_layer:native",
        "native-compiled": "smbench_kernels.hstu_ops_layer:native_compiled",
        "native-attention": "smbench_kernels.hstu_ops_layer:native_attention",
        "native-cutlass": "smbench_kernels.hstu_ops_layer:native_cutlass",
        "fused": "smbench_kernels.hstu_ops_layer:fused",
        "fused-ln": "smbench_kernels.hstu_ops_layer:fused_ln",
        "fused-ln-silu": "smbench_kernels.hstu_ops_layer:fused_ln_silu",
        "fused-least": "smbench_kernels.hstu_ops_layer:fused_least",
        "fused-none": "smbench_kernels.hstu_ops_layer:fused_none",
        "nvidia-fused": "smbench_kernels.hstu_ops_layer_peers:nvidia_fused",
        "nvidia-fused-ln": "smbench_kernels.hstu_ops_layer_peers:nvidia_fused_ln",
        "nvidia-fused-ln-silu": "smbench_kernels.hstu_ops_layer_peers:nvidia_fused_ln_silu",
    },
    baseline="native",
    redraw=definition.redraw,
    outputs=("y", "dx", *definition.GRADIENTS),
    pass_work={"forward": definition.layer_forward_work, "backward": definition.layer_backward_work},
)

SILU_U = replace(
    OP,
    name="hstu_layer_silu_u",
    doc="hstu_layer with SiLU applied to u alone: v, q and k go into the attention as the linear map gives them",
    reference=partial(definition.layer_reference, silu=hstu.U),
    providers={
        "torch": "smbench_kernels.hstu_ops_layer:torch_layer_silu_u",
        "native": "smbench_kernels.hstu_ops_layer:native_silu_u",
        "native-attention": "smbench_kernels.hstu_ops_layer:native_attention_silu_u",
        "fused": "smbench_kernels.hstu_ops_layer:fused_silu_u",
        "fused-ln": "smbench_kernels.hstu_ops_layer:fused_ln_silu_u",
        "fused-least": "smbench_kernels.hstu_ops_layer:fused_least_silu_u",
        "fused-none": "smbench_kernels.hstu_ops_layer:fused_none_silu_u",
        "meta-fused": "smbench_kernels.hstu_ops_layer_peers:meta_fused",
        "meta-fused-least": "smbench_kernels.hstu_ops_layer_peers:meta_fused_least",
    },
)


def torch_layer(point: Point, inputs: Inputs, silu: str = hstu.UVQK) -> Prepared:
    """The definition in the inputs' own dtype, by autograd."""
    shape, batch = definition.layer_shape(point, silu), definition.batch_of(point, inputs)
    attend = by_sequence(batch, shape.alpha)

    def layer(x: torch.Tensor, params: Mapping[str, torch.Tensor], batch: Jagged) -> torch.Tensor:
        return hstu.layer_reference(x, params, batch, shape, attention=lambda q, k, v, *_: attend(q, k, v))

    return bind(point, inputs, layer, "library")


def variant(name: str, point: Point, inputs: Inputs, silu: str = hstu.UVQK) -> Prepared:
    """A row of `hstu_layer.VARIANTS`. UnsupportedPoint where it needs what is not here."""
    if point["dtype"] == "float32":
        raise UnsupportedPoint("our kernels take float16 and bfloat16")
    return bind(point, inputs, hstu_layer.layer(name, definition.layer_shape(point, silu)), "default")


native = partial(variant, "native")
native_compiled = partial(variant, "native-compiled")
native_cutlass = partial(variant, "native-cutlass")
native_attention = partial(variant, "native-attention")
fused = partial(variant, "fused")
fused_ln = partial(variant, "fused-ln")
fused_ln_silu = partial(variant, "fused-ln-silu")
fused_least = partial(variant, "fused-least")
fused_none = partial(variant, "fused-none")

torch_layer_silu_u = partial(torch_layer, silu=hstu.U)
native_silu_u = partial(variant, "native", silu=hstu.U)
native_attention_silu_u = partial(variant, "native-attention", silu=hstu.U)
fused_silu_u = partial(variant, "fused", silu=hstu.U)
fused_ln_silu_u = partial(variant, "fused-ln", silu=hstu.U)
fused_least_silu_u = partial(variant, "fused-least", silu=hstu.U)
fused_none_silu_u = partial(variant, "fused-none", silu=hstu.U)


def bind(point: Point, inputs: Inputs, layer: Layer, source: str) -> Prepared:
    """A differentiable layer, `layers` times with parameters of its own each, as a provider."""
    step = _Step(inputs, definition.Sizes.of(point).layers, definition.batch_of(point, inputs), layer)
    passes = Passes(step.forward, step.backward, step.reset)
    return Prepared(step.run, {}, source, finish=step.finish, passes=passes)


class _Step:
    """A training step on a set of inputs, with what it holds on to between its halves."""

    def __init__(self, inputs: Inputs, count: int, batch: Jagged, layer: Layer) -> None:
        self._inputs, self._batch, self._layer = inputs, batch, layer
        # leaves share the memory of the inputs, which change in place between calls
        self._x = inputs["x"].detach().requires_grad_()
        self._params = [
            {name: inputs[name][i].detach().requires_grad_() for name in definition.PARAMETERS} for i in range(count)
        ]
        self._y: torch.Tensor | None = None
        self._gradients: tuple[torch.Tensor, ...] = ()

    @property
    def _leaves(self) -> list[torch.Tensor]:
        return [self._x, *(params[name] for name in definition.PARAMETERS for params in self._params)]

    def run(self) -> None:
        """A whole step. No gradient is there before, so that none has to be added to or set to zero."""
        self.reset()
        y = self._through()
        self._gradients = torch.autograd.grad(y, self._leaves, self._inputs["dy"])
        self._y = y.detach()

    def forward(self) -> None:
        # the step before goes first: two at a time are not what a training loop holds
        self._y = None
        self._y = self._through()

    def backward(self) -> None:
        assert self._y is not None, "backward() comes after forward()"
        torch.autograd.backward(self._y, self._inputs["dy"])
        self._y = self._y.detach()
        self._gradients = tuple(leaf.grad for leaf in self._leaves if leaf.grad is not None)

    def reset(self) -> None:
        self._y, self._gradients = None, ()
        for leaf in self._leaves:
            leaf.grad = None

    def finish(self) -> None:
        """Copy the latest output and gradients to where the operation defines them."""
        assert self._y is not None, "finish() comes after run()"
        self._inputs["y"].copy_(self._y)
        dx, *gradients = self._gradients
        self._inputs["dx"].copy_(dx)
        layers = len(self._params)
        for i, name in enumerate(definition.GRADIENTS):
            for layer in range(layers):
                self._inputs[name][layer].copy_(gradients[i * layers + layer])

    def _through(self) -> torch.Tensor:
        y = self._x
        for params in self._params:
            y = self._layer(y, params, self._batch)
        return y
