// Runs kernels for Hopper on a processor: barriers in shared memory, the copy engine with its swizzles, products of
// warpgroups, clusters. The blocks of a cluster run at once, in random order. Copies and stores of the copy engine
// happen at a random time after they were asked for, products when they are waited for; what is being copied to is
// garbage until then. So a missing wait, a buffer that is freed too early and a deadlock show.
#include <map>
#include <random>

#include "cuda_emulation_fibers.hpp"
#include "cuda_emulation_sm90.hpp"

const char POLL = 0;
namespace {
unsigned block_threads;
std::mt19937 dice;
/* whether anything happened since */
unsigned long progress;
unsigned block_in_cluster() { return static_cast<unsigned>(running().first_of_block) / block_threads; }
template <class Done> void poll(Done done)
{
    while (!done())
        wait_at(&POLL);
    ++progress;
}
} // namespace
unsigned char *block_memory() { return dynamic_shared + (static_cast<size_t>(block_in_cluster()) << BLOCK_BITS); }
void dawdle()
{
    for (unsigned turns = dice() % 8 ? dice() % 2 : dice() % 100; turns > 0; --turns, ++progress)
        wait_at(&POLL);
}

// ------------------------------------------------------------------------------------------------------------ barriers
namespace {
struct Barrier { int count = 0, pending = 0; long bytes = 0; unsigned phase = 0; };
std::map<unsigned, Barrier> barriers;
std::map<std::pair<unsigned, int>, int> meetings;
int cluster_arrivals, cluster_blocks;
Barrier &barrier_at(unsigned address)
{
    auto found = barriers.find(address);
    if (found == barriers.end())
        std::fprintf(stderr, "no barrier at %x\n", address), std::abort();
    return found->second;
}
void turn(Barrier &barrier)
{
    ++progress;
    if (barrier.pending < 0)
        std::abort();
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.count;
        ++barrier.phase;
    }
}
} // namespace
void make_barrier(unsigned address, int arrivals)
{
    if (address % 8)
        std::abort();
    barriers[address] = {arrivals, arrivals, 0, 0};
}
void arrive(unsigned address)
{
    Barrier &barrier = barrier_at(address);
    --barrier.pending;
    turn(barrier);
}
void expect(unsigned address, int bytes)
{
    barrier_at(address).bytes += bytes;
    arrive(address);
}
void wait_for(unsigned address, unsigned parity)
{
    poll([=] { return (barrier_at(address).phase & 1) != parity; });
}
void release(unsigned barrier)
{
    __syncwarp();
    if (lane() == 0)
        arrive(barrier);
}
void announce_at(int barrier)
{
    ++meetings[std::make_pair(block_in_cluster(), barrier)];
    ++progress;
}
void meet_at(int barrier, int threads)
{
    int &count = meetings[std::make_pair(block_in_cluster(), barrier)];
    const int ticket = count++;
    poll([&count, ticket, threads] { return count >= (ticket / threads + 1) * threads; });
}
int place_in_cluster() { return static_cast<int>(block_in_cluster()); }
void announce_to_cluster() { ++cluster_arrivals; }
void await_cluster() { poll([] { return cluster_arrivals == cluster_blocks * static_cast<int>(block_threads); }); }
unsigned in_block(unsigned address, int block)
{
    if (block >= cluster_blocks)
        std::abort();
    return (address & ((1u << BLOCK_BITS) - 1)) | static_cast<unsigned>(block) << BLOCK_BITS;
}
float4 load_in_cluster(unsigned from)
{
    dawdle();
    return shared_value<float4>(from);
}

// --------------------------------------------------------------------------------------------------------- copy engine
namespace {
struct Transfer { const TensorMap *map; int at[3]; unsigned shared, barrier; bool store, done; };
std::deque<std::shared_ptr<Transfer>> transfers;
std::map<const Fiber *, std::vector<std::vector<std::shared_ptr<Transfer>>>> store_groups;
unsigned swizzled(unsigned address, word64 bytes)
{
    const unsigned bits = bytes == 128 ? 7 : bytes == 64 ? 3 : bytes == 32 ? 1 : 0;
    return address ^ (address >> 7 & bits) << 4;
}
template <class Each> void each_element(const Transfer &transfer, Each each)
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
int bytes_of(const TensorMap &map) { return static_cast<int>(map.words[7] * map.words[8] * map.words[9] * 2); }
void perform(Transfer &transfer)
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
} // namespace
void ask(const TensorMap *map, int c, int r, int m, unsigned shared, unsigned barrier, bool store)
{
    if (shared % (map->words[10] == 0 ? 16 : 128) || map->words[0] % 16 || map->words[5] % 16 || map->words[6] % 16)
        std::abort();
    auto transfer = std::make_shared<Transfer>(Transfer{map, {c, r, m}, shared, barrier, store, false});
    if (store)
        store_groups[&running()].back().push_back(transfer);
    else
        each_element(*transfer, [](element *at, element *) { *at = 0xffff; });
    transfers.push_back(transfer);
}
void store_box(const TensorMap *map, int c, int r, unsigned from)
{
    if (store_groups[&running()].empty())
        store_groups[&running()].emplace_back();
    ask(map, c, r, 0, from, 0, true);
}
void commit_stores()
{
    auto &groups = store_groups[&running()];
    if (groups.empty())
        groups.emplace_back();
    groups.emplace_back();
}
void stores_read_but_newest(size_t newest)
{
    poll([newest] {
        // the last group is the open one
        auto &groups = store_groups[&running()];
        for (size_t g = 0; g + newest + 1 < groups.size(); ++g)
            for (auto &transfer : groups[g])
                if (!transfer->done)
                    return false;
        return true;
    });
}
void store_matrices(unsigned to, const unsigned (&from)[4])
{
    publish(0, to);
    __syncwarp();
    for (int matrix = 0; matrix < 4; ++matrix)
        put_shared(read_of<unsigned>(matrix * 8 + lane() / 4, 0) + static_cast<unsigned>(lane() % 4) * 4, from[matrix]);
    __syncwarp();
}

