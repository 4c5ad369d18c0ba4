"""CUDA C++ of the gradient of queries for Hopper: three products, no atomics. Owns the code, not its launch.

**Work.** A block takes 128 queries of one head of one sequence, 64 for each of two groups of four warps, and streams
keys and values past them: S = Q K^T, dP = dO V^T, dS = dP silu'(S), dQ += dS K, with dS from registers. Together with
the other pass that makes seven products where one pass with atomic additions to dQ makes five, and the same bits
every time.

**Order.** A group queues its S of the next tile after its dQ of this one, and makes the slopes of S while its dP runs.
The two groups drift apart by themselves, so that one computes while the other's products run.

Macros: TILE (keys of a streamed tile: 48 or 64), KEY_STAGES, VALUE_STAGES, BFLOAT16.
"""

from __future__ import annotations

KERNEL = r"""
constexpr int GROUP_ROWS = 64, QUERIES = 2 * GROUP_ROWS, RESIDENT_BYTES = QUERIES * HEAD_DIM * 2, STORING = 1;
typedef Ring<TILE, KEY_STAGES> KeyTiles;
typedef Ring<TILE, VALUE_STAGES> ValueTiles;

/* grid (blocks of 128 queries of the longest sequence; heads; batch), 384 threads */
extern "C" __global__ void __launch_bounds__(3 * GROUP_THREADS, 1)
hstu_dq(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
        const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap douts, element *dq,
        const int *offsets, const int *targets, const int *contexts, long long dq_row, long long dq_head,
        float half_alpha, float dq_scale, int causal)
{
    extern __shared__ unsigned char memory[];
    /* the blocks with the most work first */
    const int query = (gridDim.x - 1 - blockIdx.x) * QUERIES, head = blockIdx.y;
    const Sequence sequence(offsets, targets, contexts, blockIdx.z, causal);
    if (query >= sequence.length)
        return;
    const Keys tiles(sequence, query, QUERIES);

    const unsigned q_tile = (shared_address(memory) + 1023) & ~1023u, o_tile = q_tile + RESIDENT_BYTES;
    const unsigned k_tiles = o_tile + RESIDENT_BYTES, v_tiles = k_tiles + KEY_STAGES * KeyTiles::BYTES;
    const unsigned barriers = v_tiles + VALUE_STAGES * ValueTiles::BYTES, resident = barriers;
    const KeyTiles k_ring(k_tiles, barriers + 8);
    const ValueTiles v_ring(v_tiles, barriers + 8 + KEY_STAGES * 16);
    if (threadIdx.x == 0) {
        make_barrier(resident, 1);
        k_ring.make(8);
        v_ring.make(8);
    }
    meet_all();

    const int group = threadIdx.x / GROUP_THREADS, lane = threadIdx.x % WARP;
    Place<KEY_STAGES> k_at;
    Place<VALUE_STAGES> v_at;
    if (group == 0) {
        fewer_registers<24>();
        if (threadIdx.x == 0) {
            expect(resident, 2 * RESIDENT_BYTES);
            copy_tile<QUERIES>(q_tile, queries, head, sequence.start + query, resident);
            copy_tile<QUERIES>(o_tile, douts, head, sequence.start + query, resident);
#pragma unroll 1
            for (int i = 0; i < tiles.count; ++i) {
                k_ring.fill(k_at, keys, head, sequence.start + tiles.at(i));
                v_ring.fill(v_at, values, head, sequence.start + tiles.at(i));
                k_at.step();
                v_at.step();
            }
        }
    } else {
        more_registers<240>();
        const unsigned my_rows = (group - 1) * GROUP_ROWS * ROW_BYTES;
        const int group_query = query + (group - 1) * GROUP_ROWS;
        const int my_query = group_query + threadIdx.x / WARP % 4 * 16 + lane / 4;
        const float hidden = HIDDEN / half_alpha;
        float sums[HEAD_DIM / 2], s[TILE / 2], dp[TILE / 2];
        unsigned ds[TILE / 4];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i)
            sums[i] = 0.f;
        settle(sums);

        /* the slopes of tile i while its dp is made, then the scores' gradients */
        auto to_gradients = [&](int i) {
            settle(s);
            float slope[TILE / 2];
#pragma unroll
            for (int e = 0; e < TILE / 2; ++e)
                slope[e] = s[e];
            if (!sequence.all_visible(group_query, GROUP_ROWS, tiles.at(i), TILE)) {
                const int key = tiles.at(i) + lane % 4 * 2;
#pragma unroll
                for (int e = 0; e < TILE / 2; ++e)
                    if (!sequence.visible(my_query + e / 2 % 2 * 8, key + e / 4 * 8 + e % 2))
                        slope[e] = hidden;
            }
#pragma unroll
            for (int e = 0; e < TILE / 2; ++e) {
                float value;
                silu(slope[e], half_alpha, value, slope[e]);
            }
            settle(slope);
            products_but<0>();
            settle(dp);
            settle(sums);
            v_ring.free(v_at);
            v_at.step();
#pragma unroll
            for (int e = 0; e < TILE / 2; ++e)
                slope[e] *= dp[e];
            pack(ds, slope);
        };

        wait_for(resident, 0);
        k_ring.wait(k_at);
        v_ring.wait(v_at);
        start_products();
        scores<QUERIES, TILE>(s, q_tile + my_rows, k_ring.tile(k_at));
        commit_products();
        scores<QUERIES, TILE>(dp, o_tile + my_rows, v_ring.tile(v_at));
        commit_products();
        products_but<1>();
#pragma unroll 1
        for (int i = 0; i + 1 < tiles.count; ++i) {
            to_gradients(i);
            const Place<KEY_STAGES> k_done = k_at;
            k_at.step();
            k_ring.wait(k_at);
            start_products();
            weighted<TILE>(sums, ds, k_ring.tile(k_done));
            commit_products();
            scores<QUERIES, TILE>(s, q_tile + my_rows, k_ring.tile(k_at));
            commit_products();
            v_ring.wait(v_at);
            scores<QUERIES, TILE>(dp, o_tile + my_rows, v_ring.tile(v_at));
            commit_products();
            products_but<2>();
            settle(sums);
            k_ring.free(k_done);
            products_but<1>();
        }
        to_gradients(tiles.count - 1);
        start_products();
        weighted<TILE>(sums, ds, k_ring.tile(k_at));
        commit_products();
        products_but<0>();
        settle(sums);
        k_ring.free(k_at);
        /* 64 rows of one chunk take 8 KiB and so lie apart; both groups are done with all of them */
        meet<2 * GROUP_THREADS>(STORING);
        const unsigned staging = q_tile + (group - 1) * GROUP_ROWS * HEAD_DIM * 2;
        store_rows(dq + sequence.start * dq_row + head * dq_head, dq_row, group_query, sequence.length, sums, dq_scale,
                   staging);
    }
}
"""
