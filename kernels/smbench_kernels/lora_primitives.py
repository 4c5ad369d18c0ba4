"""CUDA C++ of what the LoRA kernels need beside `cuda_primitives`: wide loads, clusters, dependent launches. No kernel.

Loads take whether they are real, so that a row that is not there costs no branch; what is not real is zero. Thread
block clusters and programmatic dependent launch need compute capability 9.0 and are nothing below it.
"""

from __future__ import annotations

from smbench_kernels import cuda_primitives

OWN = r"""
/* Elements as words of two, from memory that nobody writes meanwhile. Few blocks read them: not kept in the L1. */
__device__ inline void load_words(unsigned (&to)[4], const element *at, bool real)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
                 "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
                 "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
                 : "l"(at), "r"(static_cast<int>(real)));
}

__device__ inline void load_words(unsigned (&to)[2], const element *at, bool real)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\t"
                 "@p ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];\n\t}"
                 : "=&r"(to[0]), "=&r"(to[1])
                 : "l"(at), "r"(static_cast<int>(real)));
}

__device__ inline void load_words(unsigned (&to)[1], const element *at, bool real)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b32 %0, 0;\n\t@p ld.global.nc.b32 %0, [%1];\n\t}"
                 : "=&r"(to[0])
                 : "l"(at), "r"(static_cast<int>(real)));
}

__device__ inline unsigned load_element(const element *at, bool real)
{
    element found;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b16 %0, 0;\n\t@p ld.global.nc.b16 %0, [%1];\n\t}"
                 : "=&h"(found)
                 : "l"(at), "r"(static_cast<int>(real)));
    return found;
}

/* The same from memory that this kernel writes, or one that may still run when this one starts: past the L1. */
__device__ inline void load_recent_words(unsigned (&to)[4], const element *at, bool real)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
                 "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
                 "@p ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
                 : "l"(at), "r"(static_cast<int>(real))
                 : "memory");
}

__device__ inline void load_recent_words(unsigned (&to)[2], const element *at, bool real)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\t"
                 "@p ld.global.cg.v2.b32 {%0, %1}, [%2];\n\t}"
                 : "=&r"(to[0]), "=&r"(to[1])
                 : "l"(at), "r"(static_cast<int>(real))
                 : "memory");
}

__device__ inline void load_recent_words(unsigned (&to)[1], const element *at, bool real)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b32 %0, 0;\n\t@p ld.global.cg.b32 %0, [%1];\n\t}"
                 : "=&r"(to[0])
                 : "l"(at), "r"(static_cast<int>(real))
                 : "memory");
}

__device__ inline unsigned load_recent_element(const element *at, bool real)
{
    element found;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b16 %0, 0;\n\t@p ld.global.cg.b16 %0, [%1];\n\t}"
                 : "=&h"(found)
                 : "l"(at), "r"(static_cast<int>(real))
                 : "memory");
    return found;
}

__device__ inline void load_recent(float (&to)[4], const float *at)
{
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "l"(at)
                 : "memory");
}

__device__ inline void load_recent(int (&to)[4], const int *at)
{
    asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(at)
                 : "memory");
}

__device__ inline int load_recent(const int *at)
{
    int found;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(found) : "l"(at) : "memory");
    return found;
}

/* All blocks of the cluster have started, and what their threads wrote before is seen by those that wait. */
__device__ inline void cluster_arrive()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ inline void cluster_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

/* every thread of the cluster, with all that it has read and written before */
__device__ inline void cluster_meet()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

/* A mailbox is 8 bytes of shared memory: it is full when the announced bytes have come, and then open for the next.
   One thread opens it, before cluster_arrive, and one announces the bytes of each turn. */
__device__ inline void open_mailbox(unsigned mailbox)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(mailbox) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void announce(unsigned mailbox, int bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mailbox), "r"(bytes) : "memory");
#endif
}

/* four floats into the shared memory of a block of the cluster, at the addresses that they have in this one */
__device__ inline void send(unsigned to, unsigned mailbox, int block, const float (&value)[4])
{
#if __CUDA_ARCH__ >= 900
    unsigned there, box;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(block));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(box) : "r"(mailbox), "r"(block));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :
                 : "r"(there), "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3]), "r"(box)
                 : "memory");
#endif
}

/* until it is full for the first, third, … time (`turn` 0) or the second, fourth, … (1) */
__device__ inline void wait_for_mail(unsigned mailbox, int turn)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred p;\nAGAIN:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n\t"
                 "@p bra.uni DONE;\n\tbra.uni AGAIN;\nDONE:\n\t}" ::"r"(mailbox),
                 "r"(turn)
                 : "memory");
#endif
}

/* until the kernel before this one has ended and what it wrote can be read; at once in an ordinary launch */
__device__ inline void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* lets a dependent kernel start as soon as all blocks of this one have come here or ended */
__device__ inline void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
"""

SOURCE = cuda_primitives.SOURCE + OWN
"""Both."""
