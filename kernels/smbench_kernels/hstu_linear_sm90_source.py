"""CUDA C++ of the HSTU layer's linear maps for Hopper: x @ weight with bias, SiLU, residual. Owns no launch.

**Work.** A thread block keeps the sums of ROWS x COLUMNS of the output, GROUPS groups of four warps with 64 rows each,
and takes tile after tile. One warp copies 64 columns of x and 64 rows of the weight at a time into a ring of STAGES
buffers. The weight is [in, out] as the layer stores it, so that the product reads it along its rows, x along columns.

**Epilogue.** Through shared memory in the copy engine's swizzle, 64 columns of 16 rows a warp, and stored from there by
it while the warp goes on. A residual is fetched there while the products run.

**Before the kernel in front has ended** (programmatic dependent launch) weights fill the ring: only x and the residual
depend on it. Nothing is written before either.

Macros: GROUPS (1 to 3), COLUMNS (64, 128, 192, 256), STAGES, SLOTS (64 columns each that wait to be stored), BIAS,
SILU, RESIDUAL, BFLOAT16.
"""

from __future__ import annotations

from smbench_kernels import cuda_primitives, lora_prefill_source, sm90_primitives

PRIMITIVES = r"""
/* four matrices of 8 x 8 as the fragments of sums are; lane i has the address of row i % 8 of matrix i / 8 */
__device__ inline void store_matrices(unsigned to, const unsigned (&from)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

__device__ inline unsigned load_pair(const element *from)
{
    unsigned found;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(found) : "l"(from));
    return found;
}
"""

TANGENT = r"""
/* the hardware's tanh is right to 2^-11 of itself (PTX ISA, "tanh"), less than bfloat16 rounds off */
__device__ inline float hyperbolic_tangent(float x)
{
    float found;
    asm("tanh.approx.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}
"""

SILU = r"""
/* x times the logistic function of x, which is (1 + tanh(x / 2)) / 2 */
__device__ inline float silu(float x)
{
    const float half = 0.5f * x;
    return fmaf(half, hyperbolic_tangent(half), half);
}
"""

