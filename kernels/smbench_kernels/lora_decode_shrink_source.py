"""CUDA C++ of decode's shrink: a warp's share of the columns, and how sums come together. See `lora_decode_source`.

Rows of A are the 16 rows of a product, tokens its 8 columns. The columns are shared by the warps of `parts` blocks,
32 at a time: STEPS of them in registers, or each in one of STAGES buffers of a ring that asynchronous copies fill. A
lane reads back what it has copied itself, so that a ring needs no barrier.

A block adds up its warps in shared memory. The blocks of a cluster then send their sums to each other, so that each
owns a part of the results; without clusters the sums go through memory, and the last block to arrive adds them.
Always in the order of the parts: the same bits on every run.
"""

from __future__ import annotations

SHRINK = r"""
constexpr int RANKS = 16 * TILES;
constexpr int GROUPS = CHUNK / 8;
/* four more floats, so that the 32 values that a warp stores at once lie in 32 banks */
constexpr int PITCH = RANKS + 4;
constexpr int ROW_QUADS = RANKS / 4;
constexpr int QUADS = CHUNK * ROW_QUADS;
constexpr int STEP = 32;
/* what a lane loads of a step: 16 bytes of each row; a slot holds those of a warp */
constexpr int SLOTS = 2 * TILES + GROUPS;
constexpr int SLOT_BYTES = 16 * WARP;
/* a warp's memory: its ring, and once that has been read its sums [CHUNK][PITCH] */
constexpr int RING_BYTES = STAGES * SLOTS * SLOT_BYTES, SUM_BYTES = CHUNK * PITCH * 4;
constexpr int WARP_BYTES = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;

struct __align__(16) Words {
    unsigned word[4];
};

/* This warp's share of RANKS rows of A times CHUNK tokens, into its sums. `a` is the first of `rows` rows that exist,
   `tokens` this lane's token of each group of 8. */
__device__ inline void shrink_share(unsigned char *memory, const element *a, int rows, const element *x,
                                    const int (&tokens)[GROUPS], int count, int hidden, int part, int parts)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int row = lane / 4, quarter = lane % 4;
    const element *x_rows[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
        x_rows[j] = x + static_cast<long long>(tokens[j]) * hidden;
    const element *a_row = a + static_cast<long long>(row) * hidden;
    unsigned char *mine = memory + warp * WARP_BYTES;

    float products[TILES][GROUPS][4] = {};
    auto add_products = [&](const unsigned (&words)[SLOTS][4]) {
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j < GROUPS; ++j)
#pragma unroll
                for (int half = 0; half < 4; half += 2)
                    multiply_words(products[i][j], words[2 * i][half], words[2 * i + 1][half], words[2 * i][half + 1],
                                   words[2 * i + 1][half + 1], words[2 * TILES + j][half],
                                   words[2 * TILES + j][half + 1]);
    };
    /* steps of 32 columns: a part's lie side by side, its warps take turns */
    const int steps = (hidden + STEP - 1) / STEP;
    const int first = static_cast<int>(static_cast<long long>(part) * steps / parts);
    const int last = static_cast<int>((part + 1ll) * steps / parts);

#if STAGES
    const unsigned ring = shared_address(mine) + lane * 16;
    auto fetch = [&](int stage, int step) {
        if (step < last) {
            const int column = STEP * step + 8 * quarter;
            const unsigned to = ring + stage * SLOTS * SLOT_BYTES;
#pragma unroll
            for (int i = 0; i < 2 * TILES; ++i) {
                const bool real = 8 * i + row < rows && column < hidden;
                copy_16(to + i * SLOT_BYTES, real ? a_row + static_cast<long long>(8 * i) * hidden + column : a, real);
            }
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) {
                const bool real = 8 * j + row < count && column < hidden;
                copy_16(to + (2 * TILES + j) * SLOT_BYTES, real ? x_rows[j] + column : x, real);
            }
        }
        commit();
    };
    int ahead = first + warp;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage, ahead += WARPS)
        fetch(stage, ahead);
    int stage = 0;
    for (int step = first + warp; step < last; step += WARPS, ahead += WARPS) {
        /* a lane reads what it has copied itself */
        wait_but<STAGES - 2>();
        unsigned words[SLOTS][4];
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const Words found = *reinterpret_cast<const Words *>(mine + (stage * SLOTS + i) * SLOT_BYTES + lane * 16);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                words[i][e] = found.word[e];
        }
        fetch(stage == 0 ? STAGES - 1 : stage - 1, ahead);
        add_products(words);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __syncwarp();
#else
    for (int begin = first + warp * STEPS; begin < last; begin += WARPS * STEPS) {
        unsigned words[STEPS][SLOTS][4];
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int column = STEP * (begin + s) + 8 * quarter, left = begin + s < last ? hidden - column : 0;
#pragma unroll
            for (int i = 0; i < 2 * TILES; ++i)
                load_run<VECTOR>(words[s][i], a_row + static_cast<long long>(8 * i) * hidden + column,
                                 8 * i + row < rows ? left : 0);
#pragma unroll
            for (int j = 0; j < GROUPS; ++j)
                load_run<VECTOR>(words[s][2 * TILES + j], x_rows[j] + column, 8 * j + row < count ? left : 0);
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
            add_products(words[s]);
    }
#endif

    float *sums = reinterpret_cast<float *>(mine) + 2 * quarter * PITCH + row;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < GROUPS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sums[(8 * j + e % 2) * PITCH + 16 * i + e / 2 * 8] = products[i][j][e];
}

/* sum of all warps of this block, four ranks of one token */
__device__ inline Four sum_of_warps(const unsigned char *memory, int quad)
{
    const unsigned char *at = memory + (quad / ROW_QUADS * PITCH + quad % ROW_QUADS * 4) * 4;
    Four total = *reinterpret_cast<const Four *>(at);
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) {
        const Four more = *reinterpret_cast<const Four *>(at + warp * WARP_BYTES);
#pragma unroll
        for (int e = 0; e < 4; ++e)
            total.value[e] += more.value[e];
    }
    return total;
}

__device__ inline void find_tokens(int (&tokens)[GROUPS], const int *members, int segment)
{
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
        tokens[j] = load_recent(members + segment * CHUNK + 8 * j + threadIdx.x % WARP / 4);
}
"""

