"""CUDA C++ of our paged decode kernel: one launch, equal shares of the cache, no barrier in the loop. Owns the code.

**Work** is shared out as `paged_attention_work` says: thread blocks take equal parts, the last to arrive merges.

**Warps** work alone: each has a ring of STAGES buffers in shared memory, which it fills with asynchronous copies and
reads by itself, so that it waits for its own loads only. Warp w takes KV head w % HEADS of the group and the tokens
of slice w / HEADS of a tile. The ring runs across items: loads of the next item are under way while the last one is
being merged.

**Products** are transposed: scores are K q^T and sums V^T P^T, so that tokens and head elements are the 16 rows of a
tensor-core product and a KV head's query heads its 8 columns. That takes half of the registers and instructions that
padding the query heads to 16 rows takes, and P goes from one product to the other within the registers of a warp.

**Table.** The entries of a chunk are copied into shared memory STAGES - 1 rounds before the rows that they lead to, one
number for each token, whatever the block size is.

Macros: HEAD_DIM (a multiple of 16), GROUP (query heads of a KV head), HEADS (KV heads of a block), SLICES, PIECES
(chunks of 16 tokens that a warp takes at a time), STAGES, ADDRESS (0 table, 1 contiguous, 2 one block), BFLOAT16,
SNAP.
"""

from __future__ import annotations

from smbench_kernels import cuda_primitives, paged_attention_work

