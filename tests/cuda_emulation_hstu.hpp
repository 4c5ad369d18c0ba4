// What the HSTU attention kernels use beyond cuda_emulation_sm90.hpp: tiles of heads and of pages, SiLU, rows to memory.
// All thread blocks of a grid run as one cluster, at once, since they wait for each other. Comes before the sources.
#include <deque>

constexpr int GROUP_THREADS = 128, CHUNK = 64, ROW_BYTES = CHUNK * 2, HEAD = 256;
struct alignas(16) Four { float x, y, z, w; };
static Four load_four(const Four *from)
{
    if (reinterpret_cast<uintptr_t>(from) % 16)
        std::abort();
    dawdle();
    return *from;
}
static int load_acquired(const int *from)
{
    // others have to run, and to be waited for counts as waiting
    wait_at(&POLL);
    return *from;
}
static void await_launch_before() {}
static void publish() {}
template <int COUNT> static void more_registers() {}
template <int COUNT> static void fewer_registers() {}
template <int N> static void pack(unsigned (&to)[N / 2], const float (&from)[N])
{
    for (int i = 0; i < N / 2; ++i)
        to[i] = packed(from[2 * i], from[2 * i + 1]);
}
static void silu(float s, float half_alpha, float &value, float &)
{
    const float half = s * half_alpha;
    value = half * tanhf(half) + half;
}
template <int ROWS> static void copy_tile(unsigned to, const TensorMap &map, int head, int row, unsigned barrier)
{
    for (int c = 0; c < HEAD / CHUNK; ++c)
        ask(&map, c * CHUNK, head, row, to + c * ROWS * ROW_BYTES, barrier, false);
}
// a map of pages has after the words of others the bytes from one half of a page to the next, and how many there are
static std::deque<TensorMap> halves;
static void copy_box(unsigned to, const TensorMap &map, int head, int token, int half, unsigned barrier)
{
    if (half < 0 || half >= static_cast<int>(map.words[12]))
        std::fprintf(stderr, "no page for half %d\n", half), std::abort();
    halves.push_back(map);
    halves.back().words[0] += static_cast<word64>(half) * map.words[11];
    for (int c = 0; c < HEAD / CHUNK; ++c)
        ask(&halves.back(), c * CHUNK, head, token, to + c * TILE * ROW_BYTES, barrier, false);
}
static void clear_rows(unsigned tile, int from, int barrier)
{
    dawdle();
    for (int i = static_cast<int>(threadIdx.x) % GROUP_THREADS; i < (TILE - from) * (HEAD / 8); i += GROUP_THREADS) {
        const int row = from + i / (HEAD / 8), piece = i % (HEAD / 8);
        store_four(tile + piece / 8 * (TILE * ROW_BYTES) + row * ROW_BYTES + piece % 8 * 16, 0, 0, 0, 0);
    }
    meet<GROUP_THREADS>(barrier);
}
// what passes through shared memory on its way is garbage there: nobody else may still need the place
static void store_rows(element *out, long long row_stride, int row, int rows_end, const float (&sums)[HEAD / 2], float scale,
                       unsigned staging)
{
    const int warp = static_cast<int>(threadIdx.x) / WARP % 4;
    for (int e = 0; e < HEAD / 2; ++e) {
        const int r = warp * 16 + lane() / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + lane() % 4 * 2 + e % 2;
        put_shared(staging + r * (HEAD * 2) + column * 2, static_cast<element>(0xffff));
        if (row + r < rows_end)
            out[(row + r) * row_stride + column] = narrowed(sums[e] * scale);
    }
    __syncwarp();
}
