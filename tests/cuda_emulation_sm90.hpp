// CUDA C++ for Hopper on a processor, on top of cuda_emulation.hpp: what kernels see of barriers in shared memory, of
// the copy engine, of products of warpgroups and of clusters. cuda_emulation_sm90.cpp does the work.
#pragma once
#include "cuda_emulation.hpp"

#define __grid_constant__

typedef unsigned long long word64;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
/* an address tells its block: the shared memory of all blocks is one range, each has so much of it */
constexpr unsigned BLOCK_BITS = 20;
unsigned char *block_memory();
inline unsigned char *shared_at(unsigned address) { return dynamic_shared + address; }
template <class T> static T shared_value(unsigned address)
{
    if (address % sizeof(T))
        std::abort();
    T found;
    std::memcpy(&found, shared_at(address), sizeof found);
    return found;
}
template <class T> static void put_shared(unsigned address, T value)
{
    if (address % sizeof(T))
        std::abort();
    std::memcpy(shared_at(address), &value, sizeof value);
}
/* a fiber that waits here is one that polls */
extern const char POLL;
/* others may run in between, now and then for long */
void dawdle();

// ------------------------------------------------------------------------------------------------------------ barriers
void make_barrier(unsigned address, int arrivals);
void arrive(unsigned address);
void expect(unsigned address, int bytes);
void wait_for(unsigned address, unsigned parity);
inline void wait_for_cluster(unsigned address, unsigned parity) { wait_for(address, parity); }
inline void arrive_in_cluster(unsigned barrier) { arrive(barrier); }
void release(unsigned barrier);
inline void meet_all() { __syncthreads(); }
void announce_at(int barrier);
void meet_at(int barrier, int threads);
template <int THREADS> static void announce(int barrier) { announce_at(barrier); }
template <int THREADS> static void meet(int barrier) { meet_at(barrier, THREADS); }
int place_in_cluster();
void announce_to_cluster();
void await_cluster();
unsigned in_block(unsigned address, int block);
float4 load_in_cluster(unsigned from);
inline void await_last() {}

// --------------------------------------------------------------------------------------------------------- copy engine
constexpr word64 KEEP = 1, DROP = 2;
/* address, dimensions, sizes [3], strides in bytes [2] of the second and third, box [3], swizzle's bytes */
struct alignas(64) TensorMap { word64 words[16]; };
void ask(const TensorMap *map, int c, int r, int m, unsigned shared, unsigned barrier, bool store);
inline void copy_box(unsigned to, const TensorMap *map, int c, int r, unsigned barrier, word64) { ask(map, c, r, 0, to, barrier, false); }
inline void copy_box(unsigned to, const TensorMap *map, int c, int r, int m, unsigned barrier, word64) { ask(map, c, r, m, to, barrier, false); }
void store_box(const TensorMap *map, int c, int r, unsigned from);
void commit_stores();
void stores_read_but_newest(size_t newest);
template <int N> static void stores_read_but() { stores_read_but_newest(N); }
inline void stores_done() { stores_read_but_newest(0); }
inline void show_writes() {}
inline void fetch_map(const TensorMap *) {}
inline void fetch_to_l2(const void *at) { volatile char touched = *static_cast<const char *>(at); (void)touched; }
inline unsigned load_word(unsigned from) { return shared_value<unsigned>(from); }
inline void store_word(unsigned to, unsigned word) { put_shared(to, word); }
inline void store_two(unsigned to, float a, float b) { put_shared(to, float2{a, b}); }
inline void store_four(unsigned to, unsigned a, unsigned b, unsigned c, unsigned d) { put_shared(to, uint4{a, b, c, d}); }
void store_matrices(unsigned to, const unsigned (&from)[4]);
inline void store_global(element *to, unsigned from)
{
    must_be_aligned(to, 16);
    if (from % 16)
        std::abort();
    std::memcpy(to, shared_at(from), 16);
}
inline void unpacked(unsigned both, float &low, float &high)
{
    low = widened(static_cast<element>(both));
    high = widened(static_cast<element>(both >> 16));
}
inline int load_past_l1(const int *from) { return *from; }
inline float4 load_four_past_l1(const float *from)
{
    must_be_aligned(from, 16);
    return *reinterpret_cast<const float4 *>(from);
}

// ------------------------------------------------------------------------------------------------------------ products
// 14 bits hold an address of this block in units of 16 bytes
inline word64 by_columns(unsigned tile) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (tile & 0x3ffff) >> 4; }
// bit 61, which the hardware does not read, says that an operand is read along its rows
constexpr word64 ALONG_ROWS = 1ull << 61;
template <int ROWS> static word64 by_rows(unsigned tile)
{
    return 1ull << 62 | ALONG_ROWS | 64ull << 32 | static_cast<word64>(ROWS * 128 / 16) << 16 | (tile & 0x3ffff) >> 4;
}
inline word64 rows_at(int k) { return static_cast<word64>(k * (16 * 128 / 16)); }
template <int ROWS> static word64 columns_at(int k) { return static_cast<word64>(k / 4 * (ROWS * 128 / 16) + k % 4 * 2); }
inline void start_products() {}
template <int N> static void settle(float (&)[N]) {}
template <int N> static void settle(unsigned (&)[N]) {}
void ask_product(float *sums, int count, word64 a, word64 b, bool add);
/* the first operand from registers: four words of each thread */
void ask_held_product(float *sums, int count, const unsigned *a, word64 b);
template <int N> static void multiply(float (&sums)[N], word64 a, word64 b, int add) { ask_product(sums, N, a, b, add); }
template <int N> static void multiply(float (&sums)[N], word64 a, word64 b) { ask_product(sums, N, a, b, false); }
template <int N> static void multiply_add(float (&sums)[N], word64 a, word64 b) { ask_product(sums, N, a, b, true); }
template <int N> static void multiply_add(float (&sums)[N], const unsigned *a, word64 b) { ask_held_product(sums, N, a, b); }
void commit_products();
void await_products_but(size_t newest);
template <int N> static void products_but() { await_products_but(N); }
template <int DEPTH> struct Place {
    int stage = 0;
    unsigned parity = 0;
    void step()
    {
        if (++stage == DEPTH) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// --------------------------------------------------------------------------------------------------------------- entry
/* all clusters of a grid in the order given; what happens at random follows from the seed */
void run_clusters(void (*kernel)(void **), bool bfloat16, Index grid, unsigned cluster, unsigned threads,
                  unsigned shared_bytes, unsigned seed, const unsigned *order, void **arguments);
#define EMULATED_CLUSTERS(kernel)                                                                                      \
    EXPORTED void emulate_##kernel(unsigned x, unsigned y, unsigned cluster, unsigned threads, unsigned shared_bytes,  \
                                   unsigned seed, const unsigned *order, void **arguments)                             \
    {                                                                                                                  \
        run_clusters([](void **given) { call(kernel, given); }, ELEMENTS_ARE_BFLOAT16, {x, y, 1}, cluster, threads,    \
                     shared_bytes, seed, order, arguments);                                                            \
    }
