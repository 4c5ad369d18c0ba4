"""The paged decode kernel in Triton: one launch, equal shares of the cache for every program. Owns the code.

Device code only; grid, configuration and provider are in `paged_attention_triton`.

**Work.** The tiles of all (sequence, group of KV heads) items form one list; program p of P takes the p-th of P equal
parts of it, whatever the lengths are ("Stream-K", Osama et al. 2023). Its tiles are one loop, so that the loads of an
item begin while the item before it is still being multiplied. An item that several programs share is merged by the
last of them to arrive, in the order of the parts: the same bits on every run, no float atomics, no second launch.

**Products.** Each warp has a matrix product of its own: the leading dimension of all tensors is the warp, HEADS KV
heads by SLICES groups of tokens. They are transposed, K q^T and V^T P^T: a KV head's query heads are the columns,
8 of them at a time. So a warp's scores never meet another warp's, and softmax needs no shared memory ("flash decoding"
within a program, Dao et al. 2023).

**Loads.** Rows of D elements are gathered by token: the block size costs address arithmetic only. The table is read one
round ahead of the keys and values that depend on it, and those STAGES rounds ahead of the products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smbench_kernels.launch import jit

LOWEST = tl.constexpr(-1.0e30)
"""Below every score, and finite: the difference of two of them is no NaN."""
TABLE, CONTIGUOUS, SAME_BLOCK = (tl.constexpr(kind) for kind in range(3))


@jit(do_not_specialize=["batch", "blocks_per_sequence", "programs"])
def paged_decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    y_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    scale: tl.tensor,
    batch: tl.tensor,
    blocks_per_sequence: tl.tensor,
    programs: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ADDRESS: tl.constexpr,
    WRAP: tl.constexpr,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    SLICES: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    SNAP: tl.constexpr,
) -> None:
    """`y` [B, KV_HEADS * GROUP, HEAD_DIM] of the cache [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM], see the module.

    `scale` is the factor of the scores times log2(e). A sequence of length 0 leaves its rows of y as they are.
    """
    WARPS: tl.constexpr = HEADS * SLICES
    TILE: tl.constexpr = SLICES * TOKENS
    MEMBERS: tl.constexpr = 8
    ROW_GROUPS: tl.constexpr = (GROUP + 7) // 8
    ITEMS: tl.constexpr = KV_HEADS // HEADS * ROW_GROUPS
    ROWS: tl.constexpr = triton.next_power_of_2(min(8, GROUP))
    SLOT: tl.constexpr = HEADS * ROWS * (BLOCK_D + 2)
    sequences = tl.arange(0, BATCH)
    lengths = tl.load(lengths_ptr + sequences, mask=sequences < batch, other=0)
    # an empty sequence has a tile too, which does nothing
    tiles = tl.where(sequences < batch, tl.maximum((lengths + TILE - 1) // TILE, 1), 0)
    ends = tl.cumsum(tiles, axis=0) * ITEMS
    total = tl.sum(tiles, axis=0) * ITEMS
    if SNAP:
        programs = snapped(programs, batch * ITEMS, total, tl.max(tiles, axis=0))
    programs = tl.minimum(programs, total)
    program = tl.program_id(0)
    if program >= programs:
        return
    # 64-bit: tiles times programs pass 2**31
    first = (program.to(tl.int64) * total // programs).to(tl.int32)
    stop = ((program + 1).to(tl.int64) * total // programs).to(tl.int32)
    done = ends <= first
    sequence = tl.sum(done.to(tl.int32), axis=0)
    begin = tl.max(tl.where(done, ends, 0), axis=0)
    length = tl.sum(tl.where(sequences == sequence, lengths, 0), axis=0)
    item_tiles = tl.maximum((length + TILE - 1) // TILE, 1)
    item = (first - begin) // item_tiles
    tile = first - begin - item * item_tiles
    first_sequence, first_item, first_tile, first_tiles = sequence, item, tile, item_tiles

    warp = tl.arange(0, WARPS)
    row = tl.arange(0, MEMBERS)
    column = tl.arange(0, BLOCK_D)
    place = (warp // HEADS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    head = tl.arange(0, HEADS)
    q = tl.zeros([WARPS, BLOCK_D, MEMBERS], dtype=q_ptr.dtype.element_ty)
    highest = tl.full([WARPS, MEMBERS], LOWEST, dtype=tl.float32)
    weight = tl.zeros([WARPS, MEMBERS], dtype=tl.float32)
    acc = tl.zeros([WARPS, BLOCK_D, MEMBERS], dtype=tl.float32)
    for now in tl.range(first, stop, num_stages=STAGES):
        tokens = tile * TILE + place
        ok = tokens < length
        block = tokens // BLOCK_SIZE
        if ADDRESS == TABLE:
            # 64-bit: tables of many long sequences pass 2**31 bytes
            block = tl.load(tables_ptr + sequence.to(tl.int64) * blocks_per_sequence + block, mask=ok, other=0)
        elif ADDRESS == CONTIGUOUS:
            block = sequence * blocks_per_sequence + block
            if WRAP:
                block = block % WRAP
        else:
            block = block * 0
        kv_head = item // ROW_GROUPS * HEADS + warp % HEADS
        rows = (block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * KV_HEADS + kv_head[:, None]
        offsets = rows[:, :, None] * HEAD_DIM + column[None, None, :]
        inside = ok[:, :, None]
        if BLOCK_D != HEAD_DIM:
            inside = inside & (column < HEAD_DIM)[None, None, :]
        k = tl.load(k_ptr + offsets, mask=inside, other=0.0)
        # seen transposed, as the product reads it from shared memory: Triton would turn a loaded tile in registers
        offsets_t = rows[:, None, :] * HEAD_DIM + column[None, :, None]
        inside_t = ok[:, None, :]
        if BLOCK_D != HEAD_DIM:
            inside_t = inside_t & (column < HEAD_DIM)[None, :, None]
        v = tl.load(v_ptr + offsets_t, mask=inside_t, other=0.0)

        fresh = (tile == 0) | (now == first)
        member = item % ROW_GROUPS * MEMBERS + row
        if fresh:
            q_rows = (sequence * KV_HEADS + kv_head[:, None]) * GROUP + member[None, :]
            q_ok = (member < GROUP)[None, :, None] & (column < HEAD_DIM)[None, None, :]
            q_t = tl.load(q_ptr + q_rows[:, :, None] * HEAD_DIM + column[None, None, :], mask=q_ok, other=0.0)
            q = tl.permute(q_t, (0, 2, 1))
            highest = tl.full([WARPS, MEMBERS], LOWEST, dtype=tl.float32)
        scores = tl.dot(k, q)
        scores = tl.where(ok[:, :, None], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        p = tl.exp2(scores * scale - above[:, None, :])
        shrink = tl.where(fresh, 0.0, tl.exp2(highest - above))
        weight = weight * shrink + tl.sum(p, axis=1)
        acc = tl.dot(v, p.to(v.dtype), acc * shrink[:, None, :])
        highest = above

        if (tile + 1 == item_tiles) | (now + 1 == stop):
            if SLICES > 1:
                top, mass, sums = across_slices(highest, weight, acc, HEADS, SLICES, MEMBERS, BLOCK_D)
            else:
                top, mass, sums = highest, weight, acc
            if (tile + 1 == item_tiles) & (now - tile >= first):
                y_rows = (sequence * KV_HEADS + item // ROW_GROUPS * HEADS + head[:, None]) * GROUP + member[None, :]
                y_at = y_ptr + y_rows[:, None, :] * HEAD_DIM + column[None, :, None]
                y_ok = (member < GROUP)[None, None, :] & (column < HEAD_DIM)[None, :, None] & (length > 0)
                # an empty sequence has no weight, and no output
                mass = tl.where(length > 0, mass, 1.0)
                tl.store(y_at, (sums / mass[:, None, :]).to(y_ptr.dtype.element_ty), mask=y_ok)
            else:
                # an item that begins before this program's range goes to its first slot, one that ends after it to
                # its second
                slot = partials_ptr + (program * 2 + (now - tile >= first).to(tl.int32)).to(tl.int64) * SLOT
                inner = head[:, None] * ROWS + row[None, :]
                kept = (row < ROWS)[None, :]
                tl.store(slot + inner, top, mask=kept)
                tl.store(slot + HEADS * ROWS + inner, mass, mask=kept)
                elements = slot + 2 * HEADS * ROWS + inner[:, None, :] * BLOCK_D + column[None, :, None]
                tl.store(elements, sums, mask=kept[:, None, :])

        tile += 1
        if tile == item_tiles:
            tile = 0
            item += 1
            if item == ITEMS:
                item = 0
                sequence += 1
                length = tl.load(lengths_ptr + sequence, mask=sequence < batch, other=0)
                item_tiles = tl.maximum((length + TILE - 1) // TILE, 1)

    # every thread's parts must be out before one thread announces them
    tl.debug_barrier()
    if first_tile > 0:
        merge(
            first_sequence,
            first_item,
            first - first_tile,
            first_tiles,
            total,
            programs,
            y_ptr,
            partials_ptr,
            counters_ptr,
            KV_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
            HEADS,
            ROWS,
            PARTS,
        )
    # the loop has gone on to the tile after the range: the item of that tile is shared where it began before
    if (tile > 0) & (stop - tile >= first):
        merge(
            sequence,
            item,
            stop - tile,
            item_tiles,
            total,
            programs,
            y_ptr,
            partials_ptr,
            counters_ptr,
            KV_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
            HEADS,
            ROWS,
            PARTS,
        )


@jit()
def snapped(programs: tl.tensor, items: tl.tensor, total: tl.tensor, most: tl.tensor) -> tl.tensor:
    """The number of programs among which items of equal length divide without a rest, where that idles few of them.

    `most` is the largest number of tiles of an item. Whole items or equal parts of one need no second slot, and often
    no merging at all; a twelfth of the programs is what that may cost.
    """
    each = tl.where(items > programs, (items + programs - 1) // programs, 1)
    parts = tl.where(items > programs, 1, programs // items)
    wanted = items * parts // each
    fits = (items % each == 0) & (most % parts == 0) & (items * most == total) & (wanted * 12 >= programs * 11)
    return tl.where(fits, wanted, programs)


@jit()
def across_slices(
    highest: tl.tensor,
    weight: tl.tensor,
    acc: tl.tensor,
    HEADS: tl.constexpr,
    SLICES: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """One softmax state of each head from those of its groups of tokens: [HEADS, M], [HEADS, M], [HEADS, D, M]."""
    highest = tl.reshape(highest, [SLICES, HEADS, MEMBERS])
    above = tl.max(highest, axis=0)
    shrink = tl.exp2(highest - above[None, :, :])
    weight = tl.sum(tl.reshape(weight, [SLICES, HEADS, MEMBERS]) * shrink, axis=0)
    acc = tl.sum(tl.reshape(acc, [SLICES, HEADS, BLOCK_D, MEMBERS]) * shrink[:, :, None, :], axis=0)
    return above, weight, acc


@jit()
def merge(
    sequence: tl.tensor,
    item: tl.tensor,
    begin: tl.tensor,
    item_tiles: tl.tensor,
    total: tl.tensor,
    programs: tl.tensor,
    y_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Count this program in at a shared item, whose first tile is `begin`; the last to come adds all parts into y."""
    ROW_GROUPS: tl.constexpr = (GROUP + 7) // 8
    ITEMS: tl.constexpr = KV_HEADS // HEADS * ROW_GROUPS
    INNER: tl.constexpr = HEADS * ROWS
    SLOT: tl.constexpr = INNER * (BLOCK_D + 2)
    owner = (((begin + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)
    parts = (((begin + item_tiles).to(tl.int64) * programs - 1) // total).to(tl.int32) - owner + 1
    counter = counters_ptr + sequence * ITEMS + item
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        rows = tl.arange(0, INNER)
        column = tl.arange(0, BLOCK_D)
        above = tl.full([INNER], LOWEST, dtype=tl.float32)
        weights = tl.zeros([INNER], dtype=tl.float32)
        merged = tl.zeros([INNER, BLOCK_D], dtype=tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            ok = (part < parts)[:, None]
            slots = partials_ptr + ((owner + part) * 2 + (part == 0).to(tl.int32)).to(tl.int64) * SLOT
            states = slots[:, None] + rows[None, :]
            # past the L1, which may hold an older launch's values
            part_highest = tl.load(states, mask=ok, other=LOWEST, cache_modifier=".cg")
            part_weight = tl.load(states + INNER, mask=ok, other=0.0, cache_modifier=".cg")
            elements = slots[:, None, None] + 2 * INNER + rows[None, :, None] * BLOCK_D + column[None, None, :]
            part_acc = tl.load(elements, mask=ok[:, :, None], other=0.0, cache_modifier=".cg")
            new = tl.maximum(above, tl.max(part_highest, axis=0))
            old = tl.exp2(above - new)
            factor = tl.exp2(part_highest - new[None, :])
            weights = weights * old + tl.sum(part_weight * factor, axis=0)
            merged = merged * old[:, None] + tl.sum(part_acc * factor[:, :, None], axis=0)
            above = new
        member = item % ROW_GROUPS * 8 + rows % ROWS
        y_rows = (sequence * KV_HEADS + item // ROW_GROUPS * HEADS + rows // ROWS) * GROUP + member
        y_ok = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
        y = (merged / weights[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_rows[:, None] * HEAD_DIM + column[None, :], y, mask=y_ok)
        # ready for the next launch
        tl.store(counter, 0)
