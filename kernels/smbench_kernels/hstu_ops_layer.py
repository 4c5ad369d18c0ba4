"""hstu_layer: one training step of an HSTU layer, or of several, through PyTorch's autograd. Owns its providers.

The variants are in `hstu_layer`, the definition in `hstu_definition`. A call is a step with gradients that were reset:
forward pass, then the gradients of the input and of every parameter in new tensors, which `finish` copies. Its halves
are what document 003 times: there gradients are added to those of the steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    },
    baseline="native",
    redraw=definition.redraw,
    outputs=("y", "dx", *definition.GRADIENTS),
    pass_work={"forward": definition.layer_forward_work, "backward": definition.layer_backward_work},
)


def torch_layer(point: Point, inputs: Inputs) -> Prepared:
    """The definition in the inputs' own dtype, by autograd."""
    sizes, batch = definition.Sizes.of(point), definition.batch_of(point, inputs)
    attend = by_sequence(batch, sizes.shape.alpha)

    def layer(x: torch.Tensor, params: Mapping[str, torch.Tensor], batch: Jagged) -> torch.Tensor:
        return hstu.layer_reference(x, params, batch, sizes.shape, attention=lambda q, k, v, *_: attend(q, k, v))

    return bind(point, inputs, layer, "library")


def variant(name: str, point: Point, inputs: Inputs) -> Prepared:
    """A row of `hstu_layer.VARIANTS`. UnsupportedPoint where it needs what is not here."""
    if point["dtype"] == "float32":
        raise UnsupportedPoint("our kernels take float16 and bfloat16")
    return bind(point, inputs, hstu_layer.layer(name, definition.Sizes.of(point).shape), "default")


native = partial(variant, "native")
native_compiled = partial(variant, "native-compiled")
native_cutlass = partial(variant, "native-cutlass")
native_attention = partial(variant, "native-attention")
fused = partial(variant, "fused")
fused_ln = partial(variant, "fused-ln")
fused_ln_silu = partial(variant, "fused-ln-silu")
fused_least = partial(variant, "fused-least")
fused_none = partial(variant, "fused-none")


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
