// Runs CUDA C++ for Hopper on a processor, on top of cuda_emulation.hpp: barriers in shared memory, the copy engine with
// its swizzles, products of warpgroups, clusters. The blocks of a cluster run at once, in random order. Copies and stores
// of the copy engine happen at a random time after they were asked for, products when they are waited for; what is being
// copied to is garbage until then. So a missing wait, a buffer that is freed too early and a deadlock show.
#include "cuda_emulation.hpp"
#include <map>
#include <random>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __grid_constant__

typedef unsigned long long word64;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
constexpr unsigned BLOCK_BITS = 20;
static unsigned block_threads;
static std::mt19937 dice;

// one range of addresses for the shared memory of all blocks, so that an address tells its block
static unsigned block_in_cluster() { return static_cast<unsigned>(current->first_of_block) / block_threads; }
static unsigned char *block_memory() { return dynamic_shared + (static_cast<size_t>(block_in_cluster()) << BLOCK_BITS); }
static unsigned char *shared_at(unsigned address) { return dynamic_shared + address; }
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

// a fiber that polls counts as waiting; `progress` tells whether anything happened since
static const char POLL = 0;
static unsigned long progress;
template <class Done> static void poll(Done done)
{
    while (!done())
        wait_at(&POLL);
    ++progress;
}

// others may run in between, now and then for long
static void dawdle()
{
    for (unsigned turns = dice() % 8 ? dice() % 2 : dice() % 100; turns > 0; --turns, ++progress)
        wait_at(&POLL);
}

// ------------------------------------------------------------------------------------------------------------ barriers
struct Barrier { int count = 0, pending = 0; long bytes = 0; unsigned phase = 0; };
static std::map<unsigned, Barrier> barriers;
static Barrier &barrier_at(unsigned address)
{
    auto found = barriers.find(address);
    if (found == barriers.end())
        std::fprintf(stderr, "no barrier at %x\n", address), std::abort();
    return found->second;
}
static void turn(Barrier &barrier)
{
    ++progress;
    if (barrier.pending < 0)
        std::abort();
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.count;
        ++barrier.phase;
    }
}
static void make_barrier(unsigned address, int arrivals)
{
    if (address % 8)
        std::abort();
    barriers[address] = {arrivals, arrivals, 0, 0};
}
static void arrive(unsigned address)
{
    Barrier &barrier = barrier_at(address);
    --barrier.pending;
    turn(barrier);
}
static void expect(unsigned address, int bytes)
{
    barrier_at(address).bytes += bytes;
    arrive(address);
}
static void wait_for(unsigned address, unsigned parity)
{
    poll([=] { return (barrier_at(address).phase & 1) != parity; });
}
static void wait_for_cluster(unsigned address, unsigned parity) { wait_for(address, parity); }
static void arrive_in_cluster(unsigned barrier) { arrive(barrier); }
static void release(unsigned barrier)
{
    __syncwarp();
    if (lane() == 0)
        arrive(barrier);
}
static void meet_all() { __syncthreads(); }
static std::map<std::pair<unsigned, int>, int> meetings;
template <int THREADS> static void announce(int barrier)
{
    ++meetings[std::make_pair(block_in_cluster(), barrier)];
    ++progress;
}
template <int THREADS> static void meet(int barrier)
{
    const auto key = std::make_pair(block_in_cluster(), barrier);
    const int ticket = meetings[key]++;
    poll([=] { return meetings[key] >= (ticket / THREADS + 1) * THREADS; });
}
static int cluster_arrivals, cluster_blocks;
static int place_in_cluster() { return static_cast<int>(block_in_cluster()); }
static void announce_to_cluster() { ++cluster_arrivals; }
static void await_cluster() { poll([] { return cluster_arrivals == cluster_blocks * static_cast<int>(block_threads); }); }
static unsigned in_block(unsigned address, int block)
{
    if (block >= cluster_blocks)
        std::abort();
    return (address & ((1u << BLOCK_BITS) - 1)) | static_cast<unsigned>(block) << BLOCK_BITS;
}
static float4 load_in_cluster(unsigned from)
{
    dawdle();
    return shared_value<float4>(from);
}
static void await_last() {}

