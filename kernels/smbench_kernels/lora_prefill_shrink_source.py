"""CUDA C++ of the prefill shrink for Hopper: out = scale * x . A^T, or out += it. Owns the code, not its launch.

**Work.** A cluster of CLUSTER thread blocks takes a tile of TOKENS tokens at a time. In turns, its blocks stream
ABREAST times 64 columns of x and of A (of all SLICES, whose ranks lie side by side) through rings of STAGES buffers,
which four warps of a block fill by tensor map and the others empty by warpgroup products. x is read once from device
memory, A once for each tile from the L2.

**Sums.** Blocks leave their part in their own shared memory; each then adds a share of the rows over all blocks in
their order. No atomics, the same bits every time.

Macros: those of `lora_prefill_source`, RANKS (of a slice, rounded up to 8), SLICES, CLUSTER, STAGES, PER_SM,
ACCUMULATE.
"""

from __future__ import annotations

KERNEL = r"""
constexpr int COLUMNS = SLICES * RANKS, A_BYTES = COLUMNS * LINE, STAGE_BYTES = COPIED_BYTES + ABREAST * A_BYTES;
constexpr int PITCH = COLUMNS + 8, SHARE = (TOKENS + CLUSTER - 1) / CLUSTER, CONSUMERS = 128 * GROUPS;
constexpr int PARTS_BYTES = CLUSTER > 1 ? TOKENS * PITCH * 4 : 0;

struct Maps {
    RowMaps x;
    TensorMap a[SLICES];
};

struct Output {
    float *at;
    float scale;
    int rank, first_rank;
    long long slice_stride;
    /* a pair or four neighbouring columns of the tile, of which those beyond the rank are nothing */
    __device__ float *place(int token, int column) const
    {
        const int slice = column / RANKS;
        return at + slice * slice_stride + static_cast<long long>(token) * rank + first_rank + column % RANKS;
    }
    template <int N> __device__ void put(int token, int column, const float (&sums)[N]) const
    {
        float *to = place(token, column);
        const int left = rank - first_rank - column % RANKS;
        if (rank % N == 0) {
            if (left <= 0)
                return;
            if constexpr (N == 4) {
                float4 *four = reinterpret_cast<float4 *>(to);
                float4 value = {scale * sums[0], scale * sums[1], scale * sums[2], scale * sums[3]};
#if ACCUMULATE
                const float4 old = load_four_past_l1(to);
                value = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
#endif
                *four = value;
            } else {
                float2 *two = reinterpret_cast<float2 *>(to);
                float2 value = {scale * sums[0], scale * sums[1]};
#if ACCUMULATE
                float old[2];
                load_past_l1(old[0], old[1], to);
                value = {old[0] + value.x, old[1] + value.y};
#endif
                *two = value;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < left) {
#if ACCUMULATE
                to[i] = load_past_l1(to + i) + scale * sums[i];
#else
                to[i] = scale * sums[i];
#endif
            }
    }
};

/* grid (blocks of all clusters; tiles of ranks), 128 * GROUPS threads that multiply and four warps that copy */
extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)
lora_prefill_shrink(const __grid_constant__ Maps maps, float *out, const int *first, const int *second,
                    const int *third, int count, int tiles, int steps, int rank, int tokens, float scale)
{
    extern __shared__ unsigned char memory[];
    const unsigned ring = (shared_address(memory) + 1023) & ~1023u, parts = ring + STAGES * STAGE_BYTES;
    const unsigned full = parts + PARTS_BYTES, empty = full + STAGES * 8, ready = empty + STAGES * 8, read = ready + 8;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            make_barrier(full + s * 8, COPY_WARPS);
            make_barrier(empty + s * 8, CONSUMER_WARPS);
        }
        make_barrier(ready, CLUSTER * CONSUMER_WARPS);
        make_barrier(read, CLUSTER * CONSUMER_WARPS);
    }
    meet_all();
    int block = 0;
    if constexpr (CLUSTER > 1) {
        block = place_in_cluster();
        announce_to_cluster();
    }

    const Work work = {first, second, third, tiles};
    const int clusters = gridDim.x / CLUSTER, first_rank = blockIdx.y * RANKS;
    if (warp == CONSUMER_WARPS && lane < 4 + SLICES)
        fetch_map(&maps.x.tile + lane);
    if (threadIdx.x == 0)
        work.fetch(blockIdx.x / CLUSTER);
    /* nothing before this line depends on the kernel in front; the next one may count on what that one wrote */
    await_last();
    let_next_start();
    Place<STAGES> at;
    if (warp >= CONSUMER_WARPS) {
        const int part = warp - CONSUMER_WARPS;
        const bool copies_a = part == COPY_WARPS - 1;
#pragma unroll 1
        for (int i = blockIdx.x / CLUSTER; i < count; i += clusters) {
            const Tile tile = work.at(i);
            if (tile.count <= 0)
                continue;
            const Rows rows(work, i, tile, part);
#pragma unroll 1
            for (int step = block; step < steps; step += CLUSTER) {
                const unsigned x = ring + at.stage * STAGE_BYTES, barrier = full + at.stage * 8;
                wait_for(empty + at.stage * 8, at.parity ^ 1);
                if (lane == 0)
                    expect(barrier, rows.bytes() + (copies_a ? ABREAST * A_BYTES : 0));
                __syncwarp();
                rows.copy(x, maps.x, step * COPIED_COLUMNS, part, barrier);
                if (copies_a && lane < ABREAST * SLICES)
                    copy_box(x + COPIED_BYTES + lane * RANKS * LINE, maps.a + lane % SLICES,
                             step * COPIED_COLUMNS + lane / SLICES * CHUNK_COLUMNS, first_rank, tile.lora, barrier,
                             KEEP);
                __syncwarp();
                at.step();
            }
        }
        if constexpr (CLUSTER > 1)
            await_cluster();
        return;
    }

    const Output output = {out, scale, rank, first_rank, static_cast<long long>(tokens) * rank};
    const int group = warp / 4, my_row = warp * 16 + lane / 4;
    unsigned round = 0;
    bool met = false;
#pragma unroll 1
    for (int i = blockIdx.x / CLUSTER; i < count; i += clusters) {
        const Tile tile = work.at(i);
        if (tile.count <= 0)
            continue;
#if ACCUMULATE
        /* what will be added to arrives meanwhile */
        if (threadIdx.x < SHARE && block * SHARE + threadIdx.x < tile.count)
            for (int column = 0; column < COLUMNS; column += column % RANKS + 32 < RANKS ? 32 : RANKS - column % RANKS)
                fetch_to_l2(output.place(work.token(i, tile, block * SHARE + threadIdx.x), column));
#endif
        float sums[COLUMNS / 2];
#pragma unroll
        for (int e = 0; e < COLUMNS / 2; ++e)
            sums[e] = 0.f;
        settle(sums);
        unsigned last = 0;
#pragma unroll 1
        for (int step = block; step < steps; step += CLUSTER) {
            const unsigned x = ring + at.stage * STAGE_BYTES, a = x + COPIED_BYTES;
            wait_for(full + at.stage * 8, at.parity);
            start_products();
#pragma unroll
            for (int k = 0; k < COPIED_COLUMNS / 16; ++k)
                multiply_add(sums, by_columns(x + k / 4 * TILE_BYTES + group * 64 * LINE) + k % 4 * 2,
                             by_columns(a + k / 4 * A_BYTES) + k % 4 * 2);
            commit_products();
            products_but<1>();
            if (step > block)
                release(last);
            last = empty + at.stage * 8;
            at.step();
        }
        products_but<0>();
        settle(sums);
        if (block < steps)
            release(last);

        if constexpr (CLUSTER == 1) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = my_row + half * 8;
                if (row < tile.count) {
                    const int token = work.token(i, tile, row);
#pragma unroll
                    for (int j = 0; j < COLUMNS / 8; ++j)
                        output.put(token, j * 8 + lane % 4 * 2, {sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]});
                }
            }
        } else {
            /* all blocks have their barriers; the parts of the tile before have been read */
            if (!met)
                await_cluster();
            else
                wait_for_cluster(read, round ^ 1);
            met = true;
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j)
                    store_two(parts + ((my_row + half * 8) * PITCH + j * 8 + lane % 4 * 2) * 4,
                              sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
            __syncwarp();
            if (lane < CLUSTER)
                arrive_in_cluster(in_block(ready, lane));
            wait_for_cluster(ready, round);
#pragma unroll 1
            for (int item = threadIdx.x; item < SHARE * (COLUMNS / 4); item += CONSUMERS) {
                const int row = block * SHARE + item / (COLUMNS / 4), column = item % (COLUMNS / 4) * 4;
                if (row >= tile.count)
                    break;
                float4 found[CLUSTER];
#pragma unroll
                for (int b = 0; b < CLUSTER; ++b)
                    found[b] = load_in_cluster(in_block(parts + (row * PITCH + column) * 4, b));
                float total[4] = {};
#pragma unroll
                for (int b = 0; b < CLUSTER; ++b) {
                    total[0] += found[b].x;
                    total[1] += found[b].y;
                    total[2] += found[b].z;
                    total[3] += found[b].w;
                }
                output.put(work.token(i, tile, row), column, total);
            }
            __syncwarp();
            if (lane < CLUSTER)
                arrive_in_cluster(in_block(read, lane));
            round ^= 1;
        }
    }
    if constexpr (CLUSTER > 1) {
        /* a block's shared memory must stay until all have read it */
        if (met)
            wait_for_cluster(read, round ^ 1);
        else
            await_cluster();
    }
}
"""
