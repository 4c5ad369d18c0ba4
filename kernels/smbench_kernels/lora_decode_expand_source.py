"""CUDA C++ of decode's expand: a tile of 32 outputs of up to CHUNK tokens, its launch. See `lora_decode_source`.

Tokens are the 16 rows of a product, outputs its 8 columns, dealt out so that a lane has eight neighbouring outputs: y
moves 16 bytes at a time. y and B of the next 32 outputs are under way while a warp works on the current ones. The
rank-r intermediate is rounded to the weights' type, as in the serving engines, and shared by a block's warps.
"""

from __future__ import annotations

EXPAND = r"""
constexpr int RANK_WHOLE = (RANK + 15) / 16 * 16;
/* ranks whose products a warp takes at a time, and how many of them are one lane's */
constexpr int PIECE = RANK_WHOLE < 64 ? RANK_WHOLE : 64;
constexpr int RANK_PIECES = (RANK_WHOLE + PIECE - 1) / PIECE;
constexpr int MINE = PIECE / 4;
constexpr int ROW_TILES = (CHUNK + 15) / 16;
/* words of a row of the intermediate in shared memory; rows of 64 are spread over the banks */
constexpr int H_WIDTH = RANK_PIECES * PIECE;
constexpr int H_PITCH = H_WIDTH / 2 + (MINE >= 16 ? 4 : 0);

struct __align__(8) Pair {
    unsigned word[2];
};

struct Slice {
    const element *b;
    int outputs, offset;
};

/* a tile of 32 outputs: B, and y of up to CHUNK tokens */
struct Outputs {
    int first;
    unsigned b[4][MINE / 2], y[ROW_TILES][2][4];
};

__device__ inline void load_b(Outputs &to, const Slice &slice, int piece)
{
    const int lane = threadIdx.x % WARP, row = lane / 4, quarter = lane % 4;
    const int rank = piece * PIECE + quarter * MINE;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        /* column `row` of product j is the output of which lane row / 2 gets the results */
        const int output = to.first + row / 2 * 8 + 2 * j + row % 2;
        load_run<B_VECTOR>(to.b[j], slice.b + static_cast<long long>(output) * RANK + rank,
                           output < slice.outputs ? RANK - rank : 0);
    }
}

/* outputs from this lane's first one of a tile on */
__device__ inline int left_of(const Slice &slice, const Outputs &tile)
{
    return slice.outputs - tile.first - static_cast<int>(threadIdx.x) % 4 * 8;
}

/* `rows` are y's rows of this lane's tokens, moved to its first output; null where there is no token */
__device__ inline void load_y(Outputs &to, const Slice &slice, element *const (&rows)[ROW_TILES][2])
{
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            load_run<Y_VECTOR, true>(to.y[i][half], rows[i][half] + slice.offset + to.first,
                                     rows[i][half] ? left_of(slice, to) : 0);
}

/* 2 * WORDS elements of y; `left` is a multiple of STEP */
template <int STEP> __device__ inline void store_run(element *at, const unsigned (&words)[4], int left)
{
    if constexpr (STEP == 8) {
        if (left > 0) {
            uint4 all = {words[0], words[1], words[2], words[3]};
            *reinterpret_cast<uint4 *>(at) = all;
        }
    } else if constexpr (STEP == 4) {
#pragma unroll
        for (int i = 0; i < 4; i += 2)
            if (2 * i < left) {
                uint2 two = {words[i], words[i + 1]};
                *reinterpret_cast<uint2 *>(at + 2 * i) = two;
            }
    } else if constexpr (STEP == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * i < left)
                *reinterpret_cast<unsigned *>(at + 2 * i) = words[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < left)
                at[i] = static_cast<element>(words[i / 2] >> (16 * (i % 2)));
    }
}

/* Four floats of the intermediate of a token to shared memory as elements. */
__device__ inline void keep(unsigned *words, int place, int rank, const float (&value)[4])
{
    unsigned *to = words + place * H_PITCH + rank / 2;
    to[0] = packed(value[0], value[1]);
    to[1] = packed(value[2], value[3]);
}

/* Adds the products to y and writes it. `words` is the intermediate [CHUNK][H_PITCH], zero where there is no token. */
__device__ inline void finish(Outputs &tile, const Slice &slice, element *const (&rows)[ROW_TILES][2],
                              const unsigned *words)
{
    const int row = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    float products[ROW_TILES][4][4] = {};
#pragma unroll
    for (int piece = 0; piece < RANK_PIECES; ++piece) {
        if (piece > 0)
            load_b(tile, slice, piece);
        const unsigned *mine = words + row * H_PITCH + (piece * PIECE + quarter * MINE) / 2;
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            Pair low[MINE / 4], high[MINE / 4];
#pragma unroll
            for (int k = 0; k < MINE / 4; ++k) {
                low[k] = *reinterpret_cast<const Pair *>(mine + 16 * i * H_PITCH + 2 * k);
                /* a chunk of 8 ends in the middle of a tile */
                high[k] = {};
                if (16 * i + 8 < CHUNK)
                    high[k] = *reinterpret_cast<const Pair *>(mine + (16 * i + 8) * H_PITCH + 2 * k);
            }
#pragma unroll
            for (int k = 0; k < MINE / 4; ++k)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    multiply_words(products[i][j], low[k].word[0], high[k].word[0], low[k].word[1], high[k].word[1],
                                   tile.b[j][2 * k], tile.b[j][2 * k + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned results[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned old = tile.y[i][half][j];
                results[j] = packed(widened(static_cast<element>(old)) + products[i][j][2 * half],
                                  widened(static_cast<element>(old >> 16)) + products[i][j][2 * half + 1]);
            }
            store_run<Y_VECTOR>(rows[i][half] + slice.offset + tile.first, results,
                                rows[i][half] ? left_of(slice, tile) : 0);
        }
}

/* this lane's tokens of a tile of 16, whether they exist or not */
__device__ inline void find_places(int (&tokens)[ROW_TILES][2], const int *members, int segment)
{
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const int place = 8 * i + threadIdx.x % WARP / 4;
        tokens[i / 2][i % 2] = load_recent(members + segment * CHUNK + (place < CHUNK ? place : 0));
    }
}

/* the rows of y of these tokens, moved to the eight outputs that are the lane's; null for those that do not exist */
__device__ inline void find_rows(element *(&rows)[ROW_TILES][2], element *y, const int (&tokens)[ROW_TILES][2],
                                 int count, int width)
{
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i)
        rows[i / 2][i % 2] = 8 * i + static_cast<int>(threadIdx.x) % WARP / 4 < count
                                 ? y + static_cast<long long>(tokens[i / 2][i % 2]) * width + threadIdx.x % 4 * 8
                                 : nullptr;
}

__device__ inline Slice slice_of(int number, int lora, const element *b0, const element *b1, const element *b2, int n0,
                                 int n1, int n2)
{
    const element *b = number == 0 ? b0 : number == 1 ? b1 : b2;
    const int outputs = number == 0 ? n0 : number == 1 ? n1 : n2;
    return {b + static_cast<long long>(lora) * outputs * RANK, outputs, number == 0 ? 0 : number == 1 ? n0 : n0 + n1};
}
"""

