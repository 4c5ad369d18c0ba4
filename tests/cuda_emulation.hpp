// Runs the CUDA C++ of smbench_kernels on a processor: the functions of cuda_primitives.py and the built-ins that the
// kernels use, for one thread block or one cluster of them at a time. Each CUDA thread is a fiber; a collective makes a
// fiber wait for its warp.
// Asynchronous copies arrive when they are waited for and not before, and their destination is garbage in between, so
// that a missing wait or an early overwrite shows; what one block sends to another arrives as late as it can. What it cannot show: data races between thread blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

typedef unsigned short element;
constexpr int WARP = 32;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x = 0, y = 0, z = 0; };

struct Copy { void *to; const void *from; int bytes, real; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index index, block;
    unsigned char *memory = nullptr;
    size_t first_of_block = 0;
    bool done = false;
    const void *waits_for = nullptr;
    unsigned mailbox = 0;
    int mail_turn = 0;
    int cluster_arrivals = 0, cluster_waits = 0;
    unsigned published[8] = {};
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
constexpr size_t STACK_BYTES = 256 << 10;
static std::vector<std::unique_ptr<Fiber>> fibers;
static Fiber *current;
static ucontext_t scheduler;
static Index blockIdx, gridDim;
static unsigned char *dynamic_shared;
#define threadIdx (current->index)

static int lane() { return static_cast<int>(current->index.x) % WARP; }
static Fiber &of_lane(int other) { return *fibers[current->first_of_block + current->index.x / WARP * WARP + static_cast<unsigned>(other)]; }
static void wait_at(const void *place)
{
    current->waits_for = place;
    swapcontext(&current->context, &scheduler);
}
// all lanes have published before any reads, all have read before any publishes again
static const char WARP_BARRIER = 0, BLOCK_BARRIER = 0, CLUSTER_BARRIER = 0, MAILBOX = 0;
static void __syncwarp() { wait_at(&WARP_BARRIER); }
static void __syncthreads() { wait_at(&BLOCK_BARRIER); }
static void __threadfence() {}
template <class T> static void publish(int slot, T value) { std::memcpy(&current->published[slot], &value, sizeof value); }
template <class T> static T read_of(int other, int slot)
{
    T value;
    std::memcpy(&value, &of_lane(other).published[slot], sizeof value);
    return value;
}
template <class T, class Read> static T collective(T value, Read read)
{
    publish(0, value);
    __syncwarp();
    T found = read();
    __syncwarp();
    return found;
}
template <class T> static T __shfl_sync(unsigned, T value, int from) { return collective(value, [=] { return read_of<T>(from % WARP, 0); }); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) { return collective(value, [=] { return read_of<T>(lane() ^ mask, 0); }); }
template <class T> static T __shfl_up_sync(unsigned, T value, int by)
{
    return collective(value, [=] { return read_of<T>(lane() >= by ? lane() - by : lane(), 0); });
}
template <class Fold> static int fold_lanes(int value, Fold fold)
{
    return collective(value, [=] {
        int found = read_of<int>(0, 0);
        for (int other = 1; other < WARP; ++other)
            found = fold(found, read_of<int>(other, 0));
        return found;
    });
}
static int __reduce_add_sync(unsigned, int value) { return fold_lanes(value, [](int a, int b) { return a + b; }); }
static int __reduce_max_sync(unsigned, int value) { return fold_lanes(value, [](int a, int b) { return std::max(a, b); }); }
static int __any_sync(unsigned, int value) { return fold_lanes(value != 0, [](int a, int b) { return a | b; }); }
static unsigned __ballot_sync(unsigned, int value)
{
    return static_cast<unsigned>(fold_lanes(static_cast<int>((value != 0 ? 1u : 0u) << lane()), [](int a, int b) { return a | b; }));
}
static int __ffs(unsigned bits) { return ffs(static_cast<int>(bits)); }
static int atomicAdd(int *at, int by) { int old = *at; *at += by; return old; }
#define __expf std::exp
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------ cuda_primitives.py
static unsigned as_bits(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static float widened(element value)
{
#if BFLOAT16
    return __uint_as_float(static_cast<unsigned>(value) << 16);
#else
    const int exponent = value >> 10 & 31, fraction = value & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.f + static_cast<float>(fraction), exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
    return value & 0x8000 ? -size : size;
#endif
}
static element narrowed(float value)
{
    const unsigned bits = as_bits(value);
#if BFLOAT16
    if (std::isnan(value))
        return 0x7fff;
    return static_cast<element>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    const element sign = static_cast<element>(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value))
        return 0x7fff;
    if (size >= 65520.f)
        return sign | 0x7c00;
    int exponent = 0;
    std::frexp(size, &exponent);
    // the spacing of numbers of this size; nearbyint rounds ties to even
    const int step = std::max(exponent - 11, -24);
    const float units = std::nearbyint(std::ldexp(size, -step));
    const float rounded = std::ldexp(units, step);
    for (int e = 0; e < 31; ++e) {
        const float least = e ? std::ldexp(1024.f, e - 25) : 0.f, next = std::ldexp(1024.f, (e ? e + 1 : 1) - 25);
        if (rounded >= least && rounded < next)
            return static_cast<element>(sign | e << 10 | static_cast<int>(std::ldexp(rounded - least, e ? 25 - e : 24)));
    }
    return sign | 0x7c00;
#endif
}
static unsigned packed(float low, float high) { return narrowed(low) | static_cast<unsigned>(narrowed(high)) << 16; }
static float power_of_2(float exponent) { return std::exp2(exponent); }
static unsigned shared_address(const void *at) { return static_cast<unsigned>(static_cast<const unsigned char *>(at) - dynamic_shared); }
static void copy_later(unsigned to, const void *from, int bytes, bool real)
{
    std::memset(dynamic_shared + to, 0xff, static_cast<size_t>(bytes));
    current->open.push_back({dynamic_shared + to, from, bytes, real});
}
static void copy_16(unsigned to, const void *from, bool real) { copy_later(to, from, 16, real); }
static void copy_4(unsigned to, const void *from, bool real) { copy_later(to, from, 4, real); }
static void commit() { current->groups.push_back(std::move(current->open)); current->open.clear(); }
template <int N> static void wait_but()
{
    for (; current->groups.size() > N; current->groups.pop_front())
        for (const Copy &copy : current->groups.front())
            copy.real ? std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes)) : std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    __syncwarp();
}
static int load_shared(unsigned from) { int found; std::memcpy(&found, dynamic_shared + from, 4); return found; }
static float load_past_l1(const float *from) { return *from; }
static void load_past_l1(float &first, float &second, const float *from) { first = from[0]; second = from[1]; }
static element shared_element(unsigned at) { element found; std::memcpy(&found, dynamic_shared + at, 2); return found; }
static void load_8x8(unsigned (&to)[4], unsigned from, bool transposed)
{
    publish(0, from);
    __syncwarp();
    const int row = lane() / 4, column = lane() % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned halves[2];
        for (int half = 0; half < 2; ++half) {
            const int line = transposed ? column + half : row, place = transposed ? row : column + half;
            halves[half] = shared_element(read_of<unsigned>(matrix * 8 + line, 0) + static_cast<unsigned>(place) * 2);
        }
        to[matrix] = halves[0] | halves[1] << 16;
    }
    __syncwarp();
}
static void load_matrices(unsigned (&to)[4], unsigned from) { load_8x8(to, from, false); }
static void load_transposed(unsigned (&to)[4], unsigned from) { load_8x8(to, from, true); }
static element half_of(unsigned bits, int half) { return static_cast<element>(bits >> 16 * half); }
static unsigned transposed(unsigned matrix)
{
    return collective(matrix, [] {
        const int row = lane() / 4, column = lane() % 4 * 2;
        unsigned halves[2];
        for (int half = 0; half < 2; ++half)
            halves[half] = half_of(read_of<unsigned>((column + half) * 4 + row / 2, 0), row % 2);
        return halves[0] | halves[1] << 16;
    });
}
static void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    for (int i = 0; i < 4; ++i)
        publish(i, a[i]);
    publish(4, b0);
    publish(5, b1);
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const element left = half_of(read_of<unsigned>(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), k % 2);
            const element right = half_of(read_of<unsigned>(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
            sums[i] += widened(left) * widened(right);
        }
    }
    __syncwarp();
}
template <int N> struct Vector { element value[N]; };
template <int N> static Vector<N> loaded(const element *at)
{
    if (reinterpret_cast<uintptr_t>(at) % (N * sizeof(element)))
        std::abort();
    Vector<N> found;
    std::memcpy(&found, at, sizeof found);
    return found;
}

