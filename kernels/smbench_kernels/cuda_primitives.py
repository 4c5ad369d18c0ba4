"""CUDA C++ of what tensor-core kernels of our own share: PTX instructions as functions. Owns no kernel.

Macro: BFLOAT16 (elements are bfloat16, else float16). Needs compute capability 8.0; no header.
"""

from __future__ import annotations

SOURCE = r"""
typedef unsigned short element;
constexpr int WARP = 32;

__device__ inline unsigned shared_address(const void *pointer)
{
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline void copy_16(unsigned to, const void *from, bool real)
{
    const int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void copy_4(unsigned to, const void *from, bool real)
{
    const int bytes = real ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N> __device__ inline void wait_but()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    __syncwarp();
}

__device__ inline int load_shared(unsigned from)
{
    int found;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(found) : "r"(from) : "memory");
    return found;
}

/* past the L1, which may hold an older launch's values */
__device__ inline float load_past_l1(const float *from)
{
    float found;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(found) : "l"(from) : "memory");
    return found;
}

__device__ inline void load_past_l1(float &first, float &second, const float *from)
{
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(first), "=f"(second) : "l"(from) : "memory");
}

__device__ inline void load_matrices(unsigned (&to)[4], unsigned from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ inline void load_transposed(unsigned (&to)[4], unsigned from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ inline unsigned transposed(unsigned matrix)
{
    unsigned found;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(matrix));
    return found;
}

__device__ inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
#if BFLOAT16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* two floats as two elements, the first in the lower half */
__device__ inline unsigned packed(float low, float high)
{
    unsigned found;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
#endif
    return found;
}

__device__ inline element narrowed(float value) { return static_cast<element>(packed(value, 0.f)); }

__device__ inline float power_of_2(float exponent)
{
    float found;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(exponent));
    return found;
}

__device__ inline float widened(element value)
{
#if BFLOAT16
    return __uint_as_float(static_cast<unsigned>(value) << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#endif
}

/* N elements that one instruction moves */
template <int N> struct __align__(N * sizeof(element)) Vector {
    element value[N];
};

template <int N> __device__ inline Vector<N> loaded(const element *at);
template <> __device__ inline Vector<1> loaded<1>(const element *at)
{
    Vector<1> found;
    asm volatile("ld.global.b16 %0, [%1];" : "=h"(found.value[0]) : "l"(at));
    return found;
}
template <> __device__ inline Vector<2> loaded<2>(const element *at)
{
    Vector<2> found;
    unsigned bits;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(bits) : "l"(at));
    found.value[0] = static_cast<element>(bits);
    found.value[1] = static_cast<element>(bits >> 16);
    return found;
}
template <> __device__ inline Vector<4> loaded<4>(const element *at)
{
    Vector<4> found;
    unsigned bits[2];
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(bits[0]), "=r"(bits[1]) : "l"(at));
#pragma unroll
    for (int i = 0; i < 4; ++i)
        found.value[i] = static_cast<element>(bits[i / 2] >> (16 * (i % 2)));
    return found;
}
template <> __device__ inline Vector<8> loaded<8>(const element *at)
{
    Vector<8> found;
    unsigned bits[4];
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                 : "l"(at));
#pragma unroll
    for (int i = 0; i < 8; ++i)
        found.value[i] = static_cast<element>(bits[i / 2] >> (16 * (i % 2)));
    return found;
}
"""
