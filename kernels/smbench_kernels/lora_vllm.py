"""vLLM's multi-LoRA Triton kernels as providers. Owns the calls; the kernels are vLLM's.

Written for vLLM 0.26 to 0.33 (`vllm.lora.ops.triton_ops`), called as its `PunicaWrapperGPU` calls them. Timed is what
an engine enqueues for one layer: `lora_shrink`, which first zeroes its float32 buffer, `lora_expand` with `add_inputs`,
or for `lora_linear` the two after each other, all fused slices in each. Not timed is what an engine does once per step
for all layers: sorting the tokens by adapter (`LoRAKernelMeta`).

The launch parameters are vLLM's own choice, or (`-tuned`) given ones. vLLM takes given ones from files in a folder of
the user's, by the function `get_lora_op_configs`; for a given configuration its answer is the dictionary that it would
have read there, and whatever vLLM makes of that dictionary, it makes of it here. With given parameters, programs are
launched for the adapters that are active alone: a setting of vLLM's (`specialize_active_lora`) that is off unless one
sets it, to vLLM's favour. What is searched is in `lora_vllm_space`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from smbench_kernels import lora_vllm_space as space
from smbench_kernels.lora import SCALE, token_indices
from smbench_kernels.lora_linear import weights
from smbench_kernels.lora_peers import PARTS, PeerKernel, PeerLinear, incompatible, installed_version, joined, part_of
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint

EXPECTED = "lora_shrink, lora_expand and LoRAKernelMeta of vllm.lora.ops.triton_ops as in vLLM 0.26 to 0.33"


@dataclass(frozen=True, slots=True)
class Library:
    """What is used of vLLM."""

    lora_shrink: Callable[..., None]
    lora_expand: Callable[..., None]
    make_metadata: Callable[..., Any]
    chosen_config: Callable[..., dict[str, int | None]]
    utils: Any
    """The module with the tables from weights' addresses to pointers and strides. They hold the weights, so that every
    weight ever seen stays alive."""
    callers: tuple[Any, ...]
    """The modules that ask for launch parameters."""


@dataclass(frozen=True, slots=True)
class Tables:
    """vLLM's tables of one set of weights, made before a graph is captured: for several slices they are copied
    there."""

    library: Library
    a: dict[Any, Any] = field(default_factory=dict)
    b: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, library: Library, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> Tables:
        """The tables of some weights; those of earlier ones are forgotten, since their memory may have new owners."""
        utils = library.utils
        for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
            getattr(utils, name, {}).clear()
        if a and hasattr(utils, "_get_lora_a_ptr"):
            utils._get_lora_a_ptr(list(a), a[0].device)
        if b and hasattr(utils, "_get_lora_b_ptr"):
            utils._get_lora_b_ptr(list(b), 0, b[0].device)
        return cls(library, dict(getattr(utils, "_LORA_A_PTR_DICT", {})), dict(getattr(utils, "_LORA_B_PTR_DICT", {})))

    def use(self) -> None:
        """Bring them back for a call: another binding may have replaced them."""
        getattr(self.library.utils, "_LORA_A_PTR_DICT", {}).update(self.a)
        getattr(self.library.utils, "_LORA_B_PTR_DICT", {}).update(self.b)


def bind_shrink(point: Point, inputs: Inputs) -> Callable[[Config | None, str], Prepared]:
    """`lora_shrink` over `x` [T, h] and `weights` [L, r, h], both float16 or bfloat16, into a float32 buffer [1, T, r].

    The call overwrites that buffer, while the operation adds to `y`: `finish` adds it. UnsupportedPoint without vLLM.
    """
    library = load(inputs)
    x, a, y = inputs["x"], inputs["weights"], inputs["y"]
    # zeros, since the call returns early if no token has an adapter
    delta = torch.zeros((1, *y.shape), dtype=torch.float32, device=y.device)
    tables, grouped = Tables.of(library, [a], []), metadata(library, inputs, a.shape[0])

    def finish() -> None:
        y.add_(delta[0])

    def prepared(config: Config | None, source: str) -> Prepared:
        arguments = grouped(config)

        def run() -> None:
            tables.use()
            with given(library, {"shrink": config}):
                library.lora_shrink(x, [a], delta, *arguments, SCALE)

        return Prepared(run, config or _chosen(library, "shrink", x.shape[0], [a]), source, finish=finish)

    return prepared


def bind_expand(point: Point, inputs: Inputs) -> Callable[[Config | None, str], Prepared]:
    """`lora_expand` adds `x` [T, r] times `weights` [L, h, r] to `y` [T, h]. UnsupportedPoint without vLLM."""
    library = load(inputs)
    x, b, y = inputs["x"], inputs["weights"], inputs["y"]
    tables, grouped = Tables.of(library, [], [b]), metadata(library, inputs, b.shape[0])
    sliced = x.unsqueeze(0)

    def prepared(config: Config | None, source: str) -> Prepared:
        arguments = grouped(config)

        def run() -> None:
            tables.use()
            with given(library, {"expand": config}):
                library.lora_expand(sliced, [b], y, *arguments, offset_start=0, add_inputs=True)

        return Prepared(run, config or _chosen(library, "expand", x.shape[0], [b]), source)

    return prepared


def bind_linear(point: Point, inputs: Inputs) -> Callable[[Config | None, str], Prepared]:
    """Both calls of `add_lora_linear` with its buffer [S, T, r] float32. UnsupportedPoint without vLLM."""
    library = load(inputs)
    x, y = inputs["x"], inputs["y"]
    a, b = ([pair[side] for pair in weights(inputs)] for side in (0, 1))
    delta = torch.zeros((len(a), x.shape[0], a[0].shape[1]), dtype=torch.float32, device=x.device)
    tables, grouped = Tables.of(library, a, b), metadata(library, inputs, a[0].shape[0])

    def prepared(config: Config | None, source: str) -> Prepared:
        parts = {part: part_of(config, part) if config else None for part in PARTS}
        arguments = grouped(config)

        def run() -> None:
            tables.use()
            with given(library, parts):
                library.lora_shrink(x, a, delta, *arguments, SCALE)
                library.lora_expand(delta, b, y, *arguments, offset_start=0, add_inputs=True)

        chosen = joined(
            {part: _chosen(library, part, x.shape[0], side) for part, side in zip(PARTS, (a, b), strict=True)}
        )
        return Prepared(run, config or chosen, source)

    return prepared


def load(inputs: Inputs) -> Library:
    """vLLM's parts. UnsupportedPoint with the reason where they are not here or not as expected."""
    version = installed_version("vllm", inputs)
    try:
        ops = importlib.import_module("vllm.lora.ops.triton_ops")
        utils = importlib.import_module("vllm.lora.ops.triton_ops.utils")
        has_triton = importlib.import_module("vllm.triton_utils").HAS_TRITON
        meta = ops.LoRAKernelMeta
        library = Library(
            lora_shrink=ops.lora_shrink,
            lora_expand=ops.lora_expand,
            make_metadata=meta.make,
            chosen_config=utils.get_lora_op_configs,
            utils=utils,
            callers=tuple(importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{part}_op") for part in PARTS),
        )
        if any(not hasattr(caller, "get_lora_op_configs") for caller in library.callers):
            raise AttributeError("lora_shrink_op and lora_expand_op do not ask get_lora_op_configs")
    except (ImportError, AttributeError) as error:
        raise incompatible("vllm", version, EXPECTED, error) from error
    if "specialize_active_lora" not in inspect.signature(meta.meta_args).parameters:
        raise incompatible("vllm", version, EXPECTED, "meta_args takes no specialize_active_lora")
    if not has_triton:
        raise UnsupportedPoint(f"vllm {version} has disabled Triton: it finds no active driver here")
    return library


def metadata(library: Library, inputs: Inputs, loras: int) -> Callable[[Config | None], tuple[torch.Tensor, ...]]:
    """Tokens grouped by adapter, in the order that both calls take it. Runs on the device and synchronizes.

    With given launch parameters, programs are launched for as many adapters as are active (`specialize_active_lora`).
    """
    adapters = token_indices(inputs)
    tokens = adapters.numel()
    meta = library.make_metadata(loras, tokens, adapters.device)
    meta.prepare_tensors(adapters)

    def arguments(config: Config | None) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = meta.meta_args(tokens, specialize_active_lora=config is not None)
        return found

    return arguments


@contextmanager
def given(library: Library, parts: dict[str, Config | None]) -> Iterator[None]:
    """Within, vLLM's kernels get these launch parameters; a part without any asks vLLM's own function."""
    chosen = library.chosen_config

    def answer(op_type: str, *arguments: Any, **named: Any) -> dict[str, int | None]:
        config = parts.get(op_type)
        return {**config, "max_nreg": None} if config else chosen(op_type, *arguments, **named)

    if not any(parts.values()):
        yield
        return
    for caller in library.callers:
        caller.get_lora_op_configs = answer
    try:
        yield
    finally:
        for caller in library.callers:
            caller.get_lora_op_configs = chosen


def _chosen(library: Library, part: str, tokens: int, sides: Sequence[torch.Tensor]) -> Config:
    """The launch parameters that vLLM chooses for this call: a tuned file of the user's, or its defaults."""
    rows, columns = sides[0].shape[-2:]
    wide = max(side.shape[-2] for side in sides)
    chosen = library.chosen_config(
        part,
        # one more than the adapters, for "none"
        max_loras=sides[0].shape[0] + 1,
        batch=tokens,
        hidden_size=columns if part == "shrink" else wide,
        rank=rows if part == "shrink" else columns,
        num_slices=len(sides),
        add_inputs=None if part == "shrink" else True,
    )
    return {name: value for name, value in chosen.items() if value is not None}


_shrink = partial(
    PeerKernel, package="vllm", bind=bind_shrink, space=space.shrink, plan=space.shrink_plan, calls=space.shrink_calls
)
_expand = partial(
    PeerKernel, package="vllm", bind=bind_expand, space=space.expand, plan=space.expand_plan, calls=space.expand_calls
)
_kernels = {
    "bgmv_shrink": _shrink("bgmv_shrink"),
    "bgmv_expand": _expand("bgmv_expand"),
    "sgmv_shrink": _shrink("sgmv_shrink"),
    "sgmv_expand": _expand("sgmv_expand"),
}
_linear = PeerLinear("vllm", bind_linear, {part: _kernels[f"bgmv_{part}"] for part in PARTS})

bgmv_shrink, bgmv_shrink_tuned = _kernels["bgmv_shrink"].default, _kernels["bgmv_shrink"].tuned
bgmv_expand, bgmv_expand_tuned = _kernels["bgmv_expand"].default, _kernels["bgmv_expand"].tuned
sgmv_shrink, sgmv_shrink_tuned = _kernels["sgmv_shrink"].default, _kernels["sgmv_shrink"].tuned
sgmv_expand, sgmv_expand_tuned = _kernels["sgmv_expand"].default, _kernels["sgmv_expand"].tuned
lora_linear, lora_linear_tuned = _linear.default, _linear.tuned
BGMV_SHRINK, BGMV_EXPAND = _kernels["bgmv_shrink"].tunable, _kernels["bgmv_expand"].tunable
SGMV_SHRINK, SGMV_EXPAND = _kernels["sgmv_shrink"].tunable, _kernels["sgmv_expand"].tunable
LORA_LINEAR = _linear.tunable