// ------------------------------------------------------------------------------------------------ lora_primitives.py
template <int N> static void load_words(unsigned (&to)[N], const element *at, bool real)
{
    if (real && reinterpret_cast<uintptr_t>(at) % sizeof to)
        std::abort();
    real ? std::memcpy(to, at, sizeof to) : std::memset(to, 0, sizeof to);
}
static unsigned load_element(const element *at, bool real) { return real ? *at : 0; }
template <int N> static void load_recent_words(unsigned (&to)[N], const element *at, bool real) { load_words(to, at, real); }
static unsigned load_recent_element(const element *at, bool real) { return real ? *at : 0; }
template <class T> static void load_recent(T (&to)[4], const T *at)
{
    if (reinterpret_cast<uintptr_t>(at) % sizeof to)
        std::abort();
    std::memcpy(to, at, sizeof to);
}
static int load_recent(const int *at) { return *at; }
static void wait_for_previous() {}
static void let_next_start() {}
struct Mail { unsigned char *to, *mailbox; int reports; float value[4]; };
struct Mailbox { short missing, turn; int bytes; };
static std::vector<unsigned char *> cluster_memory;
static std::vector<Mail> mails;
static void cluster_arrive() { ++current->cluster_arrivals; }
static void cluster_wait()
{
    ++current->cluster_waits;
    wait_at(&CLUSTER_BARRIER);
}
static void cluster_meet()
{
    cluster_arrive();
    cluster_wait();
}
static Mailbox &mailbox_at(unsigned char *memory, unsigned at) { return *reinterpret_cast<Mailbox *>(memory + at); }
static void open_mailbox(unsigned mailbox) { mailbox_at(dynamic_shared, mailbox) = {1, 0, 0}; }
static void arrive(Mailbox &box, int reports, int bytes)
{
    box.missing -= reports;
    box.bytes += bytes;
    if (box.missing == 0 && box.bytes == 0)
        box.missing = 1, box.turn ^= 1;
}
static void announce(unsigned mailbox, int bytes) { arrive(mailbox_at(dynamic_shared, mailbox), 1, bytes); }
static unsigned char *in_block(int block, unsigned at) { return cluster_memory[static_cast<size_t>(block)] + at; }
static void post(unsigned char *to, unsigned char *mailbox, int reports, const float (&value)[4])
{
    Mail mail = {to, mailbox, reports, {}};
    std::memcpy(mail.value, value, sizeof value);
    mails.push_back(mail);
}
static void send(unsigned to, unsigned mailbox, int block, const float (&value)[4])
{
    post(in_block(block, to), in_block(block, mailbox), 0, value);
}
static void wait_for_mail(unsigned mailbox, int turn)
{
    current->mailbox = mailbox;
    current->mail_turn = turn;
    wait_at(&MAILBOX);
}

