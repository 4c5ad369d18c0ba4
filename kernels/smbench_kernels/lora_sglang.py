"""sglang's chunked sgmv (csgmv) LoRA kernels as providers. Owns the calls; the kernels are sglang's.

Written for sglang 0.5.16 to 0.5.23, called as its default LoRA backend calls them. Timed is what an engine enqueues for
one layer: the shrink, the expand onto the layer's output, or for `lora_linear` both, all fused slices in each. Not
timed is what it does once per step for all layers: sorting the tokens by adapter and cutting them into chunks. The
launch has one block per chunk that exists, where an engine's decode graph pads to its largest batch.

The launch parameters are sglang's own choice at its default chunk size, or (`-tuned`) given ones: those that sglang
takes from files of the user's, the chunk size, which is a setting of the server (`--max-lora-chunk-size`), and the
split of the shrink's columns, an argument of the kernel's function from 0.5.23 on. Given ones take the place of what
the functions `get_lora_shrink_config` and `get_lora_expand_config` would have read. Shrink and expand may have chunks
of their own, which a batch of an engine's has not: that is to sglang's favour. What is searched is in
`lora_sglang_space`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from smbench_kernels import lora_sglang_space as space
from smbench_kernels.lora import SCALE, token_indices
from smbench_kernels.lora_linear import weights
from smbench_kernels.lora_peers import PARTS, PeerKernel, PeerLinear, incompatible, installed_version, joined, part_of
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint

EXPECTED = "chunked_sgmv_lora_shrink_forward and chunked_sgmv_lora_expand_forward as in sglang 0.5.16 to 0.5.23"
CHUNK = 16
"""Tokens in a chunk: the default of `--max-lora-chunk-size`."""


@dataclass(frozen=True, slots=True)
class Library:
    """What is used of sglang."""

    modules: Mapping[str, Any]
    """By part of PARTS, the module whose function asks for launch parameters."""
    batch_info: Callable[..., Any]

    def config(self, part: str, weights: torch.Tensor, slices: int) -> Config:
        """What sglang chooses at the default chunk size for weights [L, S * r, h] or [L, n, r]."""
        rows, columns = weights.shape[-2:]
        wide, rank = (columns, rows // slices) if part == "shrink" else (rows, columns)
        chosen = self._function(part)(K=wide, R=rank, num_slices=slices, chunk_size=CHUNK)
        return {"BLOCK_M": CHUNK, **chosen}

    def run(self, part: str, config: Config | None, **arguments: Any) -> torch.Tensor:
        """One of the two functions, with given launch parameters or with its own for None."""
        forward = getattr(self.modules[part], f"chunked_sgmv_lora_{part}_forward")
        if config is None:
            found: torch.Tensor = forward(**arguments)
            return found
        if config.get("SPLIT_K", 1) > 1:
            arguments["split_k"] = config["SPLIT_K"]
        with self._given(part, config):
            found = forward(**arguments)
        return found

    def takes(self, part: str, argument: str) -> bool:
        """Whether this version's function has an argument."""
        forward = getattr(self.modules[part], f"chunked_sgmv_lora_{part}_forward")
        return argument in inspect.signature(forward).parameters

    def _function(self, part: str) -> Callable[..., Mapping[str, int]]:
        found: Callable[..., Mapping[str, int]] = getattr(self.modules[part], f"get_lora_{part}_config")
        return found

    @contextmanager
    def _given(self, part: str, config: Config) -> Iterator[None]:
        module, name = self.modules[part], f"get_lora_{part}_config"
        own = getattr(module, name)
        answer = {key: value for key, value in config.items() if key not in ("BLOCK_M", "SPLIT_K")}
        setattr(module, name, lambda **_: answer)
        try:
            yield
        finally:
            setattr(module, name, own)


class Batch:
    """The metadata of a batch, made once for each chunk size that is asked for."""

    def __init__(self, library: Library, inputs: Inputs, loras: int, rank: int) -> None:
        self.adapters = token_indices(inputs)
        self._library, self._loras, self._rank = library, loras, rank
        self._infos: dict[int, Any] = {}

    def info(self, config: Config | None) -> Any:
        """The chunks of a configuration, or of the default size. Synchronizes when they are new."""
        chunk = config["BLOCK_M"] if config else CHUNK
        if chunk not in self._infos:
            self._infos[chunk] = chunks(self._library.batch_info, self.adapters, self._loras, self._rank, chunk)
        return self._infos[chunk]


