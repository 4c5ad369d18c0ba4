"""What paged decode attention is: axes, inputs, float64 truth, least work, tolerance. Owns no kernel.

One query token for each of B sequences attends to the sequence's whole KV cache, which lies in blocks of `block_size`
tokens anywhere in a pool. With H query heads, Hk KV heads (H a multiple of Hk), D the head size:

    y[b, h] = softmax(q[b, h] . K[b, :, h // (H / Hk)]^T / sqrt(D)) . V[b, :, h // (H / Hk)]

Token t of sequence b is slot `t % block_size` of physical block `p(b, t // block_size)`, and `address` says what p
is: `table` reads the block table, `contiguous` computes where a contiguous cache would have the block and ignores the
table, `same-block` takes block 0 for everything. The last is no attention over the sequence: it is what remains of
document 001's "no offset", a lower bound of the time, and it is checked against the output that those addresses
define.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smbench_kernels import managed_memory
from smbench_kernels.op import Axis, Inputs, Point, Tolerance, UnsupportedPoint, Work

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DOCUMENT_BLOCKS = 1024
"""Blocks of the pool in the document's benchmark, whatever their size."""

AXES = {
    "heads": Axis("query heads"),
    "kv_heads": Axis("KV heads; a divisor of the query heads"),
    "head_dim": Axis("size of a head"),
    "dtype": Axis("type of queries, cache and output", choices=tuple(DTYPES)),
    "batch": Axis("sequences in the batch"),
    "seq_len": Axis("tokens of the longest sequence"),
    "lengths": Axis(
        "equal: every sequence has seq_len tokens; ragged: one has, the others any number from 1 on",
        choices=("equal", "ragged"),
    ),
    "block_size": Axis("tokens of a KV block"),
    "layout": Axis(
        "fair: a pool of exactly the blocks that are needed, in random order; ordered: the same in order; "
        "document: a pool of 1024 blocks of any size, drawn with repetition",
        choices=("fair", "ordered", "document"),
    ),
    "memory": Axis(
        "where the cache lies; managed memory is resident on the card unless the name says otherwise",
        choices=("device", *managed_memory.KINDS),
    ),
    "address": Axis(
        "where a kernel gets physical blocks from: see the definition", choices=("table", "contiguous", "same-block")
    ),
}