KERNEL = r"""
/* Which block of a cluster adds which quads: neighbouring ones go to the same block, as many as a warp sends at
   once, where there are as many for each, so that a warp's stores are one run in one block. */
struct Owners {
    int parts, run, turn, owned;
    __device__ explicit Owners(int parts) : parts(parts)
    {
        run = 1;
        while (run < WARP && 2 * run * parts <= QUADS)
            run *= 2;
        turn = run * parts;
        owned = (QUADS + turn - 1) / turn * run;
    }
    __device__ int owner(int quad) const { return quad / run % parts; }
    /* place among those of its owner, and the quad at one of its places */
    __device__ int place(int quad) const { return quad / turn * run + quad % run; }
    __device__ int quad(int part, int place) const { return place / run * turn + part * run + place % run; }
    /* of the first so many quads, those of one block */
    __device__ int of(int part, int quads) const
    {
        return quads / turn * run + min(run, max(0, quads % turn - part * run));
    }
};

/* to `out`, or added to it: four ranks of one token, the first of them `rank`; `before` is what `out` held */
__device__ inline void write_quad(float *out, const Four &total, const Four &before, float scale, int left)
{
    Four result;
#pragma unroll
    for (int e = 0; e < 4; ++e)
        result.value[e] = before.value[e] + scale * total.value[e];
#if QUADS_WHOLE
    if (left > 0)
        *reinterpret_cast<Four *>(out) = result;
#else
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (e < left)
            out[e] = result.value[e];
#endif
}

/* grid (parts * some number of segments, slices * rank_blocks): a block goes on to the segment so many further,
   which costs nothing where there are none left. WARPS * WARP_BYTES of shared memory, with clusters an inbox of parts
   times the quads that a block owns and a mailbox more. out [slices][tokens][rank]. Without clusters `partials` has
   QUADS * 4 floats for each part of each segment and y of the grid, and `counters`, zero between launches, one for
   all of its parts. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
lora_shrink(float *out, float *partials, int *counters, const element *x, const element *a0, const element *a1,
            const element *a2, const int *segments, const int *members, float scale, int tokens_all, int segments_all,
            int hidden, int rank, int rank_blocks, int parts, int accumulate)
{
    extern __shared__ __align__(128) unsigned char memory[];
#if CLUSTERS
    const Owners owners(parts);
    Four *inbox = reinterpret_cast<Four *>(memory + WARPS * WARP_BYTES);
    const unsigned mailbox = shared_address(inbox + parts * owners.owned);
    if (threadIdx.x == 0)
        open_mailbox(mailbox);
    cluster_arrive();
#else
    __shared__ int arrived;
    const Owners owners(1);
#endif
    wait_for_previous();
    let_next_start();
    const int part = blockIdx.x % parts, adds = CLUSTERS ? part : 0;
    const int slice = blockIdx.y / rank_blocks, first = blockIdx.y % rank_blocks * RANKS;
    const element *a = slice == 0 ? a0 : slice == 1 ? a1 : a2;

    int turn = 0;
#pragma unroll 1
    for (int segment = blockIdx.x / parts; segment < segments_all; segment += gridDim.x / parts, ++turn) {
        const Segment work = segment_of(segments, segment);
        /* asked for with this one, so that nobody waits at the end to learn that there is none */
        const int next = segment + gridDim.x / parts;
        const int following[1] = {next < segments_all ? load_recent(segments + 4 * next + 1) : 0};
        int tokens[GROUPS];
        find_tokens(tokens, members, segment);
        /* the results that this thread writes, if it is this block that writes; their tokens come with the segment */
        constexpr int OWNED = (QUADS + THREADS - 1) / THREADS;
        int row[OWNED];
#pragma unroll
        for (int i = 0; i < OWNED; ++i) {
            const int token = owners.quad(adds, i * THREADS + threadIdx.x) / ROW_QUADS;
            row[i] = load_recent(members + segment * CHUNK + (token < CHUNK ? token : 0));
        }
        /* those behind it are surplus too */
        if (surplus(work, tokens, row) || surplus(work, following, following))
            return;
        Four before[OWNED] = {};
        float *at[OWNED];
        int left[OWNED];
#pragma unroll
        for (int i = 0; i < OWNED; ++i) {
            const int quad = owners.quad(adds, i * THREADS + threadIdx.x);
            const int token = quad / ROW_QUADS, r = first + quad % ROW_QUADS * 4;
            left[i] = 0;
            at[i] = out;
            if (quad < QUADS && token < work.count && r < rank) {
                left[i] = rank - r;
                at[i] = out + (static_cast<long long>(slice) * tokens_all + row[i]) * rank + r;
                if (accumulate) {
#if QUADS_WHOLE
                    load_recent(before[i].value, at[i]);
#else
                    for (int e = 0; e < 4; ++e)
                        before[i].value[e] = e < left[i] ? load_past_l1(at[i] + e) : 0.f;
#endif
                }
            }
        }

        shrink_share(memory, a + (static_cast<long long>(work.lora) * rank + first) * hidden, rank - first, x, tokens,
                     work.count, hidden, part, parts);
        __syncthreads();
        const int quads = work.count * ROW_QUADS;

#if CLUSTERS
        const int owned = owners.owned;
        if (threadIdx.x == 0)
            announce(mailbox, owners.of(part, quads) * parts * 16);
        /* the other blocks have started and opened their mailboxes */
        if (turn == 0)
            cluster_wait();
        for (int quad = threadIdx.x; quad < quads; quad += THREADS)
            send(shared_address(inbox + part * owned + owners.place(quad)), mailbox, owners.owner(quad),
                 sum_of_warps(memory, quad).value);
        wait_for_mail(mailbox, turn % 2);
#pragma unroll
        for (int i = 0; i < OWNED; ++i) {
            if (left[i] > 0) {
                const Four *from = inbox + i * THREADS + threadIdx.x;
                Four total = from[0];
                for (int other = 1; other < parts; ++other)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        total.value[e] += from[other * owned].value[e];
                write_quad(at[i], total, before[i], scale, left[i]);
            }
        }
#else
        const int slot = blockIdx.y * segments_all + segment;
        float *results = partials + static_cast<long long>(slot) * parts * (QUADS * 4);
        bool last = true;
        if (parts > 1) {
            for (int quad = threadIdx.x; quad < quads; quad += THREADS)
                *reinterpret_cast<Four *>(results + (part * QUADS + quad) * 4) = sum_of_warps(memory, quad);
            /* every thread's sums must be out before one thread announces them */
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0)
                arrived = atomicAdd(counters + slot, 1);
            __syncthreads();
            last = arrived == parts - 1;
            __threadfence();
        }
#pragma unroll
        for (int i = 0; i < OWNED; ++i) {
            const int quad = i * THREADS + threadIdx.x;
            if (last && left[i] > 0) {
                Four total = {};
                if (parts == 1)
                    total = sum_of_warps(memory, quad);
                else
#pragma unroll 8
                    for (int other = 0; other < parts; ++other) {
                        float more[4];
                        load_recent(more, results + (other * QUADS + quad) * 4);
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            total.value[e] += more[e];
                    }
                write_quad(at[i], total, before[i], scale, left[i]);
            }
        }
        /* ready for the next launch */
        if (parts > 1 && last && threadIdx.x == 0)
            counters[slot] = 0;
#endif
        if (following[0] == 0)
            return;
#if CLUSTERS
        /* nobody sends sums of the next segment before all have added those of this one */
        cluster_meet();
#else
        __syncthreads();
#endif
    }
}
"""
