"""CUDA C++ of the paged-attention algorithm of 2023 (versions 1 and 2), written anew for document 001. Owns the code.

The algorithm is that of `paged_attention_v1/v2` in vLLM 0.3, described in Kwon et al., "Efficient Memory Management
for Large Language Model Serving with PagedAttention" (2023) and deleted from vLLM since: one thread block of four
warps for each head and sequence (and partition of 512 tokens in version 2), one warp for each KV block; the threads
of a warp form groups, one for each token of the block, whose loads are 16 bytes for a whole group; scores of all
tokens in shared memory; softmax; a second walk over the blocks for the values, which reads the block table again.
Query heads of one KV head share nothing. No line of vLLM's is in it.

Macros: HEAD_SIZE (a multiple of 32), BLOCK_SIZE (a power of two up to 256), ADDRESS (0 table, 1 contiguous, 2 one
block), WRAP (blocks of the pool where computed numbers pass it, else 0), BFLOAT16, PARTITION (tokens; 0 for version
1). Layouts: K [blocks, kv heads, HEAD_SIZE / 8, BLOCK_SIZE, 8], V [blocks, kv heads, HEAD_SIZE, BLOCK_SIZE].
"""

from __future__ import annotations

from smbench_kernels import cuda_primitives

KERNEL = r"""
constexpr int WARPS = 4;
constexpr int THREADS = WARP * WARPS;
/* elements of a 16-byte row of K */
constexpr int PACK = 8;

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

/* threads that share a token; each loads its part of 16 bytes */
constexpr int GROUP_THREADS = larger(WARP / BLOCK_SIZE, 1);
constexpr int TOKENS_PER_GROUP = (BLOCK_SIZE + WARP - 1) / WARP;
constexpr int K_VECTOR = larger(PACK / GROUP_THREADS, 1);
constexpr int K_VECTORS = HEAD_SIZE / GROUP_THREADS / K_VECTOR;
constexpr int V_VECTOR = smaller(PACK, BLOCK_SIZE);
constexpr int V_VECTORS_PER_ROW = BLOCK_SIZE / V_VECTOR;
constexpr int V_ROWS_PER_ROUND = WARP / V_VECTORS_PER_ROW;
constexpr int V_ROUNDS = (HEAD_SIZE + V_ROWS_PER_ROUND - 1) / V_ROWS_PER_ROUND;

__device__ inline long long physical_block(const int *table, int block, int sequence, int blocks_per_sequence)
{
#if ADDRESS == 0
    return table[block];
#elif ADDRESS == 1 && WRAP
    return (sequence * blocks_per_sequence + block) % WRAP;
#elif ADDRESS == 1
    return sequence * blocks_per_sequence + block;
#else
    return 0;
#endif
}

__device__ inline float block_sum(float *scratch, float value)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int mask = WARP / 2; mask >= 1; mask /= 2)
        value += __shfl_xor_sync(~0u, value, mask);
    if (lane == 0)
        scratch[warp] = value;
    __syncthreads();
    value = lane < WARPS ? scratch[lane] : 0.f;
#pragma unroll
    for (int mask = WARPS / 2; mask >= 1; mask /= 2)
        value += __shfl_xor_sync(~0u, value, mask);
    return __shfl_sync(~0u, value, 0);
}

/* grid (heads, sequences, partitions), THREADS threads; shared memory: scores of the tokens of a partition, at least
   WARPS / 2 * HEAD_SIZE floats. Version 1 writes `out` [sequences, heads, HEAD_SIZE]; version 2 the same for each
   partition as floats in `partial`, with the greatest score and the sum of exponentials. */
extern "C" __global__ void __launch_bounds__(THREADS)
paged_attention(element *out, float *partial, float *highest_scores, float *exponential_sums, const element *queries,
                const element *k_cache, const element *v_cache, const int *tables, const int *lengths, float scale,
                int kv_heads, int blocks_per_sequence, int partitions)
{
    extern __shared__ float scores[];
    __shared__ element query[GROUP_THREADS][K_VECTORS * K_VECTOR];
    __shared__ float scratch[2 * WARPS];

    const int head = blockIdx.x, heads = gridDim.x, sequence = blockIdx.y, partition = blockIdx.z;
    const int length = lengths[sequence];
    const int first_token = PARTITION ? partition * PARTITION : 0;
    if (first_token >= length)
        return;
    const int blocks = (length + BLOCK_SIZE - 1) / BLOCK_SIZE;
    const int first_block = first_token / BLOCK_SIZE;
    const int end_block = PARTITION ? smaller(blocks, (first_token + PARTITION) / BLOCK_SIZE) : blocks;
    const int tokens = smaller(length - first_token, (end_block - first_block) * BLOCK_SIZE);

    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int group = lane / GROUP_THREADS, member = lane % GROUP_THREADS;
    const int kv_head = head / (heads / kv_heads);
    const int *table = tables + static_cast<long long>(sequence) * blocks_per_sequence;
    const element *q = queries + (static_cast<long long>(sequence) * heads + head) * HEAD_SIZE;
    const long long head_stride = HEAD_SIZE * BLOCK_SIZE, block_stride = kv_heads * head_stride;

    /* vector j of a group's member is vector member + j * GROUP_THREADS of the head */
    for (int i = thread; i < HEAD_SIZE; i += THREADS) {
        const int vector = i / K_VECTOR;
        query[vector % GROUP_THREADS][vector / GROUP_THREADS * K_VECTOR + i % K_VECTOR] = q[i];
    }
    __syncthreads();

    float highest = -3.4e38f;
    for (int block = first_block + warp; block < end_block; block += WARPS) {
        const long long physical = physical_block(table, block, sequence, blocks_per_sequence);
#pragma unroll
        for (int i = 0; i < TOKENS_PER_GROUP; ++i) {
            const int slot = group + i * WARP;
            const int token = block * BLOCK_SIZE + slot;
            const element *k = k_cache + physical * block_stride + kv_head * head_stride + slot * PACK;
            Vector<K_VECTOR> keys[K_VECTORS];
#pragma unroll
            for (int j = 0; j < K_VECTORS; ++j) {
                const int at = (member + j * GROUP_THREADS) * K_VECTOR;
                keys[j] = loaded<K_VECTOR>(k + at / PACK * BLOCK_SIZE * PACK + at % PACK);
            }
            float lanes[K_VECTOR] = {};
#pragma unroll
            for (int j = 0; j < K_VECTORS; ++j)
#pragma unroll
                for (int e = 0; e < K_VECTOR; ++e)
                    lanes[e] += widened(query[member][j * K_VECTOR + e]) * widened(keys[j].value[e]);
            float score = 0.f;
#pragma unroll
            for (int e = 0; e < K_VECTOR; ++e)
                score += lanes[e];
#pragma unroll
            for (int mask = GROUP_THREADS / 2; mask >= 1; mask /= 2)
                score += __shfl_xor_sync(~0u, score, mask);
            score *= scale;
            if (member == 0) {
                const bool outside = token >= length;
                scores[token - first_token] = outside ? 0.f : score;
                highest = outside ? highest : fmaxf(highest, score);
            }
        }
    }
#pragma unroll
    for (int mask = WARP / 2; mask >= GROUP_THREADS; mask /= 2)
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
    if (lane == 0)
        scratch[warp] = highest;
    __syncthreads();
    highest = lane < WARPS ? scratch[lane] : -3.4e38f;
#pragma unroll
    for (int mask = WARPS / 2; mask >= 1; mask /= 2)
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
    highest = __shfl_sync(~0u, highest, 0);

    float sum = 0.f;
    for (int i = thread; i < tokens; i += THREADS) {
        const float value = __expf(scores[i] - highest);
        scores[i] = value;
        sum += value;
    }
    sum = block_sum(scratch + WARPS, sum);
    const float share = 1.f / (sum + 1e-6f);
    for (int i = thread; i < tokens; i += THREADS)
        scores[i] *= share;
    __syncthreads();

    const int state = (sequence * heads + head) * partitions + partition;
    if (PARTITION && thread == 0) {
        highest_scores[state] = highest;
        exponential_sums[state] = sum;
    }

    float sums[V_ROUNDS] = {};
    for (int block = first_block + warp; block < end_block; block += WARPS) {
        const long long physical = physical_block(table, block, sequence, blocks_per_sequence);
        const int slot = lane % V_VECTORS_PER_ROW * V_VECTOR;
        const int token = block * BLOCK_SIZE + slot;
        float weights[V_VECTOR];
#pragma unroll
        for (int e = 0; e < V_VECTOR; ++e)
            /* rounded as the values are, as the original rounds them */
            weights[e] = widened(narrowed(scores[token - first_token + e]));
        const element *v = v_cache + physical * block_stride + kv_head * head_stride + slot;
#pragma unroll
        for (int i = 0; i < V_ROUNDS; ++i) {
            const int row = lane / V_VECTORS_PER_ROW + i * V_ROWS_PER_ROUND;
            if (row < HEAD_SIZE) {
                const Vector<V_VECTOR> values = loaded<V_VECTOR>(v + row * BLOCK_SIZE);
#pragma unroll
                for (int e = 0; e < V_VECTOR; ++e)
                    /* what lies past the end of a sequence may be anything, NaN included */
                    sums[i] += token + e < length ? weights[e] * widened(values.value[e]) : 0.f;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < V_ROUNDS; ++i)
#pragma unroll
        for (int mask = V_VECTORS_PER_ROW / 2; mask >= 1; mask /= 2)
            sums[i] += __shfl_xor_sync(~0u, sums[i], mask);

    /* the scores are no longer needed: their memory takes the sums of half of the warps at a time */
    __syncthreads();
#pragma unroll
    for (int half = WARPS / 2; half >= 1; half /= 2) {
        if (warp >= half && warp < 2 * half && lane % V_VECTORS_PER_ROW == 0)
#pragma unroll
            for (int i = 0; i < V_ROUNDS; ++i) {
                const int row = lane / V_VECTORS_PER_ROW + i * V_ROWS_PER_ROUND;
                if (row < HEAD_SIZE)
                    scores[(warp - half) * HEAD_SIZE + row] = sums[i];
            }
        __syncthreads();
        if (warp < half && lane % V_VECTORS_PER_ROW == 0)
#pragma unroll
            for (int i = 0; i < V_ROUNDS; ++i) {
                const int row = lane / V_VECTORS_PER_ROW + i * V_ROWS_PER_ROUND;
                if (row < HEAD_SIZE)
                    sums[i] += scores[warp * HEAD_SIZE + row];
            }
        __syncthreads();
    }
    if (warp == 0 && lane % V_VECTORS_PER_ROW == 0)
#pragma unroll
        for (int i = 0; i < V_ROUNDS; ++i) {
            const int row = lane / V_VECTORS_PER_ROW + i * V_ROWS_PER_ROUND;
            if (row < HEAD_SIZE) {
                if (PARTITION)
                    partial[static_cast<long long>(state) * HEAD_SIZE + row] = sums[i];
                else
                    out[(static_cast<long long>(sequence) * heads + head) * HEAD_SIZE + row] = narrowed(sums[i]);
            }
        }
}

/* grid (heads, sequences), THREADS threads: the partitions of version 2 into `out` */
extern "C" __global__ void __launch_bounds__(THREADS)
paged_attention_reduce(element *out, const float *partial, const float *highest_scores, const float *exponential_sums,
                       const int *lengths, int partitions)
{
    __shared__ float scratch[WARPS];
    const int head = blockIdx.x, heads = gridDim.x, sequence = blockIdx.y, thread = threadIdx.x;
    const int used = (lengths[sequence] + larger(PARTITION, 1) - 1) / larger(PARTITION, 1);
    const long long state = static_cast<long long>(sequence * heads + head) * partitions;
    float highest = -3.4e38f;
    for (int i = 0; i < used; ++i)
        highest = fmaxf(highest, highest_scores[state + i]);
    float sum = 0.f;
    for (int i = thread; i < used; i += THREADS)
        sum += exponential_sums[state + i] * __expf(highest_scores[state + i] - highest);
    sum = block_sum(scratch, sum);
    const float share = 1.f / (sum + 1e-6f);
    for (int row = thread; row < HEAD_SIZE; row += THREADS) {
        float value = 0.f;
        for (int i = 0; i < used; ++i)
            value += partial[(state + i) * HEAD_SIZE + row] * exponential_sums[state + i] *
                     __expf(highest_scores[state + i] - highest) * share;
        out[(static_cast<long long>(sequence) * heads + head) * HEAD_SIZE + row] = narrowed(value);
    }
}
"""

SOURCE = cuda_primitives.SOURCE + KERNEL