def bind_shrink(point: Point, inputs: Inputs) -> Callable[[Config | None, str], Prepared]:
    """Chunked shrink of `x` [T, h] by `weights` [L, r, h], both float16 or bfloat16, into a new tensor [T, r].

    That tensor has the dtype of `x` and is uninitialized where a token has no adapter, while the operation adds to a
    float32 `y`: `finish` adds the rows that count. UnsupportedPoint without sglang.
    """
    library = load(inputs)
    x, a, y = inputs["x"], inputs["weights"], inputs["y"]
    batch = Batch(library, inputs, a.shape[0], a.shape[-2])
    has_adapter = (batch.adapters >= 0).unsqueeze(1)

    def prepared(config: Config | None, source: str) -> Prepared:
        _require_split(library, config)
        info = batch.info(config)
        latest: list[torch.Tensor] = []

        def run() -> None:
            latest[:] = [library.run("shrink", config, x=x, weights=a, batch_info=info, num_slices=1)]

        def finish() -> None:
            y.add_(torch.where(has_adapter, latest[0], 0), alpha=SCALE)

        return Prepared(run, config or library.config("shrink", a, 1), source, finish=finish)

    return prepared


def bind_expand(point: Point, inputs: Inputs) -> Callable[[Config | None, str], Prepared]:
    """Chunked expand: adds `x` [T, r] times `weights` [L, h, r] to `y` [T, h], the latter two of one dtype.

    sglang's shrink hands `x` on in that dtype too, while here it is float32: `begin` rounds it.
    """
    library = load(inputs)
    x, b, y = inputs["x"], inputs["weights"], inputs["y"]
    hidden_size, rank = b.shape[-2:]
    batch = Batch(library, inputs, b.shape[0], rank)
    offsets = _offsets([hidden_size], y.device)
    rounded = x.to(b.dtype)

    def begin() -> None:
        rounded.copy_(x)

    def prepared(config: Config | None, source: str) -> Prepared:
        info = batch.info(config)

        def run() -> None:
            library.run(
                "expand",
                config,
                x=rounded,
                weights=b,
                batch_info=info,
                slice_offsets=offsets,
                max_slice_size=hidden_size,
                base_output=y,
            )

        return Prepared(run, config or library.config("expand", b, 1), source, begin=begin)

    return prepared


def bind_linear(point: Point, inputs: Inputs) -> Callable[[Config | None, str], Prepared]:
    """Both calls of `run_qkv_lora`, `run_gate_up_lora` or a plain layer. UnsupportedPoint without sglang.

    An engine holds the weights of fused slices as one tensor, [L, S * r, h] and [L, sum of n_i, r]: `begin` makes
    these.
    """
    library = load(inputs)
    x, y, pairs = inputs["x"], inputs["y"], weights(inputs)
    a, b = (_stacked([pair[side] for pair in pairs]) for side in (0, 1))
    widths = [pair[1].shape[1] for pair in pairs]
    batch = Batch(library, inputs, a.shape[0], pairs[0][0].shape[1])
    offsets = _offsets(widths, y.device)
    named: dict[str, Any] = {"slice_offsets": offsets, "max_slice_size": max(widths)}
    if len(pairs) > 1 and library.takes("expand", "slice_offsets_cpu"):
        named["slice_offsets_cpu"] = offsets.cpu()

    def begin() -> None:
        if len(pairs) > 1:
            torch.cat([pair[0] for pair in pairs], dim=1, out=a)
            torch.cat([pair[1] for pair in pairs], dim=1, out=b)

    def prepared(config: Config | None, source: str) -> Prepared:
        parts = {part: part_of(config, part) if config else None for part in PARTS}
        _require_split(library, parts["shrink"])
        first, second = (batch.info(parts[part]) for part in PARTS)

        def run() -> None:
            hidden = library.run("shrink", parts["shrink"], x=x, weights=a, batch_info=first, num_slices=len(pairs))
            library.run("expand", parts["expand"], x=hidden, weights=b, batch_info=second, base_output=y, **named)

        chosen = joined(
            {part: library.config(part, side, len(pairs)) for part, side in zip(PARTS, (a, b), strict=True)}
        )
        return Prepared(run, config or chosen, source, begin=begin)

    return prepared


