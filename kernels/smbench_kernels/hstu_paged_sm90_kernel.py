"""CUDA C++ of HSTU attention over pages for Hopper: one step's append and attention in one launch. Owns no launch.

**Work.** A thread block takes strips of 128 rows of one head of one user (`hstu_paged_sm90_schedule`), 64 rows for each
of two groups of four warps, and streams keys and values past them as the forward pass of training does
(`hstu_attention_sm90_forward`): first the cached ones from their pages, which every row sees, then those of the step's
own rows, from where the layer made them. So the pages of new tokens are not read in the launch that writes them.

**Who does what.** Of the third group one warp copies keys, one values, one queries, and the last writes new history to
its pages (`hstu_paged_sm90_copies`). Thread blocks that share a strip add up their sums (`hstu_paged_sm90_sums`).

Macros: TILE, PAGE, KEY_STAGES, VALUE_STAGES, BFLOAT16.
"""

from __future__ import annotations

KERNEL = r"""
constexpr int GROUP_ROWS = 64, STRIP_BYTES = STRIP * HEAD_DIM * 2;
typedef Ring<STRIP, 1> QueryTiles;
typedef Ring<TILE, KEY_STAGES> KeyTiles;
typedef Ring<TILE, VALUE_STAGES> ValueTiles;

/* by one warp: what every thread block finds the same */
__device__ inline void share_out(Shares &shares, const Users &users, int heads)
{
    const int lane = threadIdx.x % WARP;
    int tiles = 0, longest = 0, most = 0, all = 0, before = 0;
    for (int base = 0; base < users.count; base += WARP) {
        const int user = base + lane;
        int weight = 0;
        if (user < users.count) {
            const Sequence rows = users.sequence(user);
            const int cached = users.cached(user, rows);
            for (int row = 0; row < rows.length; row += STRIP) {
                const int count = Visit(rows, cached, row).count();
                tiles += count;
                weight = max(weight, count);
            }
            const int strips = (rows.length + STRIP - 1) / STRIP;
            most = max(most, strips);
            all += strips;
        }
        longest = max(longest, weight);
        for (int d = 1; d < WARP; d *= 2) {
            const int others = __shfl_up_sync(~0u, weight, d);
            weight += lane >= d ? others : 0;
        }
        if (user < users.count)
            shares.before[user + 1] = before + weight;
        before += __shfl_sync(~0u, weight, WARP - 1);
    }
    for (int d = 1; d < WARP; d *= 2) {
        tiles += __shfl_xor_sync(~0u, tiles, d);
        longest = max(longest, __shfl_xor_sync(~0u, longest, d));
        most = max(most, __shfl_xor_sync(~0u, most, d));
        all += __shfl_xor_sync(~0u, all, d);
    }
    __syncwarp();
    if (lane == 0) {
        shares.before[0] = 0;
        shares.decide(tiles, longest, most, all, heads, users.count, gridDim.x);
    }
}

/* grid (at most one thread block a multiprocessor), 384 threads; `kept` has room for 2 * STRIP * HEAD_DIM a block,
   `counters` a 0 for each */
extern "C" __global__ void __launch_bounds__(3 * GROUP_THREADS, 1)
hstu_paged(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
           const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap pages, element *out,
           const element *k, const element *v, element *cache, const int *offsets, const int *targets,
           const int *totals, const int *page_offsets, const int *page_ids, float *kept, int *counters,
           long long out_row, long long out_head, long long k_row, long long k_head, long long v_row, long long v_head,
           int count, int heads, float half_alpha, float out_scale, int appends)
{
    extern __shared__ unsigned char memory[];
    __shared__ Shares shares;
    const unsigned q_tile = (shared_address(memory) + 1023) & ~1023u, k_tiles = q_tile + STRIP_BYTES;
    const unsigned v_tiles = k_tiles + KEY_STAGES * KeyTiles::BYTES;
    const unsigned barriers = v_tiles + VALUE_STAGES * ValueTiles::BYTES;
    const QueryTiles q_ring(q_tile, barriers);
    const KeyTiles k_ring(k_tiles, barriers + 16);
    const ValueTiles v_ring(v_tiles, barriers + 16 + KEY_STAGES * 16);
    const Users users = {offsets, targets, totals, count};
    const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == WARP) {
        q_ring.make(8);
        k_ring.make(8);
        v_ring.make(8);
    }
    if (warp == 0)
        share_out(shares, users, heads);
    meet_all();
    /* before this line nothing depends on the launch in front but lengths, which it must not write */
    await_launch_before();
    let_next_start();

    if (group == 0) {
        fewer_registers<40>();
        if (warp == 0) {
            stream(k_ring, shares, users, pages, keys, page_offsets, page_ids, 0);
        } else if (warp == 1) {
            stream(v_ring, shares, users, pages, values, page_offsets, page_ids, 1);
        } else if (warp == 2) {
            Place<1> at;
            for (Walk walk(shares, blockIdx.x, gridDim.x); walk.more(); walk.step()) {
                const Piece piece(walk);
                const Sequence rows = users.sequence(piece.user);
                if (piece.row >= rows.length)
                    continue;
                if (lane == 0)
                    q_ring.fill(at, queries, piece.head, rows.start + piece.row);
                at.step();
            }
        } else if (appends) {
            append(users, heads, k, v, cache, k_row, k_head, v_row, v_head, page_offsets, page_ids);
        }
    } else {
        more_registers<232>();
        const unsigned my_q = q_tile + (group - 1) * GROUP_ROWS * ROW_BYTES;
        const float hidden = HIDDEN / half_alpha;
        float sums[HEAD_DIM / 2], s[TILE / 2];
        unsigned weights[TILE / 4];
        Place<1> q_at;
        Place<KEY_STAGES> k_at;
        Place<VALUE_STAGES> v_at;
#pragma unroll 1
        for (Walk walk(shares, blockIdx.x, gridDim.x); walk.more(); walk.step()) {
            Piece piece(walk);
            const Sequence rows = users.sequence(piece.user);
            if (piece.row >= rows.length)
                continue;
            const Visit visit(rows, users.cached(piece.user, rows), piece.row);
            piece.scale(walk, visit.count());
            const int group_row = piece.row + (group - 1) * GROUP_ROWS;

            /* what everybody sees needs no mask; of the last tile there is less than a tile */
            auto to_weights = [&](float(&x)[TILE / 2], int i) {
#pragma unroll
                for (int e = 0; e < TILE / 2; ++e)
                    x[e] = s[e];
                if (i >= visit.of_cache) {
                    const int first = visit.own.at(i - visit.of_cache);
                    if (!rows.all_visible(group_row, GROUP_ROWS, first, TILE)) {
                        const int row = group_row + threadIdx.x / WARP % 4 * 16 + lane / 4, key = first + lane % 4 * 2;
#pragma unroll
                        for (int e = 0; e < TILE / 2; ++e)
                            if (!rows.visible(row + e / 2 % 2 * 8, key + e / 4 * 8 + e % 2))
                                x[e] = hidden;
                    }
                }
#pragma unroll
                for (int e = 0; e < TILE / 2; ++e) {
                    float slope;
                    silu(x[e], half_alpha, x[e], slope);
                }
            };
            /* values past the end of the rows may be no numbers, which a weight of 0 does not hide */
            auto clear_past_end = [&](int i) {
                if (i < visit.of_cache)
                    return;
                const int first = visit.own.at(i - visit.of_cache);
                if (first + TILE > rows.length) {
                    v_ring.wait(v_at);
                    clear_rows(v_ring.tile(v_at), rows.length - first, CLEARING + group - 1);
                }
            };

#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i)
                sums[i] = 0.f;
            settle(sums);
            q_ring.wait(q_at);
            if (piece.begin < piece.end) {
                k_ring.wait(k_at);
                start_products();
                scores<STRIP, TILE>(s, my_q, k_ring.tile(k_at));
                commit_products();
                products_but<0>();
                settle(s);
                k_ring.free(k_at);
                k_at.step();
                {
                    float x[TILE / 2];
                    to_weights(x, piece.begin);
                    pack(weights, x);
                }
#pragma unroll 1
                for (int i = piece.begin; i + 1 < piece.end; ++i) {
                    clear_past_end(i);
                    k_ring.wait(k_at);
                    settle(sums);
                    start_products();
                    scores<STRIP, TILE>(s, my_q, k_ring.tile(k_at));
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
                clear_past_end(piece.end - 1);
                v_ring.wait(v_at);
                settle(sums);
                start_products();
                weighted<TILE>(sums, weights, v_ring.tile(v_at));
                commit_products();
                products_but<0>();
                settle(sums);
                v_ring.free(v_at);
                v_at.step();
            }
            const int thread = threadIdx.x - GROUP_THREADS;
            Four *sums_of_all = reinterpret_cast<Four *>(kept);
            if (piece.count == 1 || (piece.gathered() && piece.number == 0)) {
                if (piece.count > 1)
                    gather(sums, piece, shares, sums_of_all, counters + piece.first);
                /* 64 rows of one chunk take 8 KiB and so lie apart; both groups are done with all of them */
                meet<2 * GROUP_THREADS>(STORING);
                const unsigned staging = q_tile + (group - 1) * GROUP_ROWS * HEAD_DIM * 2;
                store_rows(out + rows.start * out_row + piece.head * out_head, out_row, group_row, rows.length, sums,
                           out_scale, staging);
                publish();
                q_ring.free(q_at);
            } else {
                /* the next queries may come while these sums leave */
                q_ring.free(q_at);
                Four *to = sums_of_all + place_of(blockIdx.x, piece.number) + thread;
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    to[p * 2 * GROUP_THREADS] = {sums[4 * p], sums[4 * p + 1], sums[4 * p + 2], sums[4 * p + 3]};
                __threadfence();
                meet<2 * GROUP_THREADS>(STORING);
                if (thread == 0)
                    atomicAdd(counters + piece.first, 1);
            }
            q_at.step();
        }
        for (Walk walk(shares, blockIdx.x, gridDim.x); walk.more(); walk.step()) {
            const Piece piece(walk);
            const Sequence rows = users.sequence(piece.user);
            if (piece.count > 1 && !piece.gathered() && piece.row < rows.length)
                add_up(piece, shares, reinterpret_cast<const Four *>(kept), counters + piece.first,
                       out + rows.start * out_row + piece.head * out_head, out_row, rows.length, out_scale);
        }
    }
}
"""
