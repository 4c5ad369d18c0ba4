"""CUDA C++ of how our paged decode kernel shares out its work: the walk over all tiles, and merging. Owns no product.

The tiles of all (sequence, group of KV heads) items form one list; thread block p of P takes the p-th of P equal parts
of it whatever the lengths are, and an item that several blocks share is merged by the last of them to arrive, in the
order of the parts ("Stream-K", Osama et al. 2023): the same bits on every run. Macros: see `paged_attention_source`.
"""

from __future__ import annotations

SOURCE = r"""
constexpr int WARPS = HEADS * SLICES;
constexpr int THREADS = WARP * WARPS;
constexpr int CHUNK = 16 * PIECES;
constexpr int TILE = SLICES * CHUNK;
/* query heads of an item: rows of the result; columns of a product, 8 each */
constexpr int MEMBERS = GROUP < 16 ? GROUP : 16;
constexpr int ROW_GROUPS = (GROUP + 15) / 16;
constexpr int COLUMNS = (MEMBERS + 7) / 8;
constexpr int DEPTHS = HEAD_DIM / 16;
/* rows in shared memory are whole groups of eight 16-byte pieces; an exclusive or with the row's number spreads them
   over the banks */
constexpr int PIECES_OF_ROW = HEAD_DIM / 8;
constexpr int ROW_BYTES = (PIECES_OF_ROW + 7) / 8 * 128;
constexpr int HALF_BYTES = CHUNK * ROW_BYTES;
constexpr int STAGE_BYTES = 2 * HALF_BYTES;
/* table entries are fetched STAGES - 1 rounds before they are used, which is STAGES - 1 rounds before the products */
constexpr int ENTRY_BYTES = STAGES * CHUNK * 4;
constexpr int WARP_BYTES = STAGES * STAGE_BYTES + ENTRY_BYTES;
/* a result in the workspace: for each member the highest score, the sum of weights, HEAD_DIM sums */
constexpr int SLOT = HEADS * MEMBERS * (HEAD_DIM + 2);
constexpr float LOWEST = -1.0e30f;

/* where a walk over the list of tiles is */
struct Cursor {
    int sequence, item, tile, tiles, length;
};

struct Inputs {
    const int *lengths;
    int batch, items;
};

__device__ inline int tiles_of(int length) { return length > 0 ? (length + TILE - 1) / TILE : 1; }

__device__ inline void advance(Cursor &at, const Inputs &inputs)
{
    if (++at.tile < at.tiles)
        return;
    at.tile = 0;
    if (++at.item < inputs.items)
        return;
    at.item = 0;
    ++at.sequence;
    at.length = at.sequence < inputs.batch ? inputs.lengths[at.sequence] : 0;
    at.tiles = tiles_of(at.length);
}

/* a block's part of the list, and what the whole list is */
struct Share {
    int first, stop, total, blocks;
    Cursor start;
};

/* computed by each warp for itself, from the lengths alone: they may change between replays of a graph */
__device__ inline Share share_of(const Inputs &inputs, int lane)
{
    /* tiles of all sequences, 32 at a time, and the most that one has */
    int total = 0, most = 0;
    for (int begin = 0; begin < inputs.batch; begin += WARP) {
        const int tiles = begin + lane < inputs.batch ? tiles_of(inputs.lengths[begin + lane]) : 0;
        total += __reduce_add_sync(~0u, tiles);
        most = max(most, __reduce_max_sync(~0u, tiles));
    }
    const bool equal = total == most * inputs.batch;
    total *= inputs.items;
    int blocks = gridDim.x;
#if SNAP
    /* parts of equal length, where that idles few blocks: they need no second slot, and often no merging */
    const int count = inputs.batch * inputs.items;
    if (equal && count > blocks) {
        const int each = (count + blocks - 1) / blocks;
        if (count % each == 0 && count / each * 12 >= blocks * 11)
            blocks = count / each;
    } else if (equal) {
        const int parts = blocks / count;
        if (most % parts == 0 && count * parts * 12 >= blocks * 11)
            blocks = count * parts;
    }
#endif
    blocks = min(blocks, total);
    const int block = blockIdx.x;
    Share share = {0, 0, total, blocks, {0, 0, 0, 1, 0}};
    if (block >= blocks)
        return share;
    share.first = static_cast<int>(static_cast<long long>(block) * total / blocks);
    share.stop = static_cast<int>((block + 1ll) * total / blocks);

    Cursor &here = share.start;
    for (int begin = 0, before = 0; begin < inputs.batch; begin += WARP) {
        const int length = begin + lane < inputs.batch ? inputs.lengths[begin + lane] : 0;
        const int tiles = begin + lane < inputs.batch ? tiles_of(length) : 0;
        int sum = tiles;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int other = __shfl_up_sync(~0u, sum, distance);
            sum += lane >= distance ? other : 0;
        }
        const int end = before + sum * inputs.items;
        const unsigned beyond = __ballot_sync(~0u, end > share.first);
        if (beyond) {
            const int found = __ffs(beyond) - 1;
            here.sequence = begin + found;
            here.length = __shfl_sync(~0u, length, found);
            here.tiles = __shfl_sync(~0u, tiles, found);
            const int inside = share.first - (__shfl_sync(~0u, end, found) - here.tiles * inputs.items);
            here.item = inside / here.tiles;
            here.tile = inside % here.tiles;
            break;
        }
        before = __shfl_sync(~0u, end, WARP - 1);
    }
    return share;
}

/* the block that takes a tile */
__device__ inline int owner_of(int tile, const Share &share)
{
    return static_cast<int>(((tile + 1ll) * share.blocks - 1) / share.total);
}

/* Adds up all parts of an item: its partial results lie in slots of neighbouring blocks. All threads take part. */
__device__ inline void merge(element *out_rows, const float *slots, int owner, int parts, int members)
{
    for (int i = threadIdx.x; i < HEADS * MEMBERS * HEAD_DIM / 4; i += THREADS) {
        const int row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        float highest = LOWEST, weight = 0.f, sums[4] = {};
        for (int begin = 0; begin < parts; begin += 8) {
            float tops[8], masses[8], values[8][4];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int part = begin + j;
                const float *slot = slots + static_cast<long long>((owner + part) * 2 + (part == 0)) * SLOT;
                tops[j] = LOWEST;
                masses[j] = 0.f;
                values[j][0] = values[j][1] = values[j][2] = values[j][3] = 0.f;
                if (part < parts) {
                    tops[j] = load_past_l1(slot + row);
                    masses[j] = load_past_l1(slot + HEADS * MEMBERS + row);
                    const float *at = slot + 2 * HEADS * MEMBERS + row * HEAD_DIM + column;
                    load_past_l1(values[j][0], values[j][1], at);
                    load_past_l1(values[j][2], values[j][3], at + 2);
                }
            }
            float above = highest;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                above = fmaxf(above, tops[j]);
            const float old = power_of_2(highest - above);
            weight *= old;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sums[e] *= old;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float factor = power_of_2(tops[j] - above);
                weight += masses[j] * factor;
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[e] += values[j][e] * factor;
            }
            highest = above;
        }
        const int head = row / MEMBERS, member = row % MEMBERS;
        if (member < members) {
            const float share = 1.f / weight;
            element *to = out_rows + static_cast<long long>(head * GROUP + member) * HEAD_DIM + column;
            uint2 bits;
            bits.x = packed(sums[0] * share, sums[1] * share);
            bits.y = packed(sums[2] * share, sums[3] * share);
            *reinterpret_cast<uint2 *>(to) = bits;
        }
    }
}

"""
