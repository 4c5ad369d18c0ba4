"""CUDA C++ of decode's shrink and expand in one launch, for ranks up to 64. See `lora_decode_source`.

The blocks of a cluster send their sums of shrink to all others, and each expands its share of the outputs; y and B of a
warp's first outputs load while sums travel.
"""

from __future__ import annotations

KERNEL = r"""
static_assert(RANKS == RANK_WHOLE && RANK_PIECES == 1, "a block of the fused kernel takes the whole rank, up to 64");

/* the memory of all warps, and once their sums are sent the intermediate of all slices */
constexpr int H_BYTES = SLICES * CHUNK * H_PITCH * 4;
constexpr int SUMS_BYTES = WARPS * WARP_BYTES > H_BYTES ? WARPS * WARP_BYTES : (H_BYTES + 15) / 16 * 16;

/* grid (parts * segments), parts a cluster. Shared memory: SUMS_BYTES, then an inbox of QUADS quads for each slice and
   part, and 8 bytes. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
lora_linear(element *y, const element *x, const element *a0, const element *a1, const element *a2, const element *b0,
            const element *b1, const element *b2, const int *segments, const int *members, float scale, int hidden,
            int n0, int n1, int n2, int parts)
{
    extern __shared__ __align__(128) unsigned char memory[];
    Four *inbox = reinterpret_cast<Four *>(memory + SUMS_BYTES);
    const unsigned mailbox = shared_address(inbox + SLICES * parts * QUADS);
    if (threadIdx.x == 0)
        open_mailbox(mailbox);
    cluster_arrive();
    wait_for_previous();
    let_next_start();
    const int segment = blockIdx.x / parts, part = blockIdx.x % parts;
    const int warp = threadIdx.x / WARP;
    const Segment work = segment_of(segments, segment);
    int tokens[GROUPS], places[ROW_TILES][2];
    find_tokens(tokens, members, segment);
    find_places(places, members, segment);
    if (surplus(work, tokens, places[0]))
        return;
    if (threadIdx.x == 0)
        announce(mailbox, SLICES * parts * work.count * ROW_QUADS * 16);
    element *rows[ROW_TILES][2];
    find_rows(rows, y, places, work.count, n0 + n1 + n2);

    /* tiles of 32 outputs of all slices in one row, dealt out to the warps of all parts */
    const int tiles0 = (n0 + 31) / 32, tiles1 = (n1 + 31) / 32, tiles = tiles0 + tiles1 + (n2 + 31) / 32;
    auto number_of = [&](int tile) { return tile < tiles0 ? 0 : tile < tiles0 + tiles1 ? 1 : 2; };
    auto begin_tile = [&](Outputs &to, int tile) {
        const int number = number_of(tile);
        const Slice slice = slice_of(number, work.lora, b0, b1, b2, n0, n1, n2);
        to.first = (tile - (number > 0 ? tiles0 : 0) - (number > 1 ? tiles1 : 0)) * 32;
        load_b(to, slice, 0);
        load_y(to, slice, rows);
    };
    const int stride = parts * WARPS;
    int tile = part * WARPS + warp;
    Outputs now;
    for (int number = 0; number < SLICES; ++number) {
        const element *a = number == 0 ? a0 : number == 1 ? a1 : a2;
        shrink_share(memory, a + static_cast<long long>(work.lora) * RANK * hidden, RANK, x, tokens, work.count, hidden,
                     part, parts);
        __syncthreads();
        if (number == 0)
            cluster_wait();
        for (int quad = threadIdx.x; quad < work.count * ROW_QUADS; quad += THREADS) {
            const Four total = sum_of_warps(memory, quad);
            for (int other = 0; other < parts; ++other)
                send(shared_address(inbox + (number * parts + part) * QUADS + quad), mailbox, other, total.value);
        }
        __syncthreads();
    }
    if (tile < tiles)
        begin_tile(now, tile);
    wait_for_mail(mailbox, 0);

    /* once for the block: the sum of all parts, zero where there is no token */
    unsigned *words = reinterpret_cast<unsigned *>(memory);
    for (int i = threadIdx.x; i < SLICES * QUADS; i += THREADS) {
        const int number = i / QUADS, quad = i % QUADS;
        Four total = {};
        if (quad / ROW_QUADS < work.count) {
            const Four *from = inbox + number * parts * QUADS + quad;
            for (int other = 0; other < parts; ++other)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    total.value[e] += from[other * QUADS].value[e];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                total.value[e] *= scale;
        }
        keep(words + number * CHUNK * H_PITCH, quad / ROW_QUADS, quad % ROW_QUADS * 4, total.value);
    }
    __syncthreads();

    for (; tile < tiles; tile += stride) {
        Outputs next;
        const bool more = tile + stride < tiles;
        if (more)
            begin_tile(next, tile + stride);
        const int number = number_of(tile);
        finish(now, slice_of(number, work.lora, b0, b1, b2, n0, n1, n2), rows, words + number * CHUNK * H_PITCH);
        now = next;
    }
}
"""
