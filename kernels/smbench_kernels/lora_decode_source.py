"""CUDA C++ of the decode kernels: what they share, and the whole of each. Owns no product of its own.

A segment of the plan is at most CHUNK tokens of one LoRA. Its products run on the tensor cores whatever the number of
tokens, since loads decide the time: a lane loads 16 bytes of a row at a time and multiplies them where they are. The
order of the terms of a sum is free, so eight neighbouring elements of a lane count as two pairs of two products; no
operand changes lanes.

Shrink, expand, or both in one launch; or expand is a launch of its own that starts while shrink runs, and waits for
it once its first loads are on their way.

Macros: BFLOAT16, CHUNK (a multiple of 8 up to 64), WARPS. Of shrink: TILES (times 16 rows of A that a warp takes),
STAGES, STEPS, VECTOR (elements that every row of A and x is a multiple of: 8, 4, 2 or 1; a ring needs 8), CLUSTERS
(whether parts are a cluster, in which each piece of sums signals its arrival), QUADS_WHOLE (the rank is a multiple of
4). Of expand: RANK, BLOCKS (times 32 outputs that a warp takes, one after the other), B_VECTOR and Y_VECTOR as VECTOR
for rows of B and for the outputs of all slices, AHEAD (it loads before it waits). Of both: SLICES.
"""

from __future__ import annotations

from smbench_kernels import (
    lora_decode_expand_source,
    lora_decode_fused_source,
    lora_decode_shrink_source,
    lora_primitives,
)

COMMON = r"""
/* Kernels say __launch_bounds__(THREADS, 1): registers are there to hold loads. Without the 1 the compiler saves them
   and puts products between the loads. */
constexpr int THREADS = WARP * WARPS;

struct Segment {
    int count, lora;
};

/* Whether a segment has no tokens. Asks the tokens too, which are never below -1: else the compiler would load them
   only once the count is there. */
template <int N, int M>
__device__ inline bool surplus(const Segment &segment, const int (&some)[N], const int (&more)[M])
{
    bool found = segment.count == 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        found |= some[i] < -1;
#pragma unroll
    for (int i = 0; i < M; ++i)
        found |= more[i] < -1;
    return found;
}

__device__ inline Segment segment_of(const int *segments, int number)
{
    int found[4];
    load_recent(found, segments + 4 * number);
    return {found[1], found[2]};
}

/* 2 * WORDS neighbouring elements of a row, those from `left` on zero; `left` is a multiple of STEP */
template <int STEP, bool RECENT = false, int WORDS>
__device__ inline void load_run(unsigned (&to)[WORDS], const element *at, int left)
{
    if constexpr (STEP >= 2) {
        constexpr int EACH = STEP / 2 < WORDS ? STEP / 2 : WORDS;
        static_assert(WORDS % EACH == 0, "a run is whole vectors");
#pragma unroll
        for (int i = 0; i < WORDS; i += EACH) {
            unsigned several[EACH];
            if constexpr (RECENT)
                load_recent_words(several, at + 2 * i, 2 * i < left);
            else
                load_words(several, at + 2 * i, 2 * i < left);
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                to[i + j] = several[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * WORDS; ++i) {
            unsigned one;
            if constexpr (RECENT)
                one = load_recent_element(at + i, i < left);
            else
                one = load_element(at + i, i < left);
            to[i / 2] = i % 2 ? to[i / 2] | one << 16 : one;
        }
    }
}

__device__ inline void multiply_words(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                      unsigned b1)
{
    const unsigned a[4] = {a0, a1, a2, a3};
    multiply(sums, a, b0, b1);
}

struct __align__(16) Four {
    float value[4];
};
"""

_SHRINK = lora_primitives.SOURCE + COMMON + lora_decode_shrink_source.SHRINK
SHRINK_SOURCE = _SHRINK + lora_decode_shrink_source.KERNEL
EXPAND_SOURCE = lora_primitives.SOURCE + COMMON + lora_decode_expand_source.EXPAND + lora_decode_expand_source.KERNEL
FUSED_SOURCE = _SHRINK + lora_decode_expand_source.EXPAND + lora_decode_fused_source.KERNEL
