"""CUDA C++ of the gradients of keys and values for Hopper: four products, no atomics. Owns the code, not its launch.

**Work.** A block takes 64 keys of one head of one sequence and streams queries and output gradients past them. The
float32 sums of dK and dV of 64 x 256 take 128 registers a thread of four warps each: more keys do not fit.

**Roles.** One thread copies. One group of four warps makes S^T = K Q^T, P^T = silu(S^T) and dV += P^T dO; the other
dP^T = V dO^T, dS^T = dP^T silu'(S^T) and dK += dS^T Q: two products each, so that nothing is computed twice. Products
are transposed for their results to be the first operand of the next within registers. Only silu'(S^T) goes from one
group to the other, as float16 through shared memory: thread i writes what thread i reads.

**Order.** Each group queues its scores product of the next tile before its product by rows of this one, and computes
what follows of the next while that runs. Three stages of each ring: both groups are in a tile and the next at a time.

**Kept.** Where KEEP is 1 the gradients of the scores go to the workspace from the registers in which they are an
operand: the kernel of queries then makes one product instead of three (`hstu_attention_sm90_dq_kept`).

Macros: TILE (queries of a streamed tile: 48 or 64), STAGES (of each ring), KEEP (whether gradients of scores are kept),
BFLOAT16.
"""

from __future__ import annotations