def load(inputs: Inputs) -> Library:
    """sglang's parts. UnsupportedPoint with the reason where they are not here or not as expected."""
    version = installed_version("sglang", inputs)
    try:
        modules = {part: space.module(part) for part in PARTS}
        for part, module in modules.items():
            for name in (f"chunked_sgmv_lora_{part}_forward", f"get_lora_{part}_config"):
                getattr(module, name)
        return Library(modules, importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo)
    except (ImportError, AttributeError) as error:
        raise incompatible("sglang", version, EXPECTED, error) from error


def chunks(
    batch_info: Callable[..., Any], adapters: torch.Tensor, num_loras: int, rank: int, chunk: int = CHUNK
) -> Any:
    """The metadata of a batch: tokens sorted by adapter, each adapter's tokens cut into chunks. Synchronizes."""
    device = adapters.device
    # tokens without an adapter get one more adapter, of rank 0, as the engine gives them
    slots = torch.where(adapters < 0, num_loras, adapters)
    order = torch.argsort(slots, stable=True)
    found, counts = torch.unique_consecutive(slots[order], return_counts=True)
    chunk_slots: list[int] = []
    bounds = [0]
    for slot, count in zip(found.tolist(), counts.tolist(), strict=True):
        for first in range(0, count, chunk):
            chunk_slots.append(slot)
            bounds.append(bounds[-1] + min(chunk, count - first))

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return batch_info(
        use_cuda_graph=False,
        bs=adapters.numel(),
        num_segments=len(chunk_slots),
        seg_indptr=on_device(bounds),
        weight_indices=on_device(chunk_slots),
        lora_ranks=on_device([rank] * num_loras + [0]),
        scalings=torch.ones(num_loras + 1, dtype=torch.float32, device=device),
        max_len=chunk,
        seg_lens=None,
        permutation=order.to(torch.int32),
    )


def _require_split(library: Library, config: Config | None) -> None:
    if config and config.get("SPLIT_K", 1) > 1 and not library.takes("shrink", "split_k"):
        raise UnsupportedPoint("this version of sglang has no split of the shrink's columns")


def _stacked(slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights of all slices in one tensor; those of one slice as they are."""
    return slices[0] if len(slices) == 1 else torch.cat(list(slices), dim=1)


def _offsets(widths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where each slice begins in the output, and the end of the last, [S + 1] int32."""
    bounds = [sum(widths[:number]) for number in range(len(widths) + 1)]
    return torch.tensor(bounds, dtype=torch.int32, device=device)


_shrink = partial(
    PeerKernel, package="sglang", bind=bind_shrink, space=space.shrink, plan=space.shrink_plan, calls=space.shrink_calls
)
_expand = partial(
    PeerKernel, package="sglang", bind=bind_expand, space=space.expand, plan=space.expand_plan, calls=space.expand_calls
)
_kernels = {
    "bgmv_shrink": _shrink("bgmv_shrink"),
    "bgmv_expand": _expand("bgmv_expand"),
    "sgmv_shrink": _shrink("sgmv_shrink"),
    "sgmv_expand": _expand("sgmv_expand"),
}
_linear = PeerLinear("sglang", bind_linear, {part: _kernels[f"bgmv_{part}"] for part in PARTS})

bgmv_shrink, bgmv_shrink_tuned = _kernels["bgmv_shrink"].default, _kernels["bgmv_shrink"].tuned
bgmv_expand, bgmv_expand_tuned = _kernels["bgmv_expand"].default, _kernels["bgmv_expand"].tuned
sgmv_shrink, sgmv_shrink_tuned = _kernels["sgmv_shrink"].default, _kernels["sgmv_shrink"].tuned
sgmv_expand, sgmv_expand_tuned = _kernels["sgmv_expand"].default, _kernels["sgmv_expand"].tuned
lora_linear, lora_linear_tuned = _linear.default, _linear.tuned
BGMV_SHRINK, BGMV_EXPAND = _kernels["bgmv_shrink"].tunable, _kernels["bgmv_expand"].tunable
SGMV_SHRINK, SGMV_EXPAND = _kernels["sgmv_shrink"].tunable, _kernels["sgmv_expand"].tunable
LORA_LINEAR = _linear.tunable
