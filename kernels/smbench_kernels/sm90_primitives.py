"""CUDA C++ of what Hopper kernels share: PTX of sm_90a as functions, tiles as the copy engine and products see them.

Tiles lie in shared memory as the copy engine writes them with a swizzle of 128 bytes: chunks of 64 columns, in a chunk
row after row of 128 bytes, the 16-byte pieces of a row exchanged by its number modulo 8. A product reads such a tile in
two ways, told apart by the descriptor: along the columns (`by_columns`, both operands of q k^T) or along the rows
(`by_rows`, the second operand of P v). Instructions, descriptors and layouts: PTX ISA 9.0, "Asynchronous warpgroup
level matrix instructions", "cp.async.bulk.tensor", "mbarrier". Owns no kernel and no size of one.

Macro: BFLOAT16 (elements are bfloat16, else float16). Comes after `cuda_primitives.SOURCE`.
"""

from __future__ import annotations

SOURCE = r"""
typedef unsigned long long word64;
constexpr int GROUP_THREADS = 128, CHUNK = 64, ROW_BYTES = CHUNK * 2;

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

/* pairs as elements, settled: ready as the first operand of a product */
template <int N> __device__ inline void pack(unsigned (&to)[N / 2], const float (&from)[N])
{
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
        to[i] = packed(from[2 * i], from[2 * i + 1]);
    settle(to);
}
"""

ELEMENT = """
#if BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif
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
