"""Other projects' HSTU attention kernels as providers. Owns the calls; the kernels are theirs.

- Meta's Triton kernels: package `generative_recommenders` (facebookresearch/generative-recommenders, June 2025).
- NVIDIA's Triton kernels: NVIDIA/recsys-examples (July 2026), whose folders `examples` and `examples/hstu` are to be on
  the path: it is no package, its modules are `commons` and `ops`.
- NVIDIA's CUTLASS kernels: as in the layer's variant `native-cutlass`, see `hstu_layer_attention`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from smbench_kernels import hstu_definition as definition
from smbench_kernels import hstu_layer_attention
from smbench_kernels.hstu import Jagged
from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint

META = "generative_recommenders.ops.triton.triton_hstu_attention"
NVIDIA = "ops.triton_ops.triton_hstu_attention"
CALLS = ("triton_hstu_attention_fwd", "triton_hstu_attention_bwd")
TMA_CAPABILITY = (9, 0)
REMOVED = ("_experimental_descriptor_load", "_experimental_descriptor_store")
"""Meta's kernels name these for a path that is not taken here. Triton 3.6 has removed them and resolves names of dead
branches as well, so that something has to bear the name."""


def meta_forward(point: Point, inputs: Inputs) -> Prepared:
    """Meta's autotuned kernel on pointers."""
    return _forward(point, inputs, _attention(META, "generative_recommenders", inputs), {})


def meta_backward(point: Point, inputs: Inputs) -> Prepared:
    """Meta's autotuned kernel on pointers, whose dq is added up in the inputs' dtype."""
    return _backward(point, inputs, _attention(META, "generative_recommenders", inputs), {})


def nvidia_forward(point: Point, inputs: Inputs) -> Prepared:
    """NVIDIA's version of Meta's kernel, by the copy engine where there is one: that takes contiguous q, k, v only.

    They are copied before the timed call, to its advantage.
    """
    module = _attention(NVIDIA, "recsys-examples", inputs)
    scaling = {"scaling_seqlen": int(point["seq_len"])}
    if torch.cuda.get_device_capability(inputs["uvqk"].device) < TMA_CAPABILITY:
        return _forward(point, inputs, module, scaling)
    copies = tuple(part.contiguous() for part in definition.split(point, inputs["uvqk"]))

    def begin() -> None:
        for copy, part in zip(copies, definition.split(point, inputs["uvqk"]), strict=True):
            copy.copy_(part)

    return _forward(point, inputs, module, {**scaling, "enable_tma": True}, copies, begin)


def nvidia_backward(point: Point, inputs: Inputs) -> Prepared:
    """NVIDIA's version of Meta's kernel, which does not resolve the default of `scaling_seqlen`: it is given."""
    module = _attention(NVIDIA, "recsys-examples", inputs)
    return _backward(point, inputs, module, {"scaling_seqlen": int(point["seq_len"])})


def cutlass_forward(point: Point, inputs: Inputs) -> Prepared:
    """Its output is copied where nothing is timed."""
    call = _cutlass(point, inputs)
    q, k, v = definition.split(point, inputs["uvqk"])
    return _copied(lambda: (call(q, k, v),), inputs, ("y",))


def cutlass_backward(point: Point, inputs: Inputs) -> Prepared:
    """The backward pass alone: the forward pass runs before."""
    call = _cutlass(point, inputs)
    leaves = [part.detach().requires_grad_() for part in definition.split(point, inputs["uvqk"])]
    kept: list[torch.Tensor] = []

    def begin() -> None:
        kept[:] = [call(*leaves)]

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(kept[0], leaves, inputs["dout"], retain_graph=True)

    return _copied(backward, inputs, ("dq", "dk", "dv"), begin)


def _attention(name: str, package: str, inputs: Inputs) -> Any:
    require(name, package, inputs["uvqk"])
    return triton_module(name, package, CALLS)


