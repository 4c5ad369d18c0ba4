"""CUDA C++ that our Hopper prefill kernels share: tiles of tokens, copies by tensor map, thread block clusters.

Owns no kernel. A tile is up to TOKENS tokens of one LoRA; in shared memory it is chunks of 64 columns, in a chunk row
after row of 128 bytes with the copy engine's swizzle, as `sm90_primitives` describes. Rows come as one
box where all TOKENS tokens are neighbours, in boxes of 16 or 4 where these are, else row by row: the same kernel serves
sequences and a work list of scattered tokens. Four warps copy, since asking for a box takes a warp some 60 ns.
Instructions: PTX ISA 9.0, "cp.async.bulk.tensor", "mbarrier", "griddepcontrol", "Cluster".

Macros: TOKENS (64 or 128), ABREAST (of 64 columns that are copied together), PLANNED (tiles come from a work list,
else from sequences), BFLOAT16.
"""

from __future__ import annotations

from smbench_kernels import cuda_primitives, sm90_primitives

PRIMITIVES = r"""
/* bulk copies that say what becomes of their lines in the L2: kept, or the first to go */
constexpr word64 KEEP = 0x14f0000000000000ull, DROP = 0x12f0000000000000ull;

__device__ inline void copy_box(unsigned to, const TensorMap *map, int column, int row, unsigned barrier, word64 policy)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}

__device__ inline void copy_box(unsigned to, const TensorMap *map, int column, int row, int matrix, unsigned barrier,
                                word64 policy)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "l"(policy)
                 : "memory");
}

__device__ inline void store_box(const TensorMap *map, int column, int row, unsigned from)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(column), "r"(row), "r"(from)
                 : "memory");
}

__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* all stores of this thread but those of its last N groups have read their source */
template <int N> __device__ inline void stores_read_but()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ inline void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* what this thread wrote to shared memory is there for the copy engine and the tensor cores, after the next barrier */
__device__ inline void show_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void fetch_map(const TensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void fetch_to_l2(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory"); }

__device__ inline unsigned load_word(unsigned from)
{
    unsigned found;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(found) : "r"(from) : "memory");
    return found;
}

__device__ inline void store_word(unsigned to, unsigned word)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

__device__ inline void store_four(unsigned to, unsigned a, unsigned b, unsigned c, unsigned d)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ inline void store_two(unsigned to, float a, float b)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

/* 16 bytes from shared to global memory */
__device__ inline void store_global(element *to, unsigned from)
{
    asm volatile("{\n\t.reg .b32 a, b, c, d;\n\tld.shared.v4.b32 {a, b, c, d}, [%1];\n\t"
                 "st.global.v4.b32 [%0], {a, b, c, d};\n\t}" ::"l"(to),
                 "r"(from)
                 : "memory");
}

/* two elements as floats, the lower half first */
__device__ inline void unpacked(unsigned both, float &low, float &high)
{
    low = widened(static_cast<element>(both));
    high = widened(static_cast<element>(both >> 16));
}

/* past the L1: another kernel may have written it while this one already ran */
__device__ inline int load_past_l1(const int *from)
{
    int found;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(found) : "l"(from) : "memory");
    return found;
}

__device__ inline float4 load_four_past_l1(const float *from)
{
    float4 found;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
                 : "l"(from)
                 : "memory");
    return found;
}

/* thread block clusters */
__device__ inline int place_in_cluster()
{
    unsigned found;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(found));
    return static_cast<int>(found);
}
__device__ inline void announce_to_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void await_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/* the same place in the shared memory of another block of the cluster */
__device__ inline unsigned in_block(unsigned address, int block)
{
    unsigned found;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(block));
    return found;
}
__device__ inline void arrive_in_cluster(unsigned barrier)
{
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void wait_for_cluster(unsigned barrier, unsigned parity)
{
    asm volatile("{\n\t.reg .pred done;\n"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
__device__ inline float4 load_in_cluster(unsigned from)
{
    float4 found;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
                 : "r"(from)
                 : "memory");
    return found;
}

/* programmatic launches: the next kernel may start; all that the last one wrote is there */
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void await_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
"""