KERNEL = r"""
constexpr int TILE_OUTPUTS = 32 * WARPS * BLOCKS;
constexpr int H_ROW = H_WIDTH / 4;
constexpr int H_QUADS = CHUNK * H_ROW;
/* quads of the intermediate that a thread brings into shared memory, and for how many it knows the token early */
constexpr int H_MINE = (H_QUADS + THREADS - 1) / THREADS;
constexpr int H_KNOWN = H_MINE < 8 ? H_MINE : 8;

/* grid (blocks of TILE_OUTPUTS outputs, slice after slice, for each segment: surplus ones come last); CHUNK * H_PITCH
   words of shared memory. h [slices][tokens][RANK] */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
lora_expand(element *y, const float *h, const element *b0, const element *b1, const element *b2, const int *segments,
            const int *members, int tokens_all, int n0, int n1, int n2)
{
    extern __shared__ __align__(128) unsigned char memory[];
    unsigned *words = reinterpret_cast<unsigned *>(memory);
#if !AHEAD
    wait_for_previous();
    let_next_start();
#endif
    const int blocks0 = (n0 + TILE_OUTPUTS - 1) / TILE_OUTPUTS, blocks1 = (n1 + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const int blocks = blocks0 + blocks1 + (n2 + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const int segment = blockIdx.x / blocks, place = blockIdx.x % blocks;
    const int number = place < blocks0 ? 0 : place < blocks0 + blocks1 ? 1 : 2;
    const int block = place - (number > 0 ? blocks0 : 0) - (number > 1 ? blocks1 : 0);
    const Segment work = segment_of(segments, segment);
    int tokens[ROW_TILES][2];
    find_places(tokens, members, segment);
    int known[H_KNOWN];
#pragma unroll
    for (int i = 0; i < H_KNOWN; ++i) {
        const int owner = (i * THREADS + static_cast<int>(threadIdx.x)) / H_ROW;
        known[i] = load_recent(members + segment * CHUNK + (owner < CHUNK ? owner : 0));
    }
    const bool none = surplus(work, tokens[ROW_TILES - 1], known);
    element *rows[ROW_TILES][2];
    find_rows(rows, y, tokens, work.count, n0 + n1 + n2);
    const Slice slice = slice_of(number, work.lora, b0, b1, b2, n0, n1, n2);

    Outputs now;
    now.first = (block * BLOCKS * WARPS + static_cast<int>(threadIdx.x) / WARP) * 32;
    const bool idle = none || now.first >= slice.outputs;
    if (!idle) {
        load_b(now, slice, 0);
        load_y(now, slice, rows);
    }
#if AHEAD
    /* all threads, so that this kernel never ends before the one in front of it */
    wait_for_previous();
    let_next_start();
#endif
    if (none)
        return;
    const float *h_slice = h + static_cast<long long>(number) * tokens_all * RANK;
    auto bring = [&](int quad, int token) {
        const int rank = quad % H_ROW * 4;
        float value[4] = {};
        if (quad / H_ROW < work.count) {
            const float *from = h_slice + static_cast<long long>(token) * RANK + rank;
            if (RANK % 4 == 0) {
                if (rank < RANK)
                    load_recent(value, from);
            } else {
                for (int e = 0; e < 4; ++e)
                    value[e] = rank + e < RANK ? load_past_l1(from + e) : 0.f;
            }
        }
        if (quad < H_QUADS)
            keep(words, quad / H_ROW, rank, value);
    };
#pragma unroll
    for (int i = 0; i < H_KNOWN; ++i)
        bring(i * THREADS + threadIdx.x, known[i]);
    for (int quad = H_KNOWN * THREADS + threadIdx.x; quad < H_QUADS; quad += THREADS)
        bring(quad, load_recent(members + segment * CHUNK + quad / H_ROW));
    __syncthreads();
    if (idle)
        return;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        Outputs next;
        next.first = now.first + WARPS * 32;
        const bool more = i + 1 < BLOCKS && next.first < slice.outputs;
        if (more) {
            load_b(next, slice, 0);
            load_y(next, slice, rows);
        }
        finish(now, slice, rows, words);
        if (!more)
            break;
        now = next;
    }
}
"""
