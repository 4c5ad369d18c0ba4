"""CUDA C++ of the gradient of queries from kept gradients of scores, for Hopper: one product. Owns the code.

**Work.** A block takes 128 queries, 64 for each of two groups of four warps, and streams keys, and the gradients of
scores that the kernel of keys and values kept, past them: dQ += dS K. Those were kept as that kernel's registers hold
them, keys by queries, and are turned over as they are loaded from shared memory.

Macros: TILE (64: keys of a streamed tile), STAGES, BFLOAT16.
"""

from __future__ import annotations

KERNEL = r"""
constexpr int GROUP_ROWS = Kept::ROWS, GROUPS = 2, QUERIES = GROUPS * GROUP_ROWS, STORING = 1;
constexpr int GRADIENT_BYTES = GROUPS * Kept::BYTES;
typedef Ring<TILE, STAGES> KeyTiles;

/* grid (blocks of QUERIES queries of the longest sequence; pairs of sequence and head from
   `first_pair` on), 384 threads; `workspace` as the kernel of keys and values left it */
extern "C" __global__ void __launch_bounds__((1 + GROUPS) * GROUP_THREADS, 1)
hstu_dq_kept(const __grid_constant__ TensorMap keys, element *dq, const int *offsets, const int *targets,
             const int *contexts, long long dq_row, long long dq_head, float dq_scale, int causal, int heads,
             int first_pair, unsigned char *workspace, long long pair_bytes, int pitch)
{
    extern __shared__ unsigned char memory[];
    /* the blocks with the most work first */
    const int query = (gridDim.x - 1 - blockIdx.x) * QUERIES, pair = first_pair + blockIdx.y, head = pair % heads;
    const Sequence sequence(offsets, targets, contexts, pair / heads, causal);
    if (query >= sequence.length)
        return;
    const Keys tiles(sequence, query, QUERIES);
    const Kept kept = {workspace + blockIdx.y * pair_bytes, pitch};

    const unsigned k_tiles = (shared_address(memory) + 1023) & ~1023u, gradients = k_tiles + STAGES * KeyTiles::BYTES;
    const KeyTiles ring(k_tiles, gradients + STAGES * GRADIENT_BYTES);
    if (threadIdx.x == 0)
        ring.make(4 * GROUPS);
    meet_all();

    const int group = threadIdx.x / GROUP_THREADS, lane = threadIdx.x % WARP;
    Place<STAGES> at;
    if (group == 0) {
        fewer_registers<24>();
        if (threadIdx.x == 0) {
#pragma unroll 1
            for (int i = 0; i < tiles.count; ++i) {
                const int key_block = tiles.at(i) / Kept::ROWS, query_block = query / Kept::ROWS;
                bool there[GROUPS];
                int bytes = 0;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    there[g] = Kept::has(sequence, query_block + g, key_block);
                    bytes += there[g] ? Kept::BYTES : 0;
                }
                ring.fill(at, keys, head, sequence.start + tiles.at(i), bytes);
#pragma unroll
                for (int g = 0; g < GROUPS; ++g)
                    if (there[g])
                        copy_bytes<Kept::BYTES>(gradients + at.stage * GRADIENT_BYTES + g * Kept::BYTES,
                                                kept.at(query_block + g, key_block), ring.full + at.stage * 8);
                at.step();
            }
        }
    } else {
        more_registers<240>();
        const int warp = threadIdx.x / WARP - 4, group_query = query + (group - 1) * GROUP_ROWS;
        /* of four matrices of 8 x 8 the second and third change places as all are turned over */
        const int matrix = lane / 8 % 2 * 2 + lane / 16;
        const unsigned mine = gradients + warp * Kept::PART_BYTES + matrix * 128 + lane % 8 * 16;
        float sums[HEAD_DIM / 2];
        unsigned ds[TILE / 4];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i)
            sums[i] = 0.f;
        settle(sums);
#pragma unroll 1
        for (int i = 0; i < tiles.count; ++i) {
            const bool there = Kept::has(sequence, group_query / Kept::ROWS, tiles.at(i) / Kept::ROWS);
            ring.wait(at);
#pragma unroll
            for (int k = 0; k < TILE / 16; ++k) {
                unsigned part[4];
                load_transposed(part, mine + at.stage * GRADIENT_BYTES + k * 512);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    ds[4 * k + e] = there ? part[e] : 0u;
            }
            settle(ds);
            start_products();
            weighted<TILE>(sums, ds, ring.tile(at));
            commit_products();
            products_but<0>();
            settle(sums);
            ring.free(at);
            at.step();
        }
        meet<GROUPS * GROUP_THREADS>(STORING);
        store_rows(dq + sequence.start * dq_row + head * dq_head, dq_row, group_query, sequence.length, sums, dq_scale,
                   k_tiles + (group - 1) * GROUP_ROWS * HEAD_DIM * 2);
    }
}
"""