TILES = r"""
constexpr int GROUPS = TOKENS / 64, CONSUMER_WARPS = 4 * GROUPS, COPY_WARPS = 4, BOX = 16, FEW = 4;
constexpr int LINE = 128, CHUNK_COLUMNS = 64, THREADS = (CONSUMER_WARPS + COPY_WARPS) * WARP;
constexpr int TILE_BYTES = TOKENS * LINE, COPIED_COLUMNS = ABREAST * CHUNK_COLUMNS, COPIED_BYTES = ABREAST * TILE_BYTES;

/* the copy engine's views of a matrix: boxes of 64 columns of TOKENS rows, of 16, of 4 and of one */
struct RowMaps {
    TensorMap tile, box, few, row;
};

/* up to TOKENS tokens of one LoRA; `start` is the first where they are neighbours, else -1 */
struct Tile {
    int count, lora, start;
};

/* With PLANNED: the plan's segments [capacity, 4] (place, count, LoRA, start), of which the last may have no token, and
   its members [capacity, TOKENS]. Else: LoRA, length and first token of each sequence, `tiles` for each. */
struct Work {
    const int *first, *second, *third;
    int tiles;
    __device__ Tile at(int i) const
    {
#if PLANNED
        const int *segment = first + 4 * i;
        return {load_past_l1(segment + 1), load_past_l1(segment + 2), load_past_l1(segment + 3)};
#else
        const int sequence = i / tiles, offset = (i - sequence * tiles) * TOKENS;
        const int lora = load_past_l1(first + sequence), left = load_past_l1(second + sequence) - offset;
        return {lora < 0 ? 0 : min(max(left, 0), TOKENS), lora, load_past_l1(third + sequence) + offset};
#endif
    }
    /* what `at` will read comes to the L2; unlike reading, that may be done at any time */
    __device__ void fetch(int i) const
    {
#if PLANNED
        fetch_to_l2(first + 4 * i);
        fetch_to_l2(second + static_cast<long long>(i) * TOKENS);
#else
        fetch_to_l2(first + i / tiles);
        fetch_to_l2(second + i / tiles);
        fetch_to_l2(third + i / tiles);
#endif
    }
    __device__ int token(int i, const Tile &tile, int row) const
    {
#if PLANNED
        return tile.start >= 0 ? tile.start + row : load_past_l1(second + static_cast<long long>(i) * TOKENS + row);
#else
        return tile.start + row;
#endif
    }
};

/* How one of the warps that copy does its part of a tile: 32 rows, a lane each. Where all are neighbours, the first
   does everything. */
struct Rows {
    int token, rows;
    bool whole, boxed, few;

    __device__ Rows(const Work &work, int i, const Tile &tile, int part)
        : token(-1), whole(tile.count == TOKENS && tile.start >= 0)
    {
        const int lane = threadIdx.x % WARP, row = part * WARP + lane;
        if (row < tile.count)
            token = work.token(i, tile, row);
        boxed = neighbours<BOX>(lane);
        few = neighbours<FEW>(lane);
        rows = __popc(__ballot_sync(~0u, token >= 0));
        if (whole)
            rows = part == 0 ? TOKENS : 0;
    }
    /* whether this lane's row is one of N in a row, counted from a multiple of N */
    template <int N> __device__ bool neighbours(int lane) const
    {
        const int first = __shfl_sync(~0u, token, lane / N * N);
        const unsigned runs = __ballot_sync(~0u, token >= 0 && token == first + lane % N);
        return (runs >> (lane / N * N) & ((1u << N) - 1)) == (1u << N) - 1;
    }
    __device__ int bytes() const { return ABREAST * rows * LINE; }

    /* ABREAST times 64 columns of this warp's rows, each to its place; the barrier must already expect the bytes */
    __device__ void copy(unsigned to, const RowMaps &maps, int column, int part, unsigned barrier) const
    {
        const int lane = threadIdx.x % WARP;
        if (whole) {
            const int first = __shfl_sync(~0u, token, 0);
            if (part == 0 && lane < ABREAST)
                copy_box(to + lane * TILE_BYTES, &maps.tile, column + lane * CHUNK_COLUMNS, first, barrier, DROP);
            return;
        }
        const TensorMap *map = boxed ? &maps.box : few ? &maps.few : &maps.row;
        if (token >= 0 && lane % (boxed ? BOX : few ? FEW : 1) == 0)
#pragma unroll
            for (int c = 0; c < ABREAST; ++c)
                copy_box(to + c * TILE_BYTES + (part * WARP + lane) * LINE, map, column + c * CHUNK_COLUMNS, token,
                         barrier, DROP);
    }
};
"""


def source(products: str, kernel: str) -> str:
    """A whole source: primitives, `products` that `sm90_primitives.product` made, tiles, a kernel."""
    return (
        cuda_primitives.SOURCE
        + sm90_primitives.SOURCE
        + sm90_primitives.ELEMENT
        + PRIMITIVES
        + products
        + TILES
        + kernel
    )
