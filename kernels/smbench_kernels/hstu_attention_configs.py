"""Launch configurations of the Triton HSTU attention: what each kernel takes by default. Owns no launch, no search.

A configuration is plain integers, as in `configs`. Forward: ROWS by COLUMNS of the scores in a tile, WARPS, STAGES of
the loop without a mask, MASKED_STAGES of the one with it, TMA (1 pointers, 2 the copy engine where `describable` says
so). Backward: the same three times, V_ for the kernel of dv, K_ for that of dk where KERNELS is 3 (2: dv and dk in
one), Q_ for that of dq; KEPT is 2 where dS goes by way of memory, else 1.

**Kept or made twice.** Without keeping dS, dq needs two more products: 4 D operations an element. Keeping it costs two
bytes written and two read. At 0.6 of the peak of dense fp16 and 0.9 of the bandwidth of the data sheets that is, at D =
128, 2.7 ps against 2.2 on an A100 (312 TFLOP/s, 2.04 TB/s), 12 against 4.7 on an RTX 3090 (71, 0.94), 4.7 against 5.2
on an L40 (181, 0.86), 0.9 against 0.9 on an H200 (989, 4.8). So from 128 on dS is kept, below it is made twice, which
is also what was faster on an H200 (kernels/NOTES-hstu.md).

Rows of sm_90 are the fastest of those measured on an H200, where all candidates were right. The others were not
measured: they are the largest tiles of four warps (of eight where more rows are needed) that fit the shared memory of
the architecture and that ptxas compiles without spills, or next to none.
"""

from __future__ import annotations

from collections.abc import Mapping

from smbench_kernels.op import Config

TILE_KEYS = ("ROWS", "COLUMNS", "WARPS", "STAGES", "MASKED_STAGES")
POINTERS, COPY_ENGINE = 1, 2
TOGETHER, APART = 2, 3
"""KERNELS of a backward pass: dv with dk, or each in its own."""
RECOMPUTED, KEPT = 1, 2
Tile = tuple[int, int, int, int, int]
"""Values of TILE_KEYS."""


def tile(prefix: str, values: Tile) -> dict[str, int]:
    """The keys of one kernel."""
    return {f"{prefix}{key}": value for key, value in zip(TILE_KEYS, values, strict=True)}


def forward_config(values: Tile, tma: int) -> Config:
    """A configuration of the forward pass."""
    return {"TMA": tma, **tile("", values)}


def backward_config(kept: int, dv: Tile, dk: Tile | None, dq: Tile, tma: int) -> Config:
    """A configuration of the backward pass; dk None: in the kernel of dv."""
    kernels = {"KERNELS": TOGETHER} if dk is None else {"KERNELS": APART, **tile("K_", dk)}
    return {"TMA": tma, "KEPT": kept, **kernels, **tile("V_", dv), **tile("Q_", dq)}


FORWARD: Mapping[int, Mapping[int, Config]] = {
    80: {
        64: forward_config((64, 64, 4, 3, 1), POINTERS),
        128: forward_config((64, 64, 4, 2, 1), POINTERS),
        256: forward_config((128, 32, 8, 2, 1), POINTERS),
    },
    86: {
        64: forward_config((64, 64, 4, 2, 1), POINTERS),
        128: forward_config((64, 64, 4, 2, 1), POINTERS),
        256: forward_config((64, 32, 4, 2, 1), POINTERS),
    },
    90: {
        64: forward_config((128, 64, 4, 3, 2), COPY_ENGINE),
        128: forward_config((64, 64, 4, 3, 2), COPY_ENGINE),
        256: forward_config((128, 32, 8, 4, 2), COPY_ENGINE),
    },
}
"""By compute capability and padded head size."""
BACKWARD: Mapping[int, Mapping[tuple[int, int], Config]] = {
    80: {
        (64, RECOMPUTED): backward_config(RECOMPUTED, (32, 64, 4, 2, 1), None, (64, 32, 4, 2, 1), POINTERS),
        (128, RECOMPUTED): backward_config(RECOMPUTED, (32, 64, 4, 2, 1), None, (64, 32, 4, 2, 1), POINTERS),
        (128, KEPT): backward_config(KEPT, (32, 64, 4, 2, 1), None, (64, 64, 4, 2, 1), POINTERS),
        (256, RECOMPUTED): backward_config(
            RECOMPUTED, (16, 64, 4, 2, 1), (16, 64, 4, 2, 1), (64, 16, 4, 2, 1), POINTERS
        ),
        (256, KEPT): backward_config(KEPT, (16, 64, 4, 2, 1), (32, 128, 8, 3, 1), (64, 32, 4, 3, 1), POINTERS),
    },
    86: {
        (64, RECOMPUTED): backward_config(RECOMPUTED, (32, 64, 4, 2, 1), None, (64, 32, 4, 2, 1), POINTERS),
        (128, RECOMPUTED): backward_config(RECOMPUTED, (32, 64, 4, 2, 1), None, (64, 32, 4, 2, 1), POINTERS),
        (128, KEPT): backward_config(KEPT, (32, 64, 4, 2, 1), None, (64, 64, 4, 2, 1), POINTERS),
        (256, RECOMPUTED): backward_config(
            RECOMPUTED, (16, 64, 4, 1, 1), (16, 64, 4, 1, 1), (64, 16, 4, 1, 1), POINTERS
        ),
        (256, KEPT): backward_config(KEPT, (16, 64, 4, 1, 1), (32, 128, 8, 3, 1), (64, 32, 4, 3, 1), POINTERS),
    },
    90: {
        (64, RECOMPUTED): backward_config(RECOMPUTED, (64, 64, 4, 2, 2), None, (64, 64, 4, 2, 2), COPY_ENGINE),
        (128, RECOMPUTED): backward_config(RECOMPUTED, (64, 64, 4, 2, 2), None, (64, 64, 4, 2, 2), COPY_ENGINE),
        (128, KEPT): backward_config(KEPT, (64, 64, 4, 2, 2), None, (128, 64, 4, 3, 2), COPY_ENGINE),
        (256, RECOMPUTED): backward_config(
            RECOMPUTED, (64, 128, 8, 2, 2), (32, 128, 8, 2, 2), (128, 32, 8, 2, 2), COPY_ENGINE
        ),
        (256, KEPT): backward_config(KEPT, (32, 128, 8, 2, 2), (64, 128, 8, 4, 2), (128, 64, 8, 4, 2), COPY_ENGINE),
    },
}
"""By compute capability, padded head size and whether dS is kept."""


def row_of(capability: int, known: Mapping[int, object]) -> int:
    """The row of a capability, or of the next lower one. ValueError below the lowest."""
    fitting = [row for row in known if row <= capability]
    if not fitting:
        raise ValueError(f"compute capability {capability} is below the lowest supported, {min(known)}")
    return max(fitting)


def default_forward(capability: int, head_dim: int) -> Config:
    """The configuration of the forward pass for a head size up to 256. ValueError for a larger one."""
    return FORWARD[row_of(capability, FORWARD)][size_of(head_dim)]


def default_backward(capability: int, head_dim: int, kept: bool) -> Config:
    """The configuration of the backward pass; `kept`: whether there is room for dS, which small heads do not want."""
    rows = BACKWARD[row_of(capability, BACKWARD)]
    size = size_of(head_dim)
    if kept and (size, KEPT) in rows:
        return rows[size, KEPT]
    return rows[size, RECOMPUTED]


def size_of(head_dim: int) -> int:
    """The padded head size whose row holds for this one. ValueError where there is none."""
    sizes = (64, 128, 256)
    for size in sizes:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim is {head_dim}; supported: up to {sizes[-1]}")