KERNEL = r"""
constexpr int KEYS = 64, RESIDENT_BYTES = KEYS * HEAD_DIM * 2, SLOPE_BYTES = KEYS * TILE * 2;
constexpr int SLOPES_FULL = 1, SLOPES_EMPTY = 3, STORING = 5;
typedef Ring<TILE, STAGES> Tiles;

/* grid (blocks of 64 keys of the longest sequence; pairs of sequence and head from `first_pair`
   on), 384 threads; `workspace` has `pair_bytes` for each pair of the grid */
extern "C" __global__ void __launch_bounds__(3 * GROUP_THREADS, 1)
hstu_dkdv(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
          const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap douts, element *dk, element *dv,
          const int *offsets, const int *targets, const int *contexts, long long dk_row, long long dk_head,
          long long dv_row, long long dv_head, float half_alpha, float dk_scale, float dv_scale, int causal, int heads,
          int first_pair, unsigned char *workspace, long long pair_bytes, int pitch)
{
    extern __shared__ unsigned char memory[];
    const int pair = first_pair + blockIdx.y, head = pair % heads, key = blockIdx.x * KEYS;
    const Sequence sequence(offsets, targets, contexts, pair / heads, causal);
    if (key >= sequence.length)
        return;
    const Queries tiles(sequence, key, KEYS);

    const unsigned k_tile = (shared_address(memory) + 1023) & ~1023u, v_tile = k_tile + RESIDENT_BYTES;
    const unsigned q_tiles = v_tile + RESIDENT_BYTES, o_tiles = q_tiles + STAGES * Tiles::BYTES;
    const unsigned slopes = o_tiles + STAGES * Tiles::BYTES, barriers = slopes + 2 * SLOPE_BYTES;
    const unsigned resident = barriers;
    const Tiles q_ring(q_tiles, barriers + 8), o_ring(o_tiles, barriers + 8 + STAGES * 16);
    if (threadIdx.x == 0) {
        make_barrier(resident, 1);
        q_ring.make(8);
        o_ring.make(8);
    }
    meet_all();

    const int group = threadIdx.x / GROUP_THREADS, lane = threadIdx.x % WARP;
    const int my_key = key + threadIdx.x / WARP % 4 * 16 + lane / 4;
    const unsigned my_slopes = slopes + threadIdx.x % GROUP_THREADS * 16;
    Place<STAGES> q_at, o_at;
    if (group == 0) {
        fewer_registers<24>();
        if (threadIdx.x == 0) {
            expect(resident, 2 * RESIDENT_BYTES);
            copy_tile<KEYS>(k_tile, keys, head, sequence.start + key, resident);
            copy_tile<KEYS>(v_tile, values, head, sequence.start + key, resident);
#pragma unroll 1
            for (int i = 0; i < tiles.count; ++i) {
                q_ring.fill(q_at, queries, head, sequence.start + tiles.at(i));
                o_ring.fill(o_at, douts, head, sequence.start + tiles.at(i));
                q_at.step();
                o_at.step();
            }
        }
    } else if (group == 1) {
        more_registers<240>();
        float sums[HEAD_DIM / 2], s[TILE / 2];
        unsigned weights[TILE / 4];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i)
            sums[i] = 0.f;
        settle(sums);

        const float hidden = HIDDEN / half_alpha;
        /* weights of the scores of tile i, and their slopes to the other group */
        auto to_weights = [&](float(&x)[TILE / 2], int i) {
            const int query = tiles.at(i) + lane % 4 * 2;
#pragma unroll
            for (int e = 0; e < TILE / 2; ++e)
                x[e] = s[e];
            if (!sequence.all_visible(tiles.at(i), TILE, key, KEYS)) {
#pragma unroll
                for (int e = 0; e < TILE / 2; ++e)
                    if (!sequence.visible(query + e / 4 * 8 + e % 2, my_key + e / 2 % 2 * 8))
                        x[e] = hidden;
            }
            unsigned slope[TILE / 4];
#pragma unroll
            for (int e = 0; e < TILE / 2; e += 2) {
                float derivative[2];
                silu(x[e], half_alpha, x[e], derivative[0]);
                silu(x[e + 1], half_alpha, x[e + 1], derivative[1]);
                slope[e / 2] = packed_half(derivative[0], derivative[1]);
            }
            if (i >= 2)
                meet<2 * GROUP_THREADS>(SLOPES_EMPTY + i % 2);
#pragma unroll
            for (int e = 0; e < TILE / 4; e += 4)
                asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(my_slopes + i % 2 * SLOPE_BYTES +
                                                                                e / 4 * 16 * GROUP_THREADS),
                             "r"(slope[e]), "r"(slope[e + 1]), "r"(slope[e + 2]), "r"(slope[e + 3])
                             : "memory");
            announce<2 * GROUP_THREADS>(SLOPES_FULL + i % 2);
        };

        wait_for(resident, 0);
        q_ring.wait(q_at);
        start_products();
        scores<KEYS, TILE>(s, k_tile, q_ring.tile(q_at));
        commit_products();
        products_but<0>();
        settle(s);
        q_ring.free(q_at);
        q_at.step();
        {
            float x[TILE / 2];
            to_weights(x, 0);
            pack(weights, x);
        }
#pragma unroll 1
        for (int i = 0; i + 1 < tiles.count; ++i) {
            q_ring.wait(q_at);
            settle(sums);
            start_products();
            scores<KEYS, TILE>(s, k_tile, q_ring.tile(q_at));
            commit_products();
            o_ring.wait(o_at);
            weighted<TILE>(sums, weights, o_ring.tile(o_at));
            commit_products();
            products_but<1>();
            settle(s);
            q_ring.free(q_at);
            q_at.step();
            float x[TILE / 2];
            to_weights(x, i + 1);
            products_but<0>();
            settle(sums);
            settle(x);
            o_ring.free(o_at);
            o_at.step();
            pack(weights, x);
        }
        o_ring.wait(o_at);
        settle(sums);
        start_products();
        weighted<TILE>(sums, weights, o_ring.tile(o_at));
        commit_products();
        products_but<0>();
        settle(sums);
        o_ring.free(o_at);
        meet<GROUP_THREADS>(STORING);
        store_rows(dv + sequence.start * dv_row + head * dv_head, dv_row, key, sequence.length, sums, dv_scale,
                   k_tile);
    } else {
        more_registers<240>();
        const int my_part = threadIdx.x / WARP % 4 * 512 + lane * 4;
        float sums[HEAD_DIM / 2], dp[TILE / 2];
        unsigned ds[TILE / 4];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i)
            sums[i] = 0.f;
        settle(sums);

        /* the scores' gradients of tile i, of what came of dp and the other group's slopes */
        auto to_gradients = [&](float(&x)[TILE / 2], int i) {
            meet<2 * GROUP_THREADS>(SLOPES_FULL + i % 2);
#pragma unroll
            for (int e = 0; e < TILE / 4; e += 4) {
                unsigned slope[4];
                load_four(slope[0], slope[1], slope[2], slope[3],
                          my_slopes + i % 2 * SLOPE_BYTES + e / 4 * 16 * GROUP_THREADS);
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    float low, high;
                    unpacked_half(slope[f], low, high);
                    x[2 * (e + f)] = dp[2 * (e + f)] * low;
                    x[2 * (e + f) + 1] = dp[2 * (e + f) + 1] * high;
                }
            }
            settle(x);
            announce<2 * GROUP_THREADS>(SLOPES_EMPTY + i % 2);
        };
        /* and go to the other kernel as they are: 8 x 8 after 8 x 8, which that one turns over as it loads them */
        auto keep = [&](int i) {
#if KEEP
            const Kept kept = {workspace + blockIdx.y * pair_bytes, pitch};
#pragma unroll
            for (int f = 0; f < TILE / Kept::PART_ROWS; ++f) {
                const int query = tiles.at(i) + f * Kept::PART_ROWS, part = query / Kept::PART_ROWS % 4;
                if (!Kept::has(sequence, query / Kept::ROWS, key / KEYS))
                    continue;
                const unsigned char *to = kept.at(query / Kept::ROWS, key / KEYS) + part * Kept::PART_BYTES + my_part;
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    asm volatile("st.global.b32 [%0], %1;" ::"l"(to + e * 128), "r"(ds[4 * f + e]) : "memory");
            }
#endif
        };
        wait_for(resident, 0);
        o_ring.wait(o_at);
        start_products();
        scores<KEYS, TILE>(dp, v_tile, o_ring.tile(o_at));
        commit_products();
        products_but<0>();
        settle(dp);
        o_ring.free(o_at);
        o_at.step();
        {
            float x[TILE / 2];
            to_gradients(x, 0);
            pack(ds, x);
        }
#pragma unroll 1
        for (int i = 0; i + 1 < tiles.count; ++i) {
            o_ring.wait(o_at);
            settle(sums);
            start_products();
            scores<KEYS, TILE>(dp, v_tile, o_ring.tile(o_at));
            commit_products();
            q_ring.wait(q_at);
            weighted<TILE>(sums, ds, q_ring.tile(q_at));
            commit_products();
            keep(i);
            products_but<1>();
            settle(dp);
            o_ring.free(o_at);
            o_at.step();
            float x[TILE / 2];
            to_gradients(x, i + 1);
            products_but<0>();
            settle(sums);
            settle(x);
            q_ring.free(q_at);
            q_at.step();
            pack(ds, x);
        }
        q_ring.wait(q_at);
        settle(sums);
        start_products();
        weighted<TILE>(sums, ds, q_ring.tile(q_at));
        commit_products();
        keep(tiles.count - 1);
        products_but<0>();
        settle(sums);
        q_ring.free(q_at);
        meet<GROUP_THREADS>(STORING + 1);
        store_rows(dk + sequence.start * dk_row + head * dk_head, dk_row, key, sequence.length, sums, dk_scale,
                   v_tile);
    }
}
"""