// --------------------------------------------------------------------------------------------------------- copy engine
constexpr word64 KEEP = 1, DROP = 2;
/* address, dimensions, sizes [3], strides in bytes [2] of the second and third, box [3], swizzle's bytes */
struct alignas(64) TensorMap { word64 words[16]; };
static unsigned swizzled(unsigned address, word64 bytes)
{
    const unsigned bits = bytes == 128 ? 7 : bytes == 64 ? 3 : bytes == 32 ? 1 : 0;
    return address ^ (address >> 7 & bits) << 4;
}
struct Transfer { const TensorMap *map; int at[3]; unsigned shared, barrier; bool store, done; };
static std::deque<std::shared_ptr<Transfer>> transfers;
static std::map<const Fiber *, std::vector<std::vector<std::shared_ptr<Transfer>>>> store_groups;
template <class Each> static void each_element(const Transfer &transfer, Each each)
{
    const word64 *map = transfer.map->words;
    const int *at = transfer.at;
    const bool three = map[1] == 3;
    unsigned place = transfer.shared;
    for (int m = 0; m < static_cast<int>(map[9]); ++m)
        for (int r = 0; r < static_cast<int>(map[8]); ++r)
            for (int c = 0; c < static_cast<int>(map[7]); ++c, place += 2) {
                const long column = at[0] + c, row = at[1] + r, matrix = three ? at[2] + m : 0;
                const bool inside = column >= 0 && column < static_cast<long>(map[2]) && row >= 0 && row < static_cast<long>(map[3]) &&
                                    (!three || (matrix >= 0 && matrix < static_cast<long>(map[4])));
                element *global = inside ? reinterpret_cast<element *>(map[0] + static_cast<word64>(matrix) * map[6] +
                                                                       static_cast<word64>(row) * map[5]) + column
                                         : nullptr;
                each(reinterpret_cast<element *>(shared_at(swizzled(place, map[10]))), global);
            }
}
static int bytes_of(const TensorMap &map) { return static_cast<int>(map.words[7] * map.words[8] * map.words[9] * 2); }
static void perform(Transfer &transfer)
{
    each_element(transfer, [&](element *shared, element *global) {
        if (!transfer.store)
            *shared = global ? *global : 0;
        else if (global)
            *global = *shared;
    });
    transfer.done = true;
    if (!transfer.store) {
        Barrier &barrier = barrier_at(transfer.barrier);
        barrier.bytes -= bytes_of(*transfer.map);
        turn(barrier);
    }
    ++progress;
}
static void ask(const TensorMap *map, int c, int r, int m, unsigned shared, unsigned barrier, bool store)
{
    if (shared % (map->words[10] == 0 ? 16 : 128) || map->words[0] % 16 || map->words[5] % 16 || map->words[6] % 16)
        std::abort();
    auto transfer = std::make_shared<Transfer>(Transfer{map, {c, r, m}, shared, barrier, store, false});
    if (store)
        store_groups[current].back().push_back(transfer);
    else
        each_element(*transfer, [](element *at, element *) { *at = 0xffff; });
    transfers.push_back(transfer);
}
static void copy_box(unsigned to, const TensorMap *map, int c, int r, unsigned barrier, word64) { ask(map, c, r, 0, to, barrier, false); }
static void copy_box(unsigned to, const TensorMap *map, int c, int r, int m, unsigned barrier, word64) { ask(map, c, r, m, to, barrier, false); }
static void store_box(const TensorMap *map, int c, int r, unsigned from)
{
    if (store_groups[current].empty())
        store_groups[current].emplace_back();
    ask(map, c, r, 0, from, 0, true);
}
static void commit_stores()
{
    auto &groups = store_groups[current];
    if (groups.empty())
        groups.emplace_back();
    groups.emplace_back();
}
template <int N> static void stores_read_but()
{
    poll([] {
        // the last group is the open one
        auto &groups = store_groups[current];
        for (size_t g = 0; g + N + 1 < groups.size(); ++g)
            for (auto &transfer : groups[g])
                if (!transfer->done)
                    return false;
        return true;
    });
}
static void stores_done() { stores_read_but<0>(); }
static void show_writes() {}
static void fetch_map(const TensorMap *) {}
static void fetch_to_l2(const void *at) { volatile char touched = *static_cast<const char *>(at); (void)touched; }
static unsigned load_word(unsigned from) { return shared_value<unsigned>(from); }
static void store_word(unsigned to, unsigned word) { put_shared(to, word); }
static void store_four(unsigned to, unsigned a, unsigned b, unsigned c, unsigned d)
{
    put_shared(to, uint4{a, b, c, d});
}
static void store_global(element *to, unsigned from)
{
    if (reinterpret_cast<uintptr_t>(to) % 16 || from % 16)
        std::abort();
    std::memcpy(to, shared_at(from), 16);
}
static void store_matrices(unsigned to, const unsigned (&from)[4])
{
    publish(0, to);
    __syncwarp();
    for (int matrix = 0; matrix < 4; ++matrix)
        put_shared(read_of<unsigned>(matrix * 8 + lane() / 4, 0) + static_cast<unsigned>(lane() % 4) * 4, from[matrix]);
    __syncwarp();
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static void store_two(unsigned to, float a, float b) { put_shared(to, float2{a, b}); }
static void unpacked(unsigned both, float &low, float &high)
{
    low = widened(static_cast<element>(both));
    high = widened(static_cast<element>(both >> 16));
}
static int load_past_l1(const int *from) { return *from; }
static float4 load_four_past_l1(const float *from)
{
    if (reinterpret_cast<uintptr_t>(from) % 16)
        std::abort();
    return *reinterpret_cast<const float4 *>(from);
}

// ------------------------------------------------------------------------------------------------------------ products
// 14 bits hold an address of this block in units of 16 bytes
static word64 by_columns(unsigned tile) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (tile & 0x3ffff) >> 4; }
/* the first operand of a product from registers: two rows of a thread, which it has from the four that share them */
struct Held { float rows[2][16]; };
struct Product { float *sums; int count; word64 a, b; bool add; std::shared_ptr<Held> held = nullptr; };
static std::map<const Fiber *, std::deque<std::vector<Product>>> products;
static void start_products() {}
template <int N> static void settle(float (&)[N]) {}
template <int N> static void settle(unsigned (&)[N]) {}
template <int N> static void ask_product(float (&sums)[N], word64 a, word64 b, bool add)
{
    auto &groups = products[current];
    if (groups.empty())
        groups.emplace_back();
    groups.back().push_back({sums, N, a, b, add});
}
template <int N> static void multiply(float (&sums)[N], word64 a, word64 b, int add) { ask_product(sums, a, b, add); }
template <int N> static void multiply(float (&sums)[N], word64 a, word64 b) { ask_product(sums, a, b, false); }
template <int N> static void multiply_add(float (&sums)[N], word64 a, word64 b) { ask_product(sums, a, b, true); }
template <int N> static void multiply_add(float (&sums)[N], const unsigned *a, word64 b)
{
    auto held = std::make_shared<Held>();
    for (int sharer = 0; sharer < 4; ++sharer)
        for (int i = 0; i < 4; ++i) {
            const unsigned two = __shfl_sync(~0u, a[i], lane() / 4 * 4 + sharer);
            held->rows[i % 2][i / 2 * 8 + sharer * 2] = widened(static_cast<element>(two));
            held->rows[i % 2][i / 2 * 8 + sharer * 2 + 1] = widened(static_cast<element>(two >> 16));
        }
    ask_product(sums, 0, b, true);
    products[current].back().back().held = held;
}
static void commit_products() { products[current].emplace_back(); }
// bit 61, which the hardware does not read, says that an operand is read along its rows
constexpr word64 ALONG_ROWS = 1ull << 61;
template <int ROWS> static word64 by_rows(unsigned tile)
{
    return 1ull << 62 | ALONG_ROWS | 64ull << 32 | static_cast<word64>(ROWS * 128 / 16) << 16 | (tile & 0x3ffff) >> 4;
}
static word64 rows_at(int k) { return static_cast<word64>(k * (16 * 128 / 16)); }
template <int ROWS> static word64 columns_at(int k) { return static_cast<word64>(k / 4 * (ROWS * 128 / 16) + k % 4 * 2); }
static float operand(word64 descriptor, int row, int k)
{
    if (descriptor & ALONG_ROWS) {
        const unsigned start = block_in_cluster() << BLOCK_BITS | static_cast<unsigned>(descriptor & 0x3fff) << 4;
        const unsigned chunk = static_cast<unsigned>(descriptor >> 16 & 0x3fff) * 16 * (static_cast<unsigned>(row) / 64);
        const unsigned plain = start + chunk + static_cast<unsigned>(k) * 128 + static_cast<unsigned>(row) % 64 * 2;
        return widened(shared_value<element>(swizzled(plain, 128)));
    }
    const unsigned kind = static_cast<unsigned>(descriptor >> 62), line = kind == 1 ? 128 : kind == 2 ? 64 : 32;
    if (kind == 0 || (descriptor >> 32 & 0x3fff) * 16 != line * 8)
        std::abort();
    const unsigned start = block_in_cluster() << BLOCK_BITS | static_cast<unsigned>(descriptor & 0x3fff) << 4;
    const unsigned plain = start + static_cast<unsigned>(row) * line + static_cast<unsigned>(k) * 2;
    return widened(shared_value<element>(swizzled(plain, line)));
}
static void perform(const Product &product)
{
    const int warp = static_cast<int>(current->index.x) / WARP % 4;
    for (int e = 0; e < product.count; ++e) {
        const int row = warp * 16 + lane() / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + lane() % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k)
            sum += (product.held ? product.held->rows[e / 2 % 2][k] : operand(product.a, row, k)) * operand(product.b, column, k);
        product.sums[e] = product.add ? product.sums[e] + sum : sum;
    }
}
template <int N> static void products_but()
{
    dawdle();
    auto &groups = products[current];
    for (; groups.size() > N + 1; groups.pop_front())
        for (const Product &product : groups.front())
            perform(product);
}
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

