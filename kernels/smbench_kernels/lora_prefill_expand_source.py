"""CUDA C++ of the prefill expand for Hopper: y += x . B^T. Owns the code, not its launch.

**Work.** A run is a tile of TOKENS tokens by some neighbouring outputs of one slice. Neighbouring runs go to
neighbouring thread blocks, so that at any time all of them read and write one part of y, as a copy would: device memory
likes that. Four warps stream y and B, ABREAST times 64 outputs at a time, through a ring of STAGES buffers by tensor
map; the others multiply, add to y where it lies, and store it from there, each warp its own 16 rows, by the copy engine
where these are neighbours, so that loads, products and stores overlap. x of a run lies in shared memory as elements;
that of the next waits in registers, as far as these go.

y is read and written once, B read once for each tile of tokens from the L2. The sum is float32, y rounded once.

Macros: those of `lora_prefill_source`, INNER (the rank, rounded up to 16, 32 or a multiple of 64), SLICES, STAGES,
PER_SM, DEPENDENT (x comes from the kernel in front, and nothing else that is read).
"""

from __future__ import annotations

KERNEL = r"""
constexpr int B_COLUMNS = INNER < 64 ? INNER : 64, B_PARTS = INNER / B_COLUMNS;
constexpr int B_CHUNK_BYTES = CHUNK_COLUMNS * B_COLUMNS * 2, B_PART_BYTES = ABREAST * B_CHUNK_BYTES;
constexpr int STAGE_BYTES = COPIED_BYTES + B_PARTS * B_PART_BYTES, X_BYTES = (INNER + 63) / 64 * TILE_BYTES;
constexpr int CONSUMERS = 128 * GROUPS, PIECES = INNER / 8, ALL_PIECES = 64 * PIECES;
/* as far as registers go, x is loaded a run ahead, else a part at a time */
constexpr bool AHEAD = INNER <= 128;
constexpr int EACH_PIECES = (AHEAD ? ALL_PIECES : 512) / 128;

struct Maps {
    RowMaps y[SLICES];
    TensorMap b[SLICES];
};

/* how the outputs of a tile are cut: where the runs of the second and third slice begin, how many runs there are, units
   (ABREAST times 64 outputs) of a run, outputs of each slice */
struct Cut {
    int second, third, runs, run, width_0, width_1, width_2;
    __device__ int width(int slice) const { return slice == 0 ? width_0 : slice == 1 ? width_1 : width_2; }
    __device__ int begin(int slice) const { return slice == 0 ? 0 : slice == 1 ? width_0 : width_0 + width_1; }
};

/* one run: tile, slice, units */
struct Run {
    int i, slice, begin, end;
    __device__ Run(const Cut &cut, int number) : i(number / cut.runs)
    {
        const int within = number - i * cut.runs;
        slice = (within >= cut.second) + (within >= cut.third);
        begin = (within - (slice == 0 ? 0 : slice == 1 ? cut.second : cut.third)) * cut.run;
        end = min(begin + cut.run, (cut.width(slice) + COPIED_COLUMNS - 1) / COPIED_COLUMNS);
    }
};

/* B's tile: rows of 32, 64 or 128 bytes, with a swizzle as wide */
__device__ inline word64 b_tile(unsigned tile)
{
    constexpr word64 WIDTH = B_COLUMNS == 64 ? 1 : B_COLUMNS == 32 ? 2 : 3, GROUP = 8 * B_COLUMNS * 2 / 16;
    return (WIDTH << 62) | (GROUP << 32) | (1ull << 16) | ((tile & 0x3ffff) >> 4);
}

/* a thread's share of 64 rows of x: pieces of 8, as elements; columns beyond the rank are 0 */
struct X {
    float4 low[EACH_PIECES], high[EACH_PIECES];

    __device__ void load(const float *x, const Work &work, int i, const Tile &tile, int first_row, int first, int rank)
    {
#pragma unroll
        for (int e = 0; e < EACH_PIECES; ++e) {
            const int item = first + threadIdx.x % 128 + e * 128, row = first_row + item / PIECES;
            const int column = item % PIECES * 8;
            low[e] = high[e] = {};
            if (row < tile.count && column < rank) {
                const float *from = x + static_cast<long long>(work.token(i, tile, row)) * rank + column;
                low[e] = load_four_past_l1(from);
                high[e] = load_four_past_l1(from + 4);
            }
        }
    }
    __device__ void put(unsigned to, int first_row, int first) const
    {
#pragma unroll
        for (int e = 0; e < EACH_PIECES; ++e) {
            const int item = first + threadIdx.x % 128 + e * 128, row = first_row + item / PIECES;
            const int piece = item % PIECES;
            const unsigned at = to + piece / 8 * TILE_BYTES + row * LINE + ((piece % 8 ^ (row & 7)) * 16);
            store_four(at, packed(low[e].x, low[e].y), packed(low[e].z, low[e].w), packed(high[e].x, high[e].y),
                       packed(high[e].z, high[e].w));
        }
        show_writes();
    }
};

/* grid (blocks), 128 * GROUPS threads that multiply and four warps that copy */
extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)
lora_prefill_expand(const __grid_constant__ Maps maps, const float *x, element *y_out, const int *first,
                    const int *second, const int *third, int count, int tiles, int rank, int tokens, int second_runs,
                    int third_runs, int runs_of_tile, int run_units, int width_0, int width_1, int width_2)
{
    extern __shared__ unsigned char memory[];
    const unsigned x_tile = (shared_address(memory) + 1023) & ~1023u, ring = x_tile + X_BYTES;
    const unsigned full = ring + STAGES * STAGE_BYTES, empty = full + STAGES * 8;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES; ++s) {
            make_barrier(full + s * 8, COPY_WARPS);
            make_barrier(empty + s * 8, CONSUMER_WARPS);
        }
    meet_all();
    if (warp == CONSUMER_WARPS && lane < 5 * SLICES)
        fetch_map(&maps.y[0].tile + lane);

    const Work work = {first, second, third, tiles};
    const Cut cut = {second_runs, third_runs, runs_of_tile, run_units, width_0, width_1, width_2};
    const int runs = count * runs_of_tile;
    Place<STAGES> at;
    if (threadIdx.x == 0)
        work.fetch(blockIdx.x / runs_of_tile);
#if !DEPENDENT
    /* nothing before this line depends on the kernel in front */
    await_last();
#endif
    if (warp >= CONSUMER_WARPS) {
        const int part = warp - CONSUMER_WARPS;
        const bool copies_b = part == COPY_WARPS - 1;
#pragma unroll 1
        for (int number = blockIdx.x; number < runs; number += gridDim.x) {
            const Run run(cut, number);
            const Tile tile = work.at(run.i);
            if (tile.count <= 0)
                continue;
            const Rows rows(work, run.i, tile, part);
#pragma unroll 1
            for (int unit = run.begin; unit < run.end; ++unit) {
                const int column = unit * COPIED_COLUMNS;
                const unsigned y = ring + at.stage * STAGE_BYTES, barrier = full + at.stage * 8;
                wait_for(empty + at.stage * 8, at.parity ^ 1);
                if (lane == 0)
                    expect(barrier, rows.bytes() + (copies_b ? B_PARTS * B_PART_BYTES : 0));
                __syncwarp();
                rows.copy(y, maps.y[run.slice], column, part, barrier);
                if (copies_b && lane < B_PARTS)
                    copy_box(y + COPIED_BYTES + lane * B_PART_BYTES, maps.b + run.slice, lane * B_COLUMNS, column,
                             tile.lora, barrier, KEEP);
                __syncwarp();
                at.step();
            }
        }
        return;
    }

#if DEPENDENT
    await_last();
#endif
    let_next_start();
    const int group = warp / 4, my_row = warp * 16 + lane / 4, group_row = group * 64;
    const long long slice_stride = static_cast<long long>(tokens) * rank, y_stride = width_0 + width_1 + width_2;
    unsigned last = 0;
    X mine;
    if (AHEAD && blockIdx.x < runs) {
        const Run run(cut, blockIdx.x);
        mine.load(x + run.slice * slice_stride, work, run.i, work.at(run.i), group_row, 0, rank);
    }
#pragma unroll 1
    for (int number = blockIdx.x; number < runs; number += gridDim.x) {
        const Run run(cut, number);
        const Tile tile = work.at(run.i);
        /* all four warps are done with the x of before, then all have written the new one */
        meet<128>(1 + group);
        if constexpr (AHEAD) {
            mine.put(x_tile, group_row, 0);
        } else {
#pragma unroll 1
            for (int piece = 0; piece < ALL_PIECES; piece += EACH_PIECES * 128) {
                mine.load(x + run.slice * slice_stride, work, run.i, tile, group_row, piece, rank);
                mine.put(x_tile, group_row, piece);
            }
        }
        meet<128>(1 + group);
        if (AHEAD && number + gridDim.x < runs) {
            const Run next(cut, number + gridDim.x);
            mine.load(x + next.slice * slice_stride, work, next.i, work.at(next.i), group_row, 0, rank);
        }
        if (tile.count <= 0)
            continue;
        /* the 16 rows that this warp stores, one for each of its first lanes */
        const int row = warp * 16 + lane;
        const int token = lane < BOX && row < tile.count ? work.token(run.i, tile, row) : -1;
        const int box = __shfl_sync(~0u, token, 0);
        const bool boxed = (__ballot_sync(~0u, token >= 0 && token == box + lane) & 0xffffu) == 0xffffu;
#pragma unroll 1
        for (int unit = run.begin; unit < run.end; ++unit) {
            const unsigned y = ring + at.stage * STAGE_BYTES, b = y + COPIED_BYTES;
            wait_for(full + at.stage * 8, at.parity);
#pragma unroll
            for (int c = 0; c < ABREAST; ++c) {
                float sums[CHUNK_COLUMNS / 2];
                start_products();
#pragma unroll
                for (int k = 0; k < INNER / 16; ++k) {
                    const word64 left = by_columns(x_tile + k / 4 * TILE_BYTES + group_row * LINE) + k % 4 * 2;
                    const unsigned part = b + k * 16 / B_COLUMNS * B_PART_BYTES + c * B_CHUNK_BYTES;
                    const word64 right = b_tile(part) + k % (B_COLUMNS / 16) * 2;
                    if (k == 0)
                        multiply(sums, left, right);
                    else
                        multiply_add(sums, left, right);
                }
                commit_products();
                const unsigned place = y + c * TILE_BYTES + my_row * LINE + lane / 4 * 16 + lane % 4 * 4;
                unsigned old[CHUNK_COLUMNS / 4];
#pragma unroll
                for (int e = 0; e < CHUNK_COLUMNS / 4; ++e)
                    old[e] = load_word((place ^ e / 2 * 16) + e % 2 * 8 * LINE);
                products_but<0>();
                settle(sums);
#pragma unroll
                for (int e = 0; e < CHUNK_COLUMNS / 4; ++e) {
                    float low, high;
                    unpacked(old[e], low, high);
                    store_word((place ^ e / 2 * 16) + e % 2 * 8 * LINE,
                               packed(low + sums[2 * e], high + sums[2 * e + 1]));
                }
            }
            show_writes();
            __syncwarp();
            if (boxed) {
                if (lane < ABREAST)
                    store_box(&maps.y[run.slice].box, unit * COPIED_COLUMNS + lane * CHUNK_COLUMNS, box,
                              y + lane * TILE_BYTES + warp * BOX * LINE);
            } else {
                /* four rows at a time, 16 bytes a lane */
#pragma unroll
                for (int part = 0; part < ABREAST * BOX / 4; ++part) {
                    const int c = part / 4, in_box = part % 4 * 4 + lane / 8, piece = lane % 8;
                    const int to = __shfl_sync(~0u, token, in_box);
                    const int column = unit * COPIED_COLUMNS + c * CHUNK_COLUMNS + piece * 8;
                    const unsigned from = y + c * TILE_BYTES + (warp * BOX + in_box) * LINE;
                    if (to >= 0 && column < cut.width(run.slice))
                        store_global(y_out + to * y_stride + cut.begin(run.slice) + column,
                                     from + ((piece ^ (in_box & 7)) * 16));
                }
                __syncwarp();
            }
            commit_stores();
            /* the buffer before is free when its stores have read it */
            stores_read_but<1>();
            if (last)
                release(last);
            last = empty + at.stage * 8;
            at.step();
        }
    }
    stores_done();
}
"""
