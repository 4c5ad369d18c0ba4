"""CUDA C++ of how thread blocks of the paged Hopper kernel add up what they share of a strip. Owns no kernel.

Each writes its float32 sums as they lie in registers and counts itself in. The first of a few adds the others' to its
own; of many, each adds up and stores its part of the columns at its end. In the order of the keys either way: the same
bits every time. Who needs a counter last sets it back, so that the next launch finds zeros. All thread blocks of a
launch have to be resident at the same time, at least in the end: there is one a multiprocessor.
"""

from __future__ import annotations

SOURCE = r"""
/* barriers of a block's two groups that multiply; sums of a thread by four; how many of those one adds up at a time */
constexpr int STORING = 1, CLEARING = 2, PARTS = HEAD_DIM / 8, AT_ONCE = 8;

__device__ inline int load_acquired(const int *from)
{
    int found;
    asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(found) : "l"(from) : "memory");
    return found;
}

/* where a thread block keeps the sums of its first piece, if that is not the first of its strip, and of its last piece,
   if that is */
__device__ inline long long place_of(int block, int number)
{
    return (2ll * block + (number == 0)) * PARTS * (2 * GROUP_THREADS);
}

/* to the sums of the first piece of a strip those of the others */
__device__ inline void gather(float (&sums)[HEAD_DIM / 2], const Piece &piece, const Shares &shares, const Four *kept,
                              int *counter)
{
    const int thread = threadIdx.x - GROUP_THREADS;
    if (thread == 0) {
        while (load_acquired(counter) < piece.count - 1) {
        }
        *counter = 0;
    }
    meet<2 * GROUP_THREADS>(STORING);
#pragma unroll 1
    for (int part = 1; part < piece.count; ++part) {
        const Four *from = kept + place_of(piece.block_of(shares, part), part) + thread;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            const Four four = load_four(from + p * (2 * GROUP_THREADS));
            sums[4 * p] += four.x;
            sums[4 * p + 1] += four.y;
            sums[4 * p + 2] += four.z;
            sums[4 * p + 3] += four.w;
        }
    }
}

/* this thread block's part of the columns of a strip that several share */
__device__ inline void add_up(const Piece &piece, const Shares &shares, const Four *kept, int *counter, element *out,
                              long long out_row, int length, float scale)
{
    const int thread = threadIdx.x - GROUP_THREADS, lane = thread % WARP, warp = thread / WARP;
    if (thread == 0)
        while (load_acquired(counter) < piece.count) {
        }
    meet<2 * GROUP_THREADS>(STORING);
    const int begin = PARTS * piece.number / piece.count, end = PARTS * (piece.number + 1) / piece.count;
    const int row = piece.row + warp * 16 + lane / 4;
#pragma unroll 1
    for (int p = begin; p < end; p += AT_ONCE) {
        Four total[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            total[j] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 2
        for (int part = 0; part < piece.count; ++part) {
            const Four *from =
                kept + place_of(piece.block_of(shares, part), part) + p * (2 * GROUP_THREADS) + thread;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (p + j < end) {
                    const Four four = load_four(from + j * (2 * GROUP_THREADS));
                    total[j].x += four.x;
                    total[j].y += four.y;
                    total[j].z += four.z;
                    total[j].w += four.w;
                }
        }
        element *to = out + row * out_row + p * 8 + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (p + j < end) {
                if (row < length)
                    *reinterpret_cast<unsigned *>(to + j * 8) = packed(total[j].x * scale, total[j].y * scale);
                if (row + 8 < length)
                    *reinterpret_cast<unsigned *>(to + j * 8 + 8 * out_row) =
                        packed(total[j].z * scale, total[j].w * scale);
            }
    }
    meet<2 * GROUP_THREADS>(STORING);
    /* all have come and now all leave: the last one makes it 0 again */
    if (thread == 0 && atomicAdd(counter, 1) == 2 * piece.count - 1)
        *counter = 0;
}
"""
