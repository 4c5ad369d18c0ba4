"""CUDA C++ of what our Hopper attention kernels share: PTX of sm_90a as functions, the mask, SiLU. Owns no kernel.

Tiles lie in shared memory as the copy engine writes them with a swizzle of 128 bytes: chunks of 64 columns, in a chunk
row after row of 128 bytes, the 16-byte pieces of a row exchanged by its number modulo 8. A product reads such a tile in
two ways, told apart by the descriptor: along the columns (`by_columns`, both operands of q k^T) or along the rows
(`by_rows`, the second operand of P v). Instructions, descriptors and layouts: PTX ISA 9.0, "Asynchronous warpgroup
level matrix instructions", "cp.async.bulk.tensor", "mbarrier".

Macro: BFLOAT16 (elements are bfloat16, else float16).
"""

from __future__ import annotations

from collections.abc import Sequence

from smbench_kernels import cuda_primitives, hstu_attention_sm90_schedule

BASE = r"""
typedef unsigned long long word64;
constexpr int GROUP_THREADS = 128, HEAD_DIM = 256, CHUNK = 64, CHUNKS = HEAD_DIM / CHUNK, ROW_BYTES = CHUNK * 2;

/* what the driver encodes; by value, as the copy engine wants it */
struct __align__(64) TensorMap {
    word64 words[16];
};

__device__ inline void make_barrier(unsigned barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* barriers made before are there for all threads, and for the copy engine, after */
__device__ inline void meet_all()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

__device__ inline void expect(unsigned barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void wait_for(unsigned barrier, unsigned parity)
{
    asm volatile("{\n\t.reg .pred done;\n"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* one arrival of this warp */
__device__ inline void release(unsigned barrier)
{
    __syncwarp();
    if (threadIdx.x % WARP == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

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

/* bytes as they lie; their barrier must already expect them */
template <int BYTES> __device__ inline void copy_bytes(unsigned to, const void *from, unsigned barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "n"(BYTES), "r"(barrier)
                 : "memory");
}

/* a place in a ring of buffers, and the parity of the barriers in this round */
template <int DEPTH> struct Place {
    int stage = 0;
    unsigned parity = 0;
    __device__ void step()
    {
        if (++stage == DEPTH) {
            stage = 0;
            parity ^= 1;
        }
    }
};

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

/* descriptors of tiles of ROWS rows: swizzle of 128 bytes, groups of 8 rows 1024 bytes apart */
constexpr word64 SWIZZLED = (1ull << 62) | (64ull << 32);
__device__ inline word64 by_columns(unsigned tile) { return SWIZZLED | (1ull << 16) | ((tile & 0x3ffff) >> 4); }
template <int ROWS> __device__ inline word64 by_rows(unsigned tile)
{
    return SWIZZLED | (static_cast<word64>(ROWS * ROW_BYTES / 16) << 16) | ((tile & 0x3ffff) >> 4);
}
/* the k-th 16 columns, and the k-th 16 rows, of such a tile */
template <int ROWS> __device__ inline word64 columns_at(int k)
{
    return static_cast<word64>(k / 4 * (ROWS * ROW_BYTES / 16) + k % 4 * 2);
}
__device__ inline word64 rows_at(int k) { return static_cast<word64>(k * (16 * ROW_BYTES / 16)); }

__device__ inline void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void products_but()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* the compiler may neither read nor move these before this line */
template <int N> __device__ inline void settle(float (&values)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+f"(values[i])::"memory");
}
template <int N> __device__ inline void settle(unsigned (&values)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+r"(values[i])::"memory");
}

template <int COUNT> __device__ inline void more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int THREADS> __device__ inline void meet(int barrier)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ inline void announce(int barrier)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

__device__ inline void load_four(unsigned &a, unsigned &b, unsigned &c, unsigned &d, unsigned from)
{
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(from)
                 : "memory");
}

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

/* pairs as elements, settled: ready as the first operand of a product */
template <int N> __device__ inline void pack(unsigned (&to)[N / 2], const float (&from)[N])
{
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
        to[i] = packed(from[2 * i], from[2 * i + 1]);
    settle(to);
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


def product(name: str, columns: int, first_in_registers: bool, add: bool) -> str:
    """A function for tiles of 64 rows and `columns` columns, 16 deep: sums = a b, or sums += a b.

    In registers: a's fragment is four registers and b is read along its rows (`by_rows`); else both along columns.
    What is not added to is an output only: what was in those registers before need not be kept.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"{"+f" if add else "=f"}"(sums[{i}])' for i in range(count))
    if first_in_registers:
        first, operands = f"{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}", 4
        parameters, inputs, transposed = "const unsigned *a", ", ".join(f'"r"(a[{i}])' for i in range(4)), "1"
    else:
        first, operands = f"%{count}", 1
        parameters, inputs, transposed = "word64 a", '"l"(a)', "0, 0"
    return f"""
__device__ inline void {name}(float (&sums)[{count}], {parameters}, word64 b)
{{
    asm volatile("{{\\n\\t.reg .pred add;\\n\\tsetp.ne.b32 add, {int(add)}, 0;\\n\\t"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32." ELEMENT "." ELEMENT " {{{sums}}}, "
                 "{first}, %{count + operands}, add, 1, 1, {transposed};\\n\\t}}"
                 : {outputs}
                 : {inputs}, "l"(b));
}}
"""


ELEMENT = """
#if BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif
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
    return cuda_primitives.SOURCE + hstu_attention_sm90_schedule.SOURCE + BASE + ELEMENT + "".join(parts)