// ---------------------------------------------------------------------------------------------------------- scheduling
static void run_hopper_cluster(Index first, unsigned threads, unsigned blocks)
{
    fibers.clear(), barriers.clear(), meetings.clear(), transfers.clear(), store_groups.clear(), products.clear();
    cluster_arrivals = 0, cluster_blocks = static_cast<int>(blocks), block_threads = threads;
    for (unsigned i = 0; i < threads * blocks; ++i) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber &fiber = *fibers.back();
        fiber.index.x = i % threads;
        fiber.first_of_block = i - i % threads;
        fiber.block = first;
        fiber.block.x += i / threads;
        fiber.stack = std::make_unique<char[]>(STACK_BYTES);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber.context, fiber_main, 0);
    }
    auto resume = [](Fiber &fiber) {
        current = &fiber;
        fiber.waits_for = nullptr;
        blockIdx = fiber.block;
        swapcontext(&scheduler, &fiber.context);
    };
    for (auto &fiber : fibers)
        resume(*fiber);
    std::vector<size_t> warps;
    for (size_t begin = 0; begin < fibers.size(); begin += WARP)
        warps.push_back(begin);
    for (int idle = 0; idle < 1000; ++idle) {
        const unsigned long before = progress;
        std::shuffle(warps.begin(), warps.end(), dice);
        for (size_t begin : warps) {
            for (size_t i = begin; i < begin + WARP; ++i)
                if (!fibers[i]->done && fibers[i]->waits_for == &POLL)
                    resume(*fibers[i]);
            Fiber *waiting = nullptr;
            for (size_t i = begin; i < begin + WARP && !waiting; ++i)
                if (!fibers[i]->done)
                    waiting = fibers[i].get();
            if (waiting && waiting->waits_for == &WARP_BARRIER && released(*waiting, begin, begin + WARP)) {
                for (size_t i = begin; i < begin + WARP; ++i)
                    if (!fibers[i]->done)
                        resume(*fibers[i]);
                ++progress;
            }
        }
        for (unsigned block = 0; block < blocks; ++block) {
            const size_t begin = block * threads;
            if (fibers[begin]->waits_for == &BLOCK_BARRIER && released(*fibers[begin], begin, begin + threads)) {
                for (size_t i = begin; i < begin + threads; ++i)
                    resume(*fibers[i]);
                ++progress;
            }
        }
        // some of what the copy engine was asked for, in any order
        for (size_t some = transfers.empty() ? 0 : dice() % 3; some > 0 && !transfers.empty(); --some) {
            const size_t chosen = dice() % std::min<size_t>(transfers.size(), 8);
            perform(*transfers[chosen]);
            transfers.erase(transfers.begin() + static_cast<long>(chosen));
        }
        if (progress != before)
            idle = 0;
    }
    for (auto &fiber : fibers)
        if (!fiber->done) {
            std::fprintf(stderr, "deadlock: thread %u never ends\n", fiber->index.x);
            std::abort();
        }
    if (!transfers.empty()) {
        std::fprintf(stderr, "a block ended before its copies\n");
        std::abort();
    }
}
#define EMULATED_CLUSTERS(kernel)                                                                                      \
    template <class... Arguments> static void call_##kernel(void (*f)(Arguments...), void **arguments)                 \
    {                                                                                                                  \
        apply(f, arguments, std::index_sequence_for<Arguments...>());                                                  \
    }                                                                                                                  \
    extern "C" void emulate_##kernel(unsigned x, unsigned y, unsigned cluster, unsigned threads, unsigned shared_bytes, \
                                     unsigned seed, const unsigned *order, void **arguments)                           \
    {                                                                                                                  \
        std::vector<unsigned char> memory((static_cast<size_t>(cluster) << BLOCK_BITS) + 1024);                        \
        dynamic_shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;            \
        gridDim.x = x, gridDim.y = y, gridDim.z = 1;                                                                   \
        dice.seed(seed);                                                                                               \
        body = [](void **given) { call_##kernel(kernel, given); };                                                     \
        body_arguments = arguments;                                                                                    \
        for (unsigned i = 0; i < x / cluster * y; ++i) {                                                               \
            for (unsigned b = 0; b < cluster; ++b)                                                                     \
                std::memset(dynamic_shared + (static_cast<size_t>(b) << BLOCK_BITS), 0xff, shared_bytes);              \
            Index first;                                                                                               \
            first.x = order[i] % (x / cluster) * cluster, first.y = order[i] / (x / cluster);                          \
            run_hopper_cluster(first, threads, cluster);                                                               \
        }                                                                                                              \
    }
