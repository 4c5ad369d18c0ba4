"""Multi-LoRA shrink, expand and both for batches with long sequences, on Hopper. Owns launches, not the kernels' code.

The kernels, CUDA C++, are in `lora_prefill_shrink_source` and `lora_prefill_expand_source`. Tokens come as sequences
with a LoRA each (`Sequences`) or as a plan (`lora_plan.Plan`), whose segments are then the tiles. A configuration says
how many tokens a tile has (TOKENS: 64 or 128; a plan's chunk), how many times 64 columns are copied together
(CHUNKS), how many thread blocks a multiprocessor holds (PER_SM); for shrink how many blocks share a tile's columns
(CLUSTER: up to 16) and, where given, by how many of these its ranks are shared too (SPLIT); for expand how many copies
of y a block makes before it turns to other tokens (RUN).

Every function returns one that launches on the current stream: no synchronization, no allocation, and tensors are
looked at by the kernels alone, so that a graph may be replayed for other LoRA indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smbench_kernels import hardware, lora_prefill_maps, nvrtc
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_prefill_kernels import CAPABILITY, COLUMNS, FEATURES, MOST_SLICES, Expand, Shrink, source
from smbench_kernels.lora_prefill_maps import Encode, encoded
from smbench_kernels.op import Config

if TYPE_CHECKING:
    from smbench_kernels.lora_plan import Plan

Launch = Callable[[], None]
LARGEST_RANK = 256
"""Of expand: x and B of one tile have to fit into shared memory."""


@dataclass(frozen=True)
class Sequences:
    """Tokens of sequences that lie one behind the other, one LoRA for each sequence."""

    indices: torch.Tensor
    """[S] int32, -1 for none."""
    lengths: torch.Tensor
    """[S] int32."""
    starts: torch.Tensor
    """[S] int32, the first token."""
    longest: int
    """No length is above it."""


def _tiles(batch: Sequences | Plan, tokens: int) -> tuple[int, tuple[Any, ...]]:
    """The most tiles there can be, and what both kernels are told: three tensors, that number, tiles of a sequence."""
    if isinstance(batch, Sequences):
        each = ceil_div(batch.longest, tokens)
        most = len(batch.indices) * each
        return most, (batch.indices, batch.lengths, batch.starts, most, each)
    if batch.chunk != tokens:
        raise ValueError(f"the plan's segments have {batch.chunk} tokens, the configuration's tiles {tokens}")
    return batch.capacity, (batch.segments, batch.members, batch.count, batch.capacity, 0)


def unsupported(hidden: int, rank: int, outputs: Sequence[int], capability: int) -> str | None:
    """Why the kernels do not take such a problem, or None. `hidden` is 0, `outputs` empty where they play no part."""
    if capability // 10 * 10 != CAPABILITY:
        return f"they need compute capability 9.0, not {capability / 10}"
    if hidden % 8:
        return f"rows of x have to be multiples of 16 bytes: hidden size {hidden}"
    if outputs and (rank % 8 or any(count % 8 for count in outputs)):
        return f"rows of B and slices of y have to be multiples of 16 bytes: rank {rank}, outputs {tuple(outputs)}"
    if outputs and rank > LARGEST_RANK:
        return f"ranks go up to {LARGEST_RANK}, not {rank}"
    if len(outputs) > MOST_SLICES:
        return f"at most {MOST_SLICES} slices, not {len(outputs)}"
    return None


@dataclass(frozen=True)
class Bound:
    """A kernel with all that a launch passes."""

    kernel: Shrink | Expand
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    cluster: int = 1

    def launch(self, loaded: nvrtc.Kernel) -> Launch:
        """What launches the loaded kernel: it starts before the one in front has ended, and waits for that itself."""
        run: Launch = loaded.launcher(
            *(self.grid, self.kernel.threads, self.kernel.shared_bytes, self.arguments),
            cluster=self.cluster,
            dependent=True,
        )
        return run


def shrink(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    batch: Sequences | Plan,
    out: torch.Tensor,
    scale: float,
    config: Config,
    accumulate: bool = False,
) -> Launch:
    """out[s, t] = scale * x[t] . a[s][lora(t)]^T, or += with `accumulate`. Tokens without LoRA keep their rows.

    `x` [T, h] float16 or bfloat16, `a` S tensors [L, r, h] of its dtype, `out` [S, T, r] float32.
    """
    kernel = shrink_kernel(x, a, batch, config, accumulate)
    loaded = _loaded(kernel, x.device)
    clusters = kernel.places(hardware.of(x.device).sm_count)
    # of larger ones the driver answers nothing before a launch has allowed them
    if 1 < kernel.cluster <= nvrtc.PORTABLE_CLUSTER:
        clusters = loaded.resident_clusters(kernel.threads, kernel.shared_bytes, kernel.cluster)
    return bound_shrink(kernel, x, a, batch, out, scale, clusters).launch(loaded)


def shrink_kernel(
    x: torch.Tensor, a: Sequence[torch.Tensor], batch: Sequences | Plan, config: Config, accumulate: bool
) -> Shrink:
    """The kernel that `shrink` takes."""
    rank, planned = a[0].shape[1], not isinstance(batch, Sequences)
    return Shrink(
        *(config["TOKENS"], rank, len(a), config["CLUSTER"], config["CHUNKS"], config["PER_SM"]),
        *(accumulate, planned, x.dtype, config.get("SPLIT", 1)),
    )


def bound_shrink(
    kernel: Shrink,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    batch: Sequences | Plan,
    out: torch.Tensor,
    scale: float,
    clusters: int,
    encode: Encode = encoded,
) -> Bound:
    """A shrink with room for so many clusters at once."""
    tiles, arguments = _tiles(batch, kernel.tokens)
    sizes = (ceil_div(x.shape[1], kernel.chunks * COLUMNS), kernel.rank, len(x), float(scale))
    return Bound(
        kernel,
        (kernel.cluster * min(tiles, max(1, clusters)), kernel.rank_tiles, 1),
        (lora_prefill_maps.of_shrink(kernel, x, a, encode), out, *arguments, *sizes),
        cluster=kernel.cluster,
    )


def expand(
    h: torch.Tensor,
    b: Sequence[torch.Tensor],
    y: torch.Tensor,
    batch: Sequences | Plan,
    config: Config,
    dependent: bool = False,
) -> Launch:
    """y[t, slice s] += h[s, t] . b[s][lora(t)]^T, h rounded to y's dtype before.

    `h` [S, T, r] float32, `b` S tensors [L, n_s, r] of y's dtype, `y` [T, sum of n_s] float16 or bfloat16, accumulated.
    `dependent`: the kernel in front writes `h` and nothing else that this one reads: y and B are fetched meanwhile.
    """
    planned = not isinstance(batch, Sequences)
    kernel = Expand(
        *(config["TOKENS"], h.shape[-1], len(b), config["CHUNKS"], config["PER_SM"]), dependent, planned, y.dtype
    )
    blocks = kernel.per_sm * hardware.of(y.device).sm_count
    return bound_expand(kernel, h, b, y, batch, config["RUN"], blocks).launch(_loaded(kernel, y.device))


def bound_expand(
    kernel: Expand,
    h: torch.Tensor,
    b: Sequence[torch.Tensor],
    y: torch.Tensor,
    batch: Sequences | Plan,
    run: int,
    blocks: int,
    encode: Encode = encoded,
) -> Bound:
    """An expand with room for so many blocks at once, each turning to other tokens after `run` copies."""
    tiles, arguments = _tiles(batch, kernel.tokens)
    widths = [slice_b.shape[1] for slice_b in b]
    if y.stride() != (sum(widths), 1):
        raise ValueError(f"y has strides {y.stride()}; slices of {widths} outputs take a contiguous one")
    # where the runs of each slice end
    ends = list(itertools.accumulate(ceil_div(width, run * kernel.chunks * COLUMNS) for width in widths))
    cut = (ends[0], ends[min(1, len(b) - 1)], ends[-1], run, *[*widths, 0, 0][:MOST_SLICES])
    maps = lora_prefill_maps.of_expand(kernel, y, b, encode)
    return Bound(
        kernel,
        (min(tiles * ends[-1], blocks), 1, 1),
        (maps, h, y, *arguments, kernel.rank, len(y), *cut),
    )


def linear(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    y: torch.Tensor,
    batch: Sequences | Plan,
    scale: float,
    config: Config,
    workspace: torch.Tensor,
) -> Launch:
    """y[t, slice s] += (scale * x[t] . a[s]^T) . b[s]^T: shrink, then expand, which starts while shrink ends.

    `workspace` [S, T, r] float32 holds what is between. CHUNKS and PER_SM of the configuration are of shrink,
    EXPAND_CHUNKS and EXPAND_PER_SM of expand.
    """
    first = shrink(x, a, batch, workspace, scale, config)
    second = expand(workspace, b, y, batch, expand_config(config), dependent=True)

    def run() -> None:
        first()
        second()

    return run


def expand_config(config: Config) -> Config:
    """The configuration of expand in one of `linear`."""
    return {**config, "CHUNKS": config["EXPAND_CHUNKS"], "PER_SM": config["EXPAND_PER_SM"]}


def facts(kernel: Shrink | Expand, device: torch.device) -> dict[str, dict[str, int]]:
    """What was compiled, by name."""
    return {kernel.name: {**_loaded(kernel, device).facts(), "shared_bytes": kernel.shared_bytes}}


def _loaded(kernel: Shrink | Expand, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.kernel(source(kernel), kernel.name, kernel.macros, device, FEATURES)