// ------------------------------------------------------------------------------------------------------------ products
namespace {
/* the first operand of a product from registers: two rows of a thread, which it has from the four that share them */
struct Held { float rows[2][16]; };
struct Product { float *sums; int count; word64 a, b; bool add; std::shared_ptr<Held> held; };
std::map<const Fiber *, std::deque<std::vector<Product>>> products;
void add_product(Product product)
{
    auto &groups = products[&running()];
    if (groups.empty())
        groups.emplace_back();
    groups.back().push_back(std::move(product));
}
float operand(word64 descriptor, int row, int k)
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
void perform(const Product &product)
{
    const int warp = static_cast<int>(current->index.x) / WARP % 4;
    float left[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k)
            left[half][k] = product.held ? product.held->rows[half][k] : operand(product.a, warp * 16 + lane() / 4 + half * 8, k);
    for (int e = 0; e < product.count; e += e % 4 == 1 ? 3 : 1) {
        // two rows of a thread share a column
        float right[16], sums[2] = {0, 0};
        for (int k = 0; k < 16; ++k)
            right[k] = operand(product.b, e / 4 * 8 + lane() % 4 * 2 + e % 2, k);
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < 16; ++k)
                sums[half] += left[half][k] * right[k];
            float &to = product.sums[e + half * 2];
            to = product.add ? to + sums[half] : sums[half];
        }
    }
}
} // namespace
void ask_product(float *sums, int count, word64 a, word64 b, bool add) { add_product({sums, count, a, b, add, nullptr}); }
void ask_held_product(float *sums, int count, const unsigned *a, word64 b)
{
    auto held = std::make_shared<Held>();
    for (int sharer = 0; sharer < 4; ++sharer)
        for (int i = 0; i < 4; ++i) {
            const unsigned two = __shfl_sync(~0u, a[i], lane() / 4 * 4 + sharer);
            unpacked(two, held->rows[i % 2][i / 2 * 8 + sharer * 2], held->rows[i % 2][i / 2 * 8 + sharer * 2 + 1]);
        }
    add_product({sums, count, 0, b, true, held});
}
void commit_products() { products[&running()].emplace_back(); }
void await_products_but(size_t newest)
{
    dawdle();
    auto &groups = products[&running()];
    for (; groups.size() > newest + 1; groups.pop_front())
        for (const Product &product : groups.front())
            perform(product);
}

// ---------------------------------------------------------------------------------------------------------- scheduling
static void run_warp(size_t begin)
{
    for (size_t i = begin; i < begin + WARP; ++i)
        if (!fibers[i]->done && fibers[i]->waits_for == &POLL)
            resume(*fibers[i]);
    Fiber *waiting = nullptr;
    for (size_t i = begin; i < begin + WARP && !waiting; ++i)
        if (!fibers[i]->done)
            waiting = fibers[i];
    if (waiting && waiting->waits_for == &WARP_BARRIER && released(*waiting, begin, begin + WARP)) {
        for (size_t i = begin; i < begin + WARP; ++i)
            if (!fibers[i]->done)
                resume(*fibers[i]);
        ++progress;
    }
}
static void run_cluster(Index first, unsigned threads, unsigned blocks)
{
    barriers.clear(), meetings.clear(), transfers.clear(), store_groups.clear(), products.clear();
    cluster_arrivals = 0, cluster_blocks = static_cast<int>(blocks), block_threads = threads;
    make_fibers(first, threads, blocks);
    for (Fiber *fiber : fibers)
        resume(*fiber);
    std::vector<size_t> warps;
    for (size_t begin = 0; begin < fibers.size(); begin += WARP)
        warps.push_back(begin);
    for (int idle = 0; idle < 1000; ++idle) {
        const unsigned long before = progress;
        std::shuffle(warps.begin(), warps.end(), dice);
        for (size_t begin : warps)
            run_warp(begin);
        for (unsigned block = 0; block < blocks; ++block) {
            const size_t begin = block * threads;
            if (fibers[begin]->waits_for == &BLOCK_BARRIER && released(*fibers[begin], begin, begin + threads)) {
                for (size_t i = begin; i < begin + threads; ++i)
                    if (!fibers[i]->done)
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
    check_all_ended("deadlock");
    if (!transfers.empty()) {
        std::fprintf(stderr, "a block ended before its copies\n");
        std::abort();
    }
}
void run_clusters(void (*kernel)(void **), bool bfloat16, Index grid, unsigned cluster, unsigned threads,
                  unsigned shared_bytes, unsigned seed, const unsigned *order, void **arguments)
{
    std::vector<unsigned char> memory((static_cast<size_t>(cluster) << BLOCK_BITS) + 1024);
    dynamic_shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
    gridDim = grid;
    dice.seed(seed);
    set_kernel(kernel, bfloat16, arguments);
    for (unsigned i = 0; i < grid.x / cluster * grid.y; ++i) {
        for (unsigned b = 0; b < cluster; ++b)
            std::memset(dynamic_shared + (static_cast<size_t>(b) << BLOCK_BITS), 0xff, shared_bytes);
        Index first;
        first.x = order[i] % (grid.x / cluster) * cluster, first.y = order[i] / (grid.x / cluster);
        run_cluster(first, threads, cluster);
    }
}
