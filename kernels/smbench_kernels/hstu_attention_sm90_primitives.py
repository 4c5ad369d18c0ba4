"""CUDA C++ of what our Hopper attention kernels share beyond `sm90_primitives`: tiles of whole heads, the mask, SiLU.

Owns no kernel. Macro: BFLOAT16 (elements are bfloat16, else float16).
"""

from __future__ import annotations

from collections.abc import Sequence

from smbench_kernels import cuda_primitives, hstu_attention_sm90_schedule, sm90_primitives
from smbench_kernels.sm90_primitives import product

BASE = r"""
constexpr int HEAD_DIM = 256, CHUNKS = HEAD_DIM / CHUNK;

/* a tile of ROWS rows, chunk by chunk; its barrier must already expect the bytes */
template <int ROWS>
__device__ inline void copy_tile(unsigned to, const TensorMap &map, int head, int row, unsigned barrier)
{
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to + c * ROWS * ROW_BYTES),
                     "l"(&map), "r"(c * CHUNK), "r"(head), "r"(row), "r"(barrier)
                     : "memory");
}

/* a ring of tiles that one thread fills and `warps` warps empty */
template <int ROWS, int DEPTH> struct Ring {
    static constexpr int BYTES = ROWS * HEAD_DIM * 2;
    unsigned tiles, full, empty;
    __device__ Ring(unsigned tiles, unsigned barriers) : tiles(tiles), full(barriers), empty(barriers + DEPTH * 8) {}
    __device__ void make(int warps) const
    {
        for (int s = 0; s < DEPTH; ++s) {
            make_barrier(full + s * 8, 1);
            make_barrier(empty + s * 8, warps);
        }
    }
    __device__ unsigned tile(const Place<DEPTH> &at) const { return tiles + at.stage * BYTES; }
    __device__ void wait(const Place<DEPTH> &at) const { wait_for(full + at.stage * 8, at.parity); }
    __device__ void free(const Place<DEPTH> &at) const { release(empty + at.stage * 8); }
    /* `more_bytes` are awaited from elsewhere */
    __device__ void fill(const Place<DEPTH> &at, const TensorMap &map, int head, int row, int more_bytes = 0) const
    {
        wait_for(empty + at.stage * 8, at.parity ^ 1);
        expect(full + at.stage * 8, BYTES + more_bytes);
        copy_tile<ROWS>(tile(at), map, head, row, full + at.stage * 8);
    }
};

/* half of an argument at which `silu` gives 0 twice, exactly */
constexpr float HIDDEN = -1.0e4f;

/* s is a score, half_alpha half of the factor: silu(x), x = alpha s, and its derivative at x */
__device__ inline void silu(float s, float half_alpha, float &value, float &slope)
{
    const float half = s * half_alpha;
#if BFLOAT16
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
    const float sigma = fmaf(0.5f, t, 0.5f);
    value = fmaf(half, t, half);
#else
    float sigma;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigma) : "f"(1.f + power_of_2(half * -2.8853900817779268f)));
    value = 2.f * half * sigma;
#endif
    slope = fmaf(-value, sigma, value) + sigma;
}

/* two floats as two float16, whatever the elements are: slopes are near 0 to 1 */
__device__ inline unsigned packed_half(float low, float high)
{
    unsigned found;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
    return found;
}
__device__ inline void unpacked_half(unsigned both, float &low, float &high)
{
    asm("{\n\t.reg .f16 a, b;\n\tmov.b32 {a, b}, %2;\n\tcvt.f32.f16 %0, a;\n\tcvt.f32.f16 %1, b;\n\t}"
        : "=f"(low), "=f"(high)
        : "r"(both));
}

/* 64 rows of sums of a group of four warps to rows [row, rows_end) of `out`, each scaled, through 32 KiB of shared
   memory that only this group still uses; a warp reads only what it wrote, row after row, 16 bytes a lane */
__device__ inline void store_rows(element *out, long long row_stride, int row, int rows_end,
                                  const float (&sums)[HEAD_DIM / 2], float scale, unsigned staging)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
#pragma unroll
    for (int b = 0; b < HEAD_DIM / 8; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = warp * 16 + half * 8 + lane / 4;
            const unsigned to = staging + r * (HEAD_DIM * 2) + ((b ^ (r & 7)) * 16) + lane % 4 * 4;
            const unsigned two = packed(sums[4 * b + 2 * half] * scale, sums[4 * b + 2 * half + 1] * scale);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(two) : "memory");
        }
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
        const int r = warp * 16 + i;
        unsigned four[4];
        load_four(four[0], four[1], four[2], four[3], staging + r * (HEAD_DIM * 2) + ((lane ^ (r & 7)) * 16));
        if (row + r < rows_end)
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(out + (row + r) * row_stride + lane * 8),
                         "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3])
                         : "memory");
    }
}
"""

PRODUCTS = r"""
/* a of 64 rows by b of N, both along the columns: sums = a b^T */
template <int A_ROWS, int N> __device__ inline void scores(float (&sums)[N / 2], unsigned a, unsigned b)
{
    const word64 left = by_columns(a), right = by_columns(b);
    multiply(sums, left, right);
#pragma unroll
    for (int k = 1; k < HEAD_DIM / 16; ++k)
        multiply_add(sums, left + columns_at<A_ROWS>(k), right + columns_at<N>(k));
}

/* a of 64 rows and N columns in registers, b of N rows: sums += a b */
template <int N>
__device__ inline void weighted(float (&sums)[HEAD_DIM / 2], const unsigned (&a)[N / 4], unsigned b)
{
    const word64 right = by_rows<N>(b);
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
        multiply_add(sums, a + 4 * k, right + rows_at(k));
}
"""


def source(tile: int) -> str:
    """The shared part for streamed tiles of `tile` rows (a multiple of 16)."""
    parts: Sequence[str] = (
        product("multiply", tile, first_in_registers=False, add=False),
        product("multiply_add", tile, first_in_registers=False, add=True),
        product("multiply_add", 256, first_in_registers=True, add=True),
        PRODUCTS,
    )
    before = (cuda_primitives.SOURCE, hstu_attention_sm90_schedule.SOURCE, sm90_primitives.SOURCE, BASE)
    return "".join((*before, sm90_primitives.ELEMENT, *parts))