KERNEL = r"""
/* grid P; THREADS threads; WARPS * WARP_BYTES of shared memory and the states of all slices. Workspace: two slots for
   each block, a counter that is zero between launches for each item. `scale` is the factor of the scores times log2(e),
   `block_shift` the logarithm of `block_size` or negative where that is no power of two, `wrap` the blocks of the
   pool. */
extern "C" __global__ void __launch_bounds__(THREADS)
paged_decode(element *out, float *partials, int *counters, const element *queries, const element *k_cache,
             const element *v_cache, const int *tables, const int *lengths, float scale, int kv_heads, int batch,
             int blocks_per_sequence, int block_size, int block_shift, int wrap)
{
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ int arrived;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int my_head = warp % HEADS, my_slice = warp / HEADS;
    const Inputs inputs = {lengths, batch, kv_heads / HEADS * ROW_GROUPS};

    const Share share = share_of(inputs, lane);
    const int first = share.first, stop = share.stop, block = blockIdx.x;
    if (first == stop)
        return;
    Cursor here = share.start;
    Cursor ahead = here, lookup = here;
    int ahead_left = stop - first, lookup_left = stop - first;

    unsigned char *mine = memory + warp * WARP_BYTES;
    const unsigned ring = shared_address(mine), entries = ring + STAGES * STAGE_BYTES;
    auto block_of = [&](int token) { return block_shift >= 0 ? token >> block_shift : token / block_size; };

    /* one round of table entries; nothing once the range is at its end */
    int lookup_round = 0;
    auto fetch_entries = [&]() {
        if (lookup_left > 0) {
#if ADDRESS == 0
#pragma unroll
            for (int i = 0; i < (CHUNK + WARP - 1) / WARP; ++i) {
                const int token = lookup.tile * TILE + my_slice * CHUNK + i * WARP + lane;
                const bool real = token < lookup.length && i * WARP + lane < CHUNK;
                const long long at = static_cast<long long>(lookup.sequence) * blocks_per_sequence + block_of(token);
                if (i * WARP + lane < CHUNK)
                    copy_4(entries + (lookup_round * CHUNK + i * WARP + lane) * 4, tables + (real ? at : 0), real);
            }
#endif
            advance(lookup, inputs);
            --lookup_left;
        }
        lookup_round = lookup_round + 1 == STAGES ? 0 : lookup_round + 1;
    };

    /* one round of keys and values, by the entries that have come */
    int ahead_round = 0, ahead_stage = 0;
    auto fetch_rows = [&]() {
        if (ahead_left > 0) {
            const int base = ahead.tile * TILE + my_slice * CHUNK;
            const int kv_head = ahead.item / ROW_GROUPS * HEADS + my_head;
            /* lane i has the row of token i (and of token 16 + i) of the chunk */
            int rows[(CHUNK + WARP - 1) / WARP];
#pragma unroll
            for (int i = 0; i < (CHUNK + WARP - 1) / WARP; ++i) {
                const int token = base + i * WARP + lane % CHUNK;
                const int number = block_of(token);
#if ADDRESS == 0
                const int physical = load_shared(entries + (ahead_round * CHUNK + i * WARP + lane % CHUNK) * 4);
#elif ADDRESS == 1
                const int physical = (ahead.sequence * blocks_per_sequence + number) % wrap;
#else
                const int physical = 0;
#endif
                rows[i] = physical * block_size + token - number * block_size;
            }
            const unsigned to = ring + ahead_stage * STAGE_BYTES;
            constexpr int COPIES = CHUNK * PIECES_OF_ROW / WARP;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int at = i * WARP + lane, token = at / PIECES_OF_ROW, piece = at % PIECES_OF_ROW;
                const int row = __shfl_sync(~0u, rows[i * WARP / PIECES_OF_ROW / WARP], token % WARP);
                const long long from = (static_cast<long long>(row) * kv_heads + kv_head) * HEAD_DIM + piece * 8;
                const bool real = base + token < ahead.length;
                const unsigned place = to + token * ROW_BYTES + ((piece ^ (token & 7)) * 16);
                copy_16(place, k_cache + (real ? from : 0), real);
                copy_16(place + HALF_BYTES, v_cache + (real ? from : 0), real);
            }
            advance(ahead, inputs);
            --ahead_left;
        }
        ahead_round = ahead_round + 1 == STAGES ? 0 : ahead_round + 1;
        ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
    };

#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i)
        fetch_entries();
    commit();
    wait_but<0>();

    unsigned query[COLUMNS][DEPTHS][2];
    float sums[COLUMNS][DEPTHS][4], highest[COLUMNS][2], weight[COLUMNS][2];
    int stage = 0;
    /* rows of the matrices that this lane gives the address of */
    const int k_row = lane % 8 + lane / 8 % 2 * 8, k_piece = lane / 16;
    const int v_row = lane % 8 + lane / 16 * 8, v_piece = lane / 8 % 2;

    /* the first rounds only fill the ring */
    for (int now = first - (STAGES - 1); now < stop; ++now) {
        const int kv_head = here.item / ROW_GROUPS * HEADS + my_head, row_group = here.item % ROW_GROUPS;
        if (now == first - (STAGES - 1) || (now > first && here.tile == 0)) {
            const long long row = (static_cast<long long>(here.sequence) * kv_heads + kv_head) * GROUP + row_group * 16;
            const element *q = queries + row * HEAD_DIM;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int member = c * 8 + lane / 4;
                const bool real = row_group * 16 + member < GROUP && member < MEMBERS;
#pragma unroll
                for (int d = 0; d < DEPTHS; ++d) {
                    const element *at = q + member * HEAD_DIM + d * 16 + lane % 4 * 2;
                    query[c][d][0] = real ? *reinterpret_cast<const unsigned *>(at) : 0u;
                    query[c][d][1] = real ? *reinterpret_cast<const unsigned *>(at + 8) : 0u;
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sums[c][d][e] = 0.f;
                }
                highest[c][0] = highest[c][1] = LOWEST;
                weight[c][0] = weight[c][1] = 0.f;
            }
        }
        /* this warp's rows of this round have come, and the table entries that the next copies use; all lanes have read
           what those overwrite */
        if (now >= first)
            wait_but<STAGES - 2>();
        fetch_rows();
        fetch_entries();
        commit();
        if (now < first)
            continue;
        const unsigned keys = ring + stage * STAGE_BYTES, values = keys + HALF_BYTES;
        const int base = here.tile * TILE + my_slice * CHUNK;

        float scores[PIECES][COLUMNS][4];
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            /* two sums, so that a product need not wait for the one before it */
            float others[COLUMNS][4];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    scores[p][c][e] = others[c][e] = 0.f;
#pragma unroll
            for (int d = 0; d < DEPTHS; ++d) {
                unsigned part[4];
                load_matrices(part, keys + (p * 16 + k_row) * ROW_BYTES + (((d * 2 + k_piece) ^ (k_row & 7)) * 16));
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
                    multiply(d % 2 ? others[c] : scores[p][c], part, query[c][d][0], query[c][d][1]);
            }
            /* this thread's tokens are lane / 4 and 8 more */
            const int token = base + p * 16 + lane / 4;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float score = (scores[p][c][e] + others[c][e]) * scale;
                    scores[p][c][e] = token + e / 2 * 8 < here.length ? score : -3.0e38f;
                }
        }

        unsigned weights[PIECES][COLUMNS][2];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float above = highest[c][e];
#pragma unroll
                for (int p = 0; p < PIECES; ++p)
                    above = fmaxf(above, fmaxf(scores[p][c][e], scores[p][c][e + 2]));
#pragma unroll
                for (int distance = 4; distance < WARP; distance *= 2)
                    above = fmaxf(above, __shfl_xor_sync(~0u, above, distance));
                const float shrink = power_of_2(highest[c][e] - above);
                highest[c][e] = above;
                weight[c][e] *= shrink;
#pragma unroll
                for (int p = 0; p < PIECES; ++p)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        scores[p][c][e + 2 * h] = power_of_2(scores[p][c][e + 2 * h] - above);
                        weight[c][e] += scores[p][c][e + 2 * h];
                    }
                /* the highest score seldom changes */
                if (__any_sync(~0u, shrink != 1.f)) {
#pragma unroll
                    for (int d = 0; d < DEPTHS; ++d) {
                        sums[c][d][e] *= shrink;
                        sums[c][d][e + 2] *= shrink;
                    }
                }
            }
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                weights[p][c][0] = transposed(packed(scores[p][c][0], scores[p][c][1]));
                weights[p][c][1] = transposed(packed(scores[p][c][2], scores[p][c][3]));
            }
#pragma unroll
            for (int d = 0; d < DEPTHS; ++d) {
                unsigned part[4];
                load_transposed(part, values + (p * 16 + v_row) * ROW_BYTES + (((d * 2 + v_piece) ^ (v_row & 7)) * 16));
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
                    multiply(sums[c][d], part, weights[p][c][0], weights[p][c][1]);
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        const bool item_ends = here.tile + 1 == here.tiles;
        if (item_ends || now + 1 == stop) {
            const bool whole = item_ends && now - here.tile >= first;
            float *slot = partials + static_cast<long long>(block * 2 + (now - here.tile >= first)) * SLOT;
            element *rows_out =
                out + ((static_cast<long long>(here.sequence) * kv_heads + here.item / ROW_GROUPS * HEADS) * GROUP +
                       row_group * 16) * HEAD_DIM;
            const int members = min(MEMBERS, GROUP - row_group * 16);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int distance = 4; distance < WARP; distance *= 2)
                        weight[c][e] += __shfl_xor_sync(~0u, weight[c][e], distance);
#if SLICES > 1
            /* the states of all slices through shared memory, after the rings of all warps: it is no part of them */
            float *states = reinterpret_cast<float *>(memory + WARPS * WARP_BYTES);
            __syncthreads();
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int member = c * 8 + lane % 4 * 2 + e;
                    float *state = states + (warp * MEMBERS + member) * (HEAD_DIM + 2);
                    if (member < MEMBERS) {
                        if (lane / 4 == 0) {
                            state[HEAD_DIM] = highest[c][e];
                            state[HEAD_DIM + 1] = weight[c][e];
                        }
#pragma unroll
                        for (int d = 0; d < DEPTHS; ++d) {
                            state[d * 16 + lane / 4] = sums[c][d][e];
                            state[d * 16 + lane / 4 + 8] = sums[c][d][e + 2];
                        }
                    }
                }
            __syncthreads();
            for (int i = threadIdx.x; i < HEADS * MEMBERS * HEAD_DIM; i += THREADS) {
                const int row = i / HEAD_DIM, column = i % HEAD_DIM;
                const float *state = states + row * (HEAD_DIM + 2);
                constexpr int NEXT = HEADS * MEMBERS * (HEAD_DIM + 2);
                float above = LOWEST, mass = 0.f, sum = 0.f;
#pragma unroll
                for (int s = 0; s < SLICES; ++s)
                    above = fmaxf(above, state[s * NEXT + HEAD_DIM]);
#pragma unroll
                for (int s = 0; s < SLICES; ++s) {
                    const float factor = power_of_2(state[s * NEXT + HEAD_DIM] - above);
                    mass += state[s * NEXT + HEAD_DIM + 1] * factor;
                    sum += state[s * NEXT + column] * factor;
                }
                const int head = row / MEMBERS, member = row % MEMBERS;
                if (!whole) {
                    slot[2 * HEADS * MEMBERS + row * HEAD_DIM + column] = sum;
                    if (column == 0) {
                        slot[row] = above;
                        slot[HEADS * MEMBERS + row] = mass;
                    }
                } else if (member < members && here.length > 0) {
                    rows_out[static_cast<long long>(head * GROUP + member) * HEAD_DIM + column] = narrowed(sum / mass);
                }
            }
#else
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int member = c * 8 + lane % 4 * 2 + e, row = my_head * MEMBERS + member;
                    const float inverse = 1.f / weight[c][e];
                    if (member < members) {
#pragma unroll
                        for (int d = 0; d < DEPTHS; ++d)
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                const int column = d * 16 + lane / 4 + h * 8;
                                const float sum = sums[c][d][e + 2 * h];
                                if (!whole)
                                    slot[2 * HEADS * MEMBERS + row * HEAD_DIM + column] = sum;
                                else if (here.length > 0)
                                    rows_out[static_cast<long long>(my_head * GROUP + member) * HEAD_DIM + column] =
                                        narrowed(sum * inverse);
                            }
                        if (!whole && lane / 4 == 0) {
                            slot[row] = highest[c][e];
                            slot[HEADS * MEMBERS + row] = weight[c][e];
                        }
                    }
                }
#endif
        }
        advance(here, inputs);
    }

    /* `here` is the tile after the range: where its item began before, the range ends inside an item */
    for (int end = 0; end < 2; ++end) {
        const Cursor at = end ? here : share.start;
        const int begin = (end ? stop : first) - at.tile;
        if (at.tile == 0 || (end && begin < first))
            continue;
        const int owner = owner_of(begin, share);
        const int parts = owner_of(begin + at.tiles - 1, share) - owner + 1;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            int *counter = counters + at.sequence * inputs.items + at.item;
            arrived = atomicAdd(counter, 1);
            if (arrived == parts - 1)
                /* ready for the next launch */
                *counter = 0;
            __threadfence();
        }
        __syncthreads();
        if (arrived == parts - 1) {
            const int row_group = at.item % ROW_GROUPS;
            element *rows_out =
                out + ((static_cast<long long>(at.sequence) * kv_heads + at.item / ROW_GROUPS * HEADS) * GROUP +
                row_group * 16) *
                          HEAD_DIM;
            merge(rows_out, partials, owner, parts, min(MEMBERS, GROUP - row_group * 16));
        }
    }
}
"""

SOURCE = cuda_primitives.SOURCE + paged_attention_work.SOURCE + KERNEL