// -------------------------------------------------------------------------------------------------------- scheduling
template <class... Arguments, size_t... I>
static void apply(void (*kernel)(Arguments...), void **arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<std::remove_const_t<Arguments> *>(arguments[I])...);
}
static void (*body)(void **);
static void **body_arguments;
static void fiber_main()
{
    body(body_arguments);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}
static bool released(const Fiber &fiber, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; ++i)
        if (!fibers[i]->done && fibers[i]->waits_for != fiber.waits_for)
            return false;
    return true;
}
static bool released_alone(const Fiber &fiber)
{
    if (fiber.waits_for == &MAILBOX)
        return mailbox_at(fiber.memory, fiber.mailbox).turn != fiber.mail_turn;
    return fiber.waits_for == &CLUSTER_BARRIER && std::all_of(fibers.begin(), fibers.end(), [&](const auto &other) {
        return other->done || other->cluster_arrivals >= fiber.cluster_waits;
    });
}
// blocks of one cluster, their shared memory in `cluster_memory`; the first of them is `first`
static void run_cluster(Index first, unsigned threads)
{
    fibers.clear();
    for (unsigned i = 0; i < threads * cluster_memory.size(); ++i) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber &fiber = *fibers.back();
        fiber.index.x = i % threads;
        fiber.block = first;
        fiber.block.x += i / threads;
        fiber.first_of_block = i - i % threads;
        fiber.memory = cluster_memory[i / threads];
        fiber.stack = std::make_unique<char[]>(STACK_BYTES);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber.context, fiber_main, 0);
    }
    auto resume = [](Fiber &fiber) {
        current = &fiber;
        blockIdx = fiber.block;
        dynamic_shared = fiber.memory;
        fiber.waits_for = nullptr;
        swapcontext(&scheduler, &fiber.context);
    };
    for (auto &fiber : fibers)
        resume(*fiber);
    for (bool moved = true; moved;) {
        moved = false;
        for (size_t begin = 0; begin < fibers.size(); begin += WARP)
            if (fibers[begin]->waits_for == &WARP_BARRIER && released(*fibers[begin], begin, begin + WARP)) {
                for (size_t i = begin; i < begin + WARP; ++i)
                    resume(*fibers[i]);
                moved = true;
            }
        for (auto &fiber : fibers)
            if (!fiber->done && released_alone(*fiber)) {
                resume(*fiber);
                moved = true;
            }
        for (size_t begin = 0; !moved && begin < fibers.size(); begin += threads)
            if (fibers[begin]->waits_for == &BLOCK_BARRIER && released(*fibers[begin], begin, begin + threads)) {
                for (size_t i = begin; i < begin + threads; ++i)
                    resume(*fibers[i]);
                moved = true;
            }
        if (!moved && !mails.empty()) {
            for (const Mail &mail : mails) {
                if (mail.to)
                    std::memcpy(mail.to, mail.value, sizeof mail.value);
                if (mail.mailbox)
                    arrive(*reinterpret_cast<Mailbox *>(mail.mailbox), mail.reports, mail.to ? -16 : 0);
            }
            mails.clear();
            moved = true;
        }
    }
    for (auto &fiber : fibers)
        if (!fiber->done) {
            std::fprintf(stderr, "thread %u never ends: its warp or block does not wait with it\n", fiber->index.x);
            std::abort();
        }
}
#define EMULATED(kernel)                                                                                               \
    template <class... Arguments> static void call_##kernel(void (*f)(Arguments...), void **arguments)                 \
    {                                                                                                                  \
        apply(f, arguments, std::index_sequence_for<Arguments...>());                                                  \
    }                                                                                                                  \
    extern "C" void emulate_##kernel(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes,      \
                                     unsigned cluster, const unsigned *order, void **arguments)                        \
    {                                                                                                                  \
        std::vector<std::vector<unsigned char>> memories(cluster, std::vector<unsigned char>(shared_bytes + 128));     \
        cluster_memory.clear();                                                                                        \
        for (auto &memory : memories)                                                                                  \
            cluster_memory.push_back(memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128);  \
        gridDim.x = x, gridDim.y = y, gridDim.z = z;                                                                   \
        body = [](void **given) { call_##kernel(kernel, given); };                                                     \
        body_arguments = arguments;                                                                                    \
        for (unsigned i = 0; i < x * y * z / cluster; ++i) {                                                           \
            for (unsigned char *memory : cluster_memory)                                                               \
                std::memset(memory, 0xff, shared_bytes);                                                               \
            const unsigned first = order[i] * cluster;                                                                 \
            Index block;                                                                                               \
            block.x = first % x, block.y = first / x % y, block.z = first / x / y;                                     \
            run_cluster(block, threads);                                                                               \
        }                                                                                                              \
    }