def triton_module(name: str, package: str, attributes: tuple[str, ...]) -> Any:
    """A module with those attributes. UnsupportedPoint where there is none."""
    import triton.language as tl

    for removed in REMOVED:
        if not hasattr(tl, removed):
            setattr(tl, removed, tl.load)
    try:
        module: Any = importlib.import_module(name)
        for attribute in attributes:
            getattr(module, attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise UnsupportedPoint(f"{package} is installed, but not as this provider knows it: {error}") from error
    return module


def require(name: str, package: str, on: torch.Tensor) -> None:
    """UnsupportedPoint where a package has no module of that name, or a tensor is on no GPU."""
    try:
        found = importlib.util.find_spec(name) is not None
    # a parent package that is missing, or another package of the same name
    except (ImportError, AttributeError, ValueError):
        found = False
    if not found:
        raise UnsupportedPoint(f"{package} is not installed in this stack")
    if not on.is_cuda:
        raise UnsupportedPoint(f"the HSTU kernels of {package} need an NVIDIA GPU")


def causal_without_context(point: Point) -> None:
    """UnsupportedPoint for what these Triton kernels do not take."""
    if point["mask"] == "noncausal":
        raise UnsupportedPoint("these kernels are causal")
    if point["mask"] == "contextual":
        raise UnsupportedPoint("these kernels take one number of contextual tokens for all sequences")


def _forward(
    point: Point,
    inputs: Inputs,
    module: Any,
    more: dict[str, int],
    parts: tuple[torch.Tensor, ...] = (),
    begin: Callable[[], None] = lambda: None,
) -> Prepared:
    """The call on q, k and v, which are the inputs' views unless `parts` are given."""
    causal_without_context(point)
    q, k, v = parts or definition.split(point, inputs["uvqk"])
    batch, alpha = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha

    def run() -> tuple[torch.Tensor]:
        out = module.triton_hstu_attention_fwd(
            N=batch.max_seqlen, alpha=alpha, q=q, k=k, v=v, **{**_common(batch), **more}
        )
        return (out,)

    return _copied(run, inputs, ("y",), begin)


def _backward(point: Point, inputs: Inputs, module: Any, more: dict[str, int]) -> Prepared:
    causal_without_context(point)
    q, k, v = definition.split(point, inputs["uvqk"])
    batch, alpha = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha
    gradients = {name: inputs[name] for name in ("dq", "dk", "dv")}

    def run() -> None:
        module.triton_hstu_attention_bwd(
            dout=inputs["dout"], q=q, k=k, v=v, **gradients, N=batch.max_seqlen, alpha=alpha, **_common(batch), **more
        )

    return Prepared(run, {}, "library")


def _common(batch: Jagged) -> dict[str, Any]:
    """What both directions of the Triton kernels take."""
    return {
        "seq_offsets": batch.offsets,
        "num_targets": batch.num_targets,
        "max_attn_len": 0,
        "contextual_seq_len": 0,
        "sort_by_length_indices": None,
        "enable_tma": False,
    }


def _cutlass(point: Point, inputs: Inputs) -> Callable[..., torch.Tensor]:
    """The attention of the layer's variant `native-cutlass`, which knows the package."""
    if not inputs["uvqk"].is_cuda:
        raise UnsupportedPoint("NVIDIA's CUTLASS attention needs an NVIDIA GPU")
    if point["mask"] == "noncausal":
        raise UnsupportedPoint("NVIDIA's CUTLASS attention takes candidates only with a causal mask")
    attend = hstu_layer_attention.cutlass()
    batch, alpha = definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha
    return lambda q, k, v: attend(q, k, v, batch, alpha)


def _copied(
    compute: Callable[[], tuple[torch.Tensor, ...]],
    inputs: Inputs,
    names: tuple[str, ...],
    begin: Callable[[], None] = lambda: None,
) -> Prepared:
    """A library that makes its own outputs: they are copied after the timed call."""
    latest: list[torch.Tensor] = []

    def run() -> None:
        latest[:] = compute()

    def finish() -> None:
        for name, tensor in zip(names, latest, strict=True):
            inputs[name].copy_(tensor)

    return Prepared(run, {}, "library", begin=begin, finish=finish)