TOLERANCES = {
    # weights and output are rounded to dtype once each (unit roundoff 2**-11 and 2**-8); a token left out of n shows as
    # about sqrt(e / n) of the output, 0.9 % of 32768 tokens
    "float16": Tolerance(relative=2e-3, elementwise=0.02),
    "bfloat16": Tolerance(relative=8e-3, elementwise=0.16),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A point's axes as numbers."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    seq_len: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, point: Point) -> Sizes:
        """The sizes of a point. UnsupportedPoint where the query heads are no multiple of the KV heads."""
        sizes = cls(
            **{name: int(point[name]) for name in ("heads", "kv_heads", "head_dim", "batch", "seq_len", "block_size")},
            dtype=DTYPES[str(point["dtype"])],
        )
        if sizes.heads % sizes.kv_heads:
            raise UnsupportedPoint(f"{sizes.heads} query heads are no multiple of {sizes.kv_heads} KV heads")
        return sizes

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def blocks_per_sequence(self) -> int:
        """Columns of the block table."""
        return -(-self.seq_len // self.block_size)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5)


def pool_blocks(point: Point) -> int:
    """Blocks of the pool."""
    sizes = Sizes.of(point)
    return DOCUMENT_BLOCKS if point["layout"] == "document" else sizes.batch * sizes.blocks_per_sequence


def input_dtypes(point: Point) -> dict[str, torch.dtype]:
    """The dtype of each input, all that compiling a kernel needs of them."""
    dtype = Sizes.of(point).dtype
    integers = {"block_tables": torch.int32, "seq_lens": torch.int32}
    return {"q": dtype, "k_cache": dtype, "v_cache": dtype, **integers, "y": dtype}


def make_inputs(point: Point, seed: int, device: torch.device) -> Inputs:
    """Inputs of a point; the same for every provider, drawn on `device`, always in device memory.

    - `q` [B, H, D], `k_cache` and `v_cache` [blocks, block_size, Hk, D] dtype, standard normal and contiguous, so that
      scores have variance 1;
    - `block_tables` [B, blocks per sequence] int32, `seq_lens` [B] int32;
    - `y` [B, H, D] dtype, NaN: every element is to be written.
    """
    sizes = Sizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = (pool_blocks(point), sizes.block_size, sizes.kv_heads, sizes.head_dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=sizes.dtype, generator=generator, device=device)

    return {
        "q": normal(sizes.batch, sizes.heads, sizes.head_dim),
        "k_cache": normal(*cache),
        "v_cache": normal(*cache),
        "block_tables": draw_tables(point, seed).to(device),
        "seq_lens": draw_lengths(point, seed).to(device),
        "y": torch.full((sizes.batch, sizes.heads, sizes.head_dim), torch.nan, dtype=sizes.dtype, device=device),
    }


def draw_tables(point: Point, seed: int) -> torch.Tensor:
    """Block tables [B, blocks per sequence] int32 of a point's layout on the CPU, the same on every device."""
    sizes, blocks = Sizes.of(point), pool_blocks(point)
    shape = (sizes.batch, sizes.blocks_per_sequence)
    generator = torch.Generator().manual_seed(seed)
    if point["layout"] == "document":
        return torch.randint(0, blocks, shape, generator=generator).to(torch.int32)
    order = torch.arange(blocks) if point["layout"] == "ordered" else torch.randperm(blocks, generator=generator)
    return order.view(shape).to(torch.int32)


def draw_lengths(point: Point, seed: int) -> torch.Tensor:
    """Sequence lengths [B] int32 on the CPU: all `seq_len`, or the first one `seq_len` and the others from 1 on."""
    sizes = Sizes.of(point)
    lengths = torch.full((sizes.batch,), sizes.seq_len)
    if point["lengths"] == "ragged":
        generator = torch.Generator().manual_seed(seed)
        lengths[1:] = torch.randint(1, sizes.seq_len + 1, (sizes.batch - 1,), generator=generator)
    return lengths.to(torch.int32)


def redraw(point: Point, inputs: Inputs, seed: int) -> Inputs:
    """The same inputs with another block table: what reads the table must follow, what computes addresses must not.

    The other table is a random one of the point's pool, a permutation of the ordered layout included.
    """
    layout = "fair" if point["layout"] == "ordered" else point["layout"]
    tables = draw_tables({**point, "layout": layout}, seed).to(inputs["block_tables"].device)
    return {**inputs, "block_tables": tables}


def place(point: Point, inputs: Inputs) -> Inputs:
    """A copy of the inputs in memory of its own, the cache in the kind of memory that the point asks for.

    UnsupportedPoint where there is no such memory, or not enough of it.
    """
    memory = str(point["memory"])
    if memory == "device":
        return {name: tensor.clone() for name, tensor in inputs.items()}
    caches = {name: inputs[name] for name in ("k_cache", "v_cache")}
    others = {name: tensor.clone() for name, tensor in inputs.items() if name not in caches}
    return {**others, **managed_memory.copies(memory, caches)}


def cache_rows(point: Point, inputs: Inputs, sequence: int) -> torch.Tensor:
    """The row of the cache, seen as [blocks * block_size, Hk, D], of each token of a sequence: [length] int64."""
    sizes = Sizes.of(point)
    length = int(inputs["seq_lens"][sequence])
    tokens = torch.arange(length, device=inputs["q"].device)
    blocks = tokens // sizes.block_size
    if point["address"] == "table":
        blocks = inputs["block_tables"][sequence].long()[blocks]
    elif point["address"] == "contiguous":
        # the document's pool has too few blocks for long batches; its author does not say what was done
        blocks = (sequence * sizes.blocks_per_sequence + blocks) % pool_blocks(point)
    else:
        blocks = torch.zeros_like(blocks)
    return blocks * sizes.block_size + tokens % sizes.block_size


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """`y` after one call, in float64, sequence by sequence."""
    sizes = Sizes.of(point)
    caches = [inputs[name].view(-1, sizes.kv_heads, sizes.head_dim) for name in ("k_cache", "v_cache")]
    outputs = []
    for sequence in range(sizes.batch):
        rows = cache_rows(point, inputs, sequence)
        keys, values = (cache[rows].double().transpose(0, 1) for cache in caches)
        queries = inputs["q"][sequence].double().view(sizes.kv_heads, sizes.group, sizes.head_dim)
        weights = torch.softmax(queries @ keys.transpose(1, 2) * sizes.scale, dim=2)
        outputs.append((weights @ values).reshape(sizes.heads, sizes.head_dim))
    return torch.stack(outputs)


def work(point: Point, inputs: Inputs) -> Work:
    """K and V of every distinct cache row once, queries and outputs once, the table where it is read.

    In the document's layout many sequences share rows, so that the distinct bytes are far fewer than those loaded.
    """
    sizes = Sizes.of(point)
    element = inputs["q"].element_size()
    touched = torch.zeros(pool_blocks(point) * sizes.block_size, dtype=torch.bool, device=inputs["q"].device)
    for sequence in range(sizes.batch):
        touched[cache_rows(point, inputs, sequence)] = True
    kv_bytes = int(touched.sum()) * 2 * sizes.kv_heads * sizes.head_dim * element
    lengths = inputs["seq_lens"].long()
    used = int((-(-lengths // sizes.block_size)).sum()) if point["address"] == "table" else 0
    indices = (used + sizes.batch) * inputs["seq_lens"].element_size()
    return Work(
        bytes=kv_bytes + 2 * inputs["q"].numel() * element + indices,
        flops=4 * sizes.heads * sizes.head_dim * int(lengths.sum()),
    )


def tolerance(point: Point) -> Tolerance:
    """The bound of the point's dtype."""
    return TOLERANCES[str(point["dtype"])]