KERNEL = r"""
constexpr int ROWS = 64 * GROUPS, WARPS = 4 * GROUPS, CHUNKS = COLUMNS / CHUNK, THREADS = (WARPS + 1) * WARP;
constexpr int X_BYTES = ROWS * ROW_BYTES, STAGE_BYTES = X_BYTES + 64 * COLUMNS * 2;
constexpr int STORED_ROWS = 16, SLOT_BYTES = ROWS * ROW_BYTES;
/* of the copy engine's lines in the L2: kept as any others */
constexpr word64 NORMAL = 0x1000000000000000ull;

struct Maps {
    TensorMap x, weight, out, residual;
};

/* the rows of one column of tiles one after the other */
struct Tile {
    int row, column;
    __device__ Tile(int number, int row_tiles)
        : row(number % row_tiles * ROWS), column(number / row_tiles * COLUMNS)
    {
    }
};

struct Copier {
    const Maps &maps;
    unsigned ring, full;

    __device__ void copy_weight(int stage, int k, const Tile &tile) const
    {
        copy_box(ring + stage * STAGE_BYTES + X_BYTES, &maps.weight, 0, k * 64, tile.column / CHUNK, full + stage * 8,
                 NORMAL);
    }
    __device__ void copy_x(int stage, int k, const Tile &tile) const
    {
        copy_box(ring + stage * STAGE_BYTES, &maps.x, k * CHUNK, tile.row, full + stage * 8, NORMAL);
    }
};

/* a warp's 16 rows of 64 columns of sums, from the c-th 64 on, to their place in shared memory */
template <bool ACTIVE>
__device__ inline void put(unsigned place, const float *sums, const unsigned bias)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const unsigned at = place ^ (j * 16);
        unsigned words[4];
#if RESIDUAL
        load_matrices(words, at);
#endif
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            /* upper and lower eight rows of eight columns, then of the next eight */
            const float *pair = sums + (j + i / 2) * 4 + i % 2 * 2;
            float low = pair[0], high = pair[1];
            float more_low, more_high;
#if BIAS
            unpacked(__shfl_sync(~0u, bias, (j + i / 2) * 4 + lane % 4), more_low, more_high);
            low += more_low;
            high += more_high;
#endif
#if RESIDUAL
            unpacked(words[i], more_low, more_high);
            low += more_low;
            high += more_high;
#endif
            words[i] = ACTIVE ? packed(silu(low), silu(high)) : packed(low, high);
        }
        store_matrices(at, words);
    }
}

/* grid: at most one block a multiprocessor; `first`: columns from here on get SiLU, a multiple of 64 */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
hstu_linear(const __grid_constant__ Maps maps, const element *bias, int row_tiles, int tiles, int k_steps, int columns,
            int first)
{
    extern __shared__ unsigned char memory[];
    const unsigned ring = (shared_address(memory) + 1023) & ~1023u, slots = ring + STAGES * STAGE_BYTES;
    const unsigned full = slots + SLOTS * SLOT_BYTES, empty = full + STAGES * 8;
    const unsigned fetched = empty + STAGES * 8, stored = fetched + 8;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            make_barrier(full + s * 8, 1);
            make_barrier(empty + s * 8, WARPS);
        }
        make_barrier(fetched, 1);
        make_barrier(stored, WARPS);
    }
    if (threadIdx.x == WARPS * WARP) {
        fetch_map(&maps.weight);
        fetch_map(&maps.x);
        fetch_map(&maps.out);
    }
    meet_all();
    const int begin = blockIdx.x, step = gridDim.x;

    if (warp == WARPS) {
        if (lane == 0) {
            const Copier copier = {maps, ring, full};
            Place<STAGES> at;
            const int ahead = min(STAGES, k_steps);
            {
                const Tile tile(begin, row_tiles);
                for (int k = 0; k < ahead; ++k) {
                    expect(full + k * 8, STAGE_BYTES);
                    copier.copy_weight(k, k, tile);
                }
                /* nothing before this line depends on the kernel in front */
                await_last();
                let_next_start();
                for (int k = 0; k < ahead; ++k) {
                    copier.copy_x(k, k, tile);
                    at.step();
                }
            }
            unsigned parity = 1;
#pragma unroll 1
            for (int number = begin; number < tiles; number += step) {
                const Tile tile(number, row_tiles);
#if RESIDUAL
                wait_for(stored, parity);
                expect(fetched, CHUNKS * SLOT_BYTES);
                copy_box(slots, &maps.residual, 0, tile.row, tile.column / CHUNK, fetched, NORMAL);
                parity ^= 1;
#endif
#pragma unroll 1
                for (int k = number == begin ? ahead : 0; k < k_steps; ++k) {
                    wait_for(empty + at.stage * 8, at.parity ^ 1);
                    expect(full + at.stage * 8, STAGE_BYTES);
                    copier.copy_weight(at.stage, k, tile);
                    copier.copy_x(at.stage, k, tile);
                    at.step();
                }
            }
        }
        __syncwarp();
    } else {
        const int group = warp / 4;
        /* where this lane reads and writes a matrix of 8 x 8: its row, the swizzled piece of 16 bytes */
        const unsigned my_rows = slots + warp * STORED_ROWS * ROW_BYTES;
        const unsigned place = my_rows + lane % 16 * ROW_BYTES + ((lane / 16) ^ (lane % 8)) * 16;
        float sums[COLUMNS / 2];
        unsigned pairs[CHUNKS] = {};
        Place<STAGES> at;
        unsigned parity = 0;
        /* a next kernel that starts may take for done what came before the one in front */
        await_last();
        let_next_start();
#pragma unroll 1
        for (int number = begin; number < tiles; number += step) {
            const Tile tile(number, row_tiles);
#if BIAS
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
                if (tile.column + c * CHUNK < columns)
                    pairs[c] = load_pair(bias + tile.column + c * CHUNK + lane * 2);
#endif
            int before = 0;
#pragma unroll 1
            for (int k = 0; k < k_steps; ++k) {
                wait_for(full + at.stage * 8, at.parity);
                const unsigned stage = ring + at.stage * STAGE_BYTES;
                const word64 left = by_columns(stage + group * 64 * ROW_BYTES);
                settle(sums);
                start_products();
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    multiply(sums, left + i * 2, by_rows<64>(stage + X_BYTES) + rows_at(i), k + i > 0);
                }
                commit_products();
                if (k > 0) {
                    products_but<1>();
                    release(empty + before * 8);
                }
                before = at.stage;
                at.step();
            }
            products_but<0>();
            settle(sums);
            release(empty + before * 8);
#if RESIDUAL
            wait_for(fetched, parity);
            parity ^= 1;
#endif
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const int column = tile.column + c * CHUNK;
                if (!RESIDUAL) {
                    /* what was stored from here SLOTS times 64 columns ago has been read */
                    stores_read_but<SLOTS - 1>();
                    __syncwarp();
                }
                const unsigned slot = c % SLOTS * SLOT_BYTES;
                if (SILU && column >= first)
                    put<true>(place + slot, sums + c * 32, pairs[c]);
                else
                    put<false>(place + slot, sums + c * 32, pairs[c]);
                show_writes();
                __syncwarp();
                if (lane == 0) {
                    store_box(&maps.out, column, tile.row + warp * STORED_ROWS, my_rows + slot);
                    commit_stores();
                }
            }
#if RESIDUAL
            stores_read_but<0>();
            release(stored);
#endif
        }
        stores_done();
    }
}
"""


def multiply(columns: int) -> str:
    """A function for 64 rows by `columns` columns, 16 deep: sums = a b, or sums += a b where `add`.

    Both from shared memory, a along its columns, b along its rows (`sm90_primitives`).
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""
__device__ inline void multiply(float (&sums)[{count}], word64 a, word64 b, int add)
{{
    asm volatile("{{\\n\\t.reg .pred add;\\n\\tsetp.ne.b32 add, %{count + 2}, 0;\\n\\t"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32." ELEMENT "." ELEMENT " {{{sums}}}, "
                 "%{count}, %{count + 1}, add, 1, 1, 0, 1;\\n\\t}}"
                 : {outputs}
                 : "l"(a), "l"(b), "r"(add));
}}
"""


def source(columns: int) -> str:
    """The whole CUDA C++ for tiles of so many columns."""
    shared = cuda_primitives.SOURCE + sm90_primitives.SOURCE + sm90_primitives.ELEMENT + lora_prefill_source.PRIMITIVES
    return shared + TANGENT + PRIMITIVES + multiply(columns) + SILU + KERNEL
