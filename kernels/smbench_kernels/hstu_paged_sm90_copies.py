"""CUDA C++ of what the paged Hopper kernel copies: tiles of pages and of own rows, new history to pages. No kernel.

Page numbers are loaded 32 at a time, one batch ahead. Follows `hstu_paged_sm90_schedule`; macros as the kernel's.
"""

from __future__ import annotations

SOURCE = r"""
struct __align__(16) Four {
    float x, y, z, w;
};

__device__ inline Four load_four(const Four *from)
{
    Four found;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
                 : "l"(from)
                 : "memory");
    return found;
}

/* the launch in front has ended, and what it wrote is there; the next one may start */
__device__ inline void await_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/* rows of one head from a page, chunk by chunk; coordinates (column, head, token, page and half) */
__device__ inline void copy_box(unsigned to, const TensorMap &map, int head, int token, int half, unsigned barrier)
{
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to + c * TILE * ROW_BYTES),
                     "l"(&map), "r"(c * CHUNK), "r"(head), "r"(token), "r"(half), "r"(barrier)
                     : "memory");
}

/* what this thread wrote to shared memory is there for products and copies after */
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* rows [from, TILE) of a tile become 0, by one group of four warps */
__device__ inline void clear_rows(unsigned tile, int from, int barrier)
{
    for (int i = threadIdx.x % GROUP_THREADS; i < (TILE - from) * (HEAD_DIM / 8); i += GROUP_THREADS) {
        const int row = from + i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8);
        const unsigned to = tile + piece / 8 * (TILE * ROW_BYTES) + row * ROW_BYTES + piece % 8 * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
    }
    publish();
    meet<GROUP_THREADS>(barrier);
}

/* page numbers of one history, in order */
struct Pages {
    const int *ids;
    int count, base, now, next;
    __device__ Pages(const int *ids, int count, int first) : ids(ids), count(count), base(first)
    {
        now = load(base);
        next = load(base + WARP);
    }
    __device__ int load(int from) const
    {
        const int at = from + static_cast<int>(threadIdx.x % WARP);
        return at < count ? ids[at] : 0;
    }
    /* by a whole warp; `index` never goes back, nor ahead by more than a batch */
    __device__ int at(int index)
    {
        if (index - base >= WARP) {
            base += WARP;
            now = next;
            next = load(base + WARP);
        }
        return __shfl_sync(~0u, now, index - base);
    }
};

/* one warp: all tiles of keys (half 0) or values (half 1) of this thread block */
template <int DEPTH>
__device__ inline void stream(const Ring<TILE, DEPTH> &ring, const Shares &shares, const Users &users,
                              const TensorMap &pages, const TensorMap &own, const int *page_offsets,
                              const int *page_ids, int half)
{
    const bool chosen = threadIdx.x % WARP == 0;
    Place<DEPTH> at;
    for (Walk walk(shares, blockIdx.x, gridDim.x); walk.more(); walk.step()) {
        Piece piece(walk);
        const Sequence rows = users.sequence(piece.user);
        if (piece.row >= rows.length)
            continue;
        const int cached = users.cached(piece.user, rows);
        const Visit visit(rows, cached, piece.row);
        piece.scale(walk, visit.count());
        Pages numbers(page_ids + page_offsets[piece.user], (cached + PAGE - 1) / PAGE, Boxes::page(piece.begin, 0));
#pragma unroll 1
        for (int i = piece.begin; i < piece.end; ++i) {
            if (i < visit.of_cache) {
                if (chosen) {
                    wait_for(ring.empty + at.stage * 8, at.parity ^ 1);
                    expect(ring.full + at.stage * 8, ring.BYTES);
                }
#pragma unroll 1
                for (int box = 0; box < Boxes::COUNT; ++box) {
                    const int page = numbers.at(Boxes::page(i, box));
                    if (chosen)
                        copy_box(ring.tile(at) + box * Boxes::ROWS * ROW_BYTES, pages, piece.head,
                                 Boxes::token(i, box, cached), 2 * page + half, ring.full + at.stage * 8);
                }
            } else if (chosen) {
                ring.fill(at, own, piece.head, rows.start + visit.own.at(i - visit.of_cache));
            }
            at.step();
        }
    }
}

/* heads of a row that are loaded before any is stored: a store would have the next load wait */
constexpr int HEADS_IN_FLIGHT = 4;

/* one warp of each thread block: keys and values of new history to their pages */
__device__ inline void append(const Users &users, int heads, const element *k, const element *v, element *cache,
                              long long k_row, long long k_head, long long v_row, long long v_head,
                              const int *page_offsets, const int *page_ids)
{
    const int lane = threadIdx.x % WARP;
    for (int user = 0; user < users.count; ++user) {
        const Sequence rows = users.sequence(user);
        const int cached = users.cached(user, rows);
        for (int i = blockIdx.x; i < 2 * rows.history_end; i += gridDim.x) {
            const int row = i / 2, half = i % 2, token = cached + row;
            const int page = page_ids[page_offsets[user] + token / PAGE];
            const element *from = (half ? v + (rows.start + row) * v_row : k + (rows.start + row) * k_row) + lane * 8;
            element *to = cache + ((page * 2ll + half) * PAGE + token % PAGE) * heads * HEAD_DIM + lane * 8;
            const long long head_stride = half ? v_head : k_head;
            for (int first = 0; first < heads; first += HEADS_IN_FLIGHT) {
                Four found[HEADS_IN_FLIGHT];
#pragma unroll
                for (int h = 0; h < HEADS_IN_FLIGHT; ++h)
                    if (first + h < heads)
                        found[h] = load_four(reinterpret_cast<const Four *>(from + (first + h) * head_stride));
#pragma unroll
                for (int h = 0; h < HEADS_IN_FLIGHT; ++h)
                    if (first + h < heads)
                        *reinterpret_cast<Four *>(to + (first + h) * HEAD_DIM) = found[h];
            }
        }
    }
}
"""
