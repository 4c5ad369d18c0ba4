"""CUDA C++ of the forward pass for Hopper: two products. Owns the code, not its launch.

**Work.** A block takes 128 queries of one head of one sequence, 64 for each of two groups of four warps, and streams
keys and values past them: S = Q K^T, P = silu(S), O += P V, with P from registers and no statistics of rows.

**Order.** A group queues S of the next tile before its O of this one, so that SiLU of the next runs beside a product.

Macros: TILE (keys of a streamed tile, a multiple of 16), KEY_STAGES, VALUE_STAGES, BFLOAT16.
"""

from __future__ import annotations

KERNEL = r"""
constexpr int GROUP_ROWS = 64, QUERIES = 2 * GROUP_ROWS, RESIDENT_BYTES = QUERIES * HEAD_DIM * 2, STORING = 1;
typedef Ring<TILE, KEY_STAGES> KeyTiles;
typedef Ring<TILE, VALUE_STAGES> ValueTiles;

/* grid (blocks of 128 queries of the longest sequence; heads; batch), 384 threads */
extern "C" __global__ void __launch_bounds__(3 * GROUP_THREADS, 1)
hstu_forward(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
             const __grid_constant__ TensorMap values, element *out, const int *offsets, const int *targets,
             const int *contexts, long long out_row, long long out_head, float half_alpha, float out_scale, int causal)
{
    extern __shared__ unsigned char memory[];
    /* the blocks with the most work first */
    const int query = (gridDim.x - 1 - blockIdx.x) * QUERIES, head = blockIdx.y;
    const Sequence sequence(offsets, targets, contexts, blockIdx.z, causal);
    if (query >= sequence.length)
        return;
    const Keys tiles(sequence, query, QUERIES);

    const unsigned q_tile = (shared_address(memory) + 1023) & ~1023u, k_tiles = q_tile + RESIDENT_BYTES;
    const unsigned v_tiles = k_tiles + KEY_STAGES * KeyTiles::BYTES;
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
            expect(resident, RESIDENT_BYTES);
            copy_tile<QUERIES>(q_tile, queries, head, sequence.start + query, resident);
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
        const unsigned my_q = q_tile + (group - 1) * GROUP_ROWS * ROW_BYTES;
        const int group_query = query + (group - 1) * GROUP_ROWS;
        const int my_query = group_query + threadIdx.x / WARP % 4 * 16 + lane / 4;
        const float hidden = HIDDEN / half_alpha;
        float sums[HEAD_DIM / 2], s[TILE / 2];
        unsigned weights[TILE / 4];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i)
            sums[i] = 0.f;
        settle(sums);

        auto to_weights = [&](float(&x)[TILE / 2], int i) {
#pragma unroll
            for (int e = 0; e < TILE / 2; ++e)
                x[e] = s[e];
            if (!sequence.all_visible(group_query, GROUP_ROWS, tiles.at(i), TILE)) {
                const int key = tiles.at(i) + lane % 4 * 2;
#pragma unroll
                for (int e = 0; e < TILE / 2; ++e)
                    if (!sequence.visible(my_query + e / 2 % 2 * 8, key + e / 4 * 8 + e % 2))
                        x[e] = hidden;
            }
#pragma unroll
            for (int e = 0; e < TILE / 2; ++e) {
                float slope;
                silu(x[e], half_alpha, x[e], slope);
            }
        };

        wait_for(resident, 0);
        k_ring.wait(k_at);
        start_products();
        scores<QUERIES, TILE>(s, my_q, k_ring.tile(k_at));
        commit_products();
        products_but<0>();
        settle(s);
        k_ring.free(k_at);
        k_at.step();
        {
            float x[TILE / 2];
            to_weights(x, 0);
            pack(weights, x);
        }
#pragma unroll 1
        for (int i = 0; i + 1 < tiles.count; ++i) {
            k_ring.wait(k_at);
            settle(sums);
            start_products();
            scores<QUERIES, TILE>(s, my_q, k_ring.tile(k_at));
            commit_products();
            v_ring.wait(v_at);
            weighted<TILE>(sums, weights, v_ring.tile(v_at));
            commit_products();
            products_but<1>();
            settle(s);
            k_ring.free(k_at);
            k_at.step();
            float x[TILE / 2];
            to_weights(x, i + 1);
            products_but<0>();
            settle(sums);
            settle(x);
            v_ring.free(v_at);
            v_at.step();
            pack(weights, x);
        }
        v_ring.wait(v_at);
        settle(sums);
        start_products();
        weighted<TILE>(sums, weights, v_ring.tile(v_at));
        commit_products();
        products_but<0>();
        settle(sums);
        v_ring.free(v_at);
        /* 64 rows of one chunk take 8 KiB and so lie apart; both groups are done with all of them */
        meet<2 * GROUP_THREADS>(STORING);
        const unsigned staging = q_tile + (group - 1) * GROUP_ROWS * HEAD_DIM * 2;
        store_rows(out + sequence.start * out_row + head * out_head, out_row, group_query, sequence.length, sums,
                   out_scale, staging);
    }
}
"""
