// Runs kernels in CUDA C++ on a processor, one thread block or one cluster of them at a time.
// Asynchronous copies arrive when they are waited for and not before, and their destination is garbage in between, so
// that a missing wait or an early overwrite shows; what one block sends to another arrives as late as it can. What it
// cannot show: data races between thread blocks.
#include "cuda_emulation_fibers.hpp"

Thread *current;
Index blockIdx, gridDim;
unsigned char *dynamic_shared;
std::vector<Fiber *> fibers;
const char WARP_BARRIER = 0, BLOCK_BARRIER = 0;
namespace {
constexpr size_t STACK_BYTES = 256 << 10;
const char CLUSTER_BARRIER = 0, MAILBOX = 0;
std::vector<std::unique_ptr<Fiber>> pool;
ucontext_t outside;
jmp_buf scheduler;
void (*body)(void **);
void **body_arguments;
bool bfloat16;

// a context is entered once; from then on jumps without system calls change between it and the scheduler
[[gnu::noinline]] void leave(Fiber &fiber)
{
    if (!_setjmp(fiber.resumes_at))
        _longjmp(scheduler, 1);
}
void fiber_main()
{
    for (;;) {
        body(body_arguments);
        running().done = true;
        leave(running());
    }
}
} // namespace

// -------------------------------------------------------------------------------------------------------------- fibers
void set_kernel(void (*kernel)(void **), bool of_bfloat16, void **arguments)
{
    body = kernel, body_arguments = arguments, bfloat16 = of_bfloat16;
}
void make_fibers(Index first, unsigned threads, unsigned blocks)
{
    fibers.clear();
    for (unsigned i = 0; i < threads * blocks; ++i) {
        if (i == pool.size()) {
            pool.push_back(std::make_unique<Fiber>());
            // not filled, which would take longer than most kernels
            pool.back()->stack.reset(new char[STACK_BYTES]);
        }
        Fiber &fiber = *pool[i];
        fiber.index.x = i % threads;
        fiber.block = first;
        fiber.block.x += i / threads;
        fiber.first_of_block = i - i % threads;
        fiber.done = false, fiber.waits_for = nullptr;
        fiber.cluster_arrivals = fiber.cluster_waits = 0;
        fiber.open.clear(), fiber.groups.clear();
        std::memset(fiber.published, 0, sizeof fiber.published);
        fibers.push_back(&fiber);
    }
}
[[gnu::noinline]] void resume(Fiber &fiber)
{
    current = &fiber;
    blockIdx = fiber.block;
    fiber.waits_for = nullptr;
    if (_setjmp(scheduler))
        return;
    if (fiber.started)
        _longjmp(fiber.resumes_at, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, fiber_main, 0);
    swapcontext(&outside, &fiber.context);
}
bool released(const Fiber &fiber, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; ++i)
        if (!fibers[i]->done && fibers[i]->waits_for != fiber.waits_for)
            return false;
    return true;
}
void check_all_ended(const char *why)
{
    for (Fiber *fiber : fibers)
        if (!fiber->done) {
            std::fprintf(stderr, "thread %u never ends: %s\n", fiber->index.x, why);
            std::abort();
        }
}

// ----------------------------------------------------------------------------------------------------------- built-ins
int lane() { return static_cast<int>(current->index.x) % WARP; }
const unsigned *published_of(int lane)
{
    return fibers[running().first_of_block + current->index.x / WARP * WARP + static_cast<unsigned>(lane)]->published;
}
void wait_at(const void *place)
{
    running().waits_for = place;
    leave(running());
}
void __syncwarp() { wait_at(&WARP_BARRIER); }
void __syncthreads() { wait_at(&BLOCK_BARRIER); }
template <class Fold> static int fold_lanes(int value, Fold fold)
{
    return collective(value, [=] {
        int found = read_of<int>(0, 0);
        for (int other = 1; other < WARP; ++other)
            found = fold(found, read_of<int>(other, 0));
        return found;
    });
}
int __reduce_add_sync(unsigned, int value) { return fold_lanes(value, [](int a, int b) { return a + b; }); }
int __reduce_max_sync(unsigned, int value) { return fold_lanes(value, [](int a, int b) { return max(a, b); }); }
int __any_sync(unsigned, int value) { return fold_lanes(value != 0, [](int a, int b) { return a | b; }); }
unsigned __ballot_sync(unsigned, int value)
{
    return static_cast<unsigned>(fold_lanes(static_cast<int>((value != 0 ? 1u : 0u) << lane()), [](int a, int b) { return a | b; }));
}

// -------------------------------------------------------------------------------------------------- cuda_primitives.py
// a float with the same bits has an exponent that is 112 less, subnormal numbers among them
float widened(element value)
{
    if (bfloat16)
        return __uint_as_float(static_cast<unsigned>(value) << 16);
    const unsigned size = value & 0x7fffu, sign = (value & 0x8000u) << 16;
    if (size >= 0x7c00)
        return size > 0x7c00 ? NAN : sign ? -INFINITY : INFINITY;
    const float found = __uint_as_float(size << 13) * 0x1p112f;
    return sign ? -found : found;
}
element narrowed(float value)
{
    const unsigned bits = as_bits(value);
    if (std::isnan(value))
        return 0x7fff;
    if (bfloat16)
        return static_cast<element>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    const element sign = static_cast<element>(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (size >= 65520.f)
        return sign | 0x7c00;
    int exponent = 0;
    std::frexp(size, &exponent);
    // the spacing of numbers of this size; nearbyint rounds ties to even
    const int step = max(exponent - 11, -24);
    const float rounded = std::ldexp(std::nearbyint(std::ldexp(size, -step)), step);
    return static_cast<element>(sign | as_bits(rounded * 0x1p-112f) >> 13);
}
float power_of_2(float exponent) { return std::exp2(exponent); }
unsigned shared_address(const void *at) { return static_cast<unsigned>(static_cast<const unsigned char *>(at) - dynamic_shared); }
static void copy_later(unsigned to, const void *from, int bytes, bool real)
{
    std::memset(dynamic_shared + to, 0xff, static_cast<size_t>(bytes));
    running().open.push_back({dynamic_shared + to, from, bytes, real});
}
void copy_16(unsigned to, const void *from, bool real) { copy_later(to, from, 16, real); }
void copy_4(unsigned to, const void *from, bool real) { copy_later(to, from, 4, real); }
void commit()
{
    running().groups.push_back(std::move(running().open));
    running().open.clear();
}
void wait_for_copies_but(size_t newest)
{
    auto &groups = running().groups;
    for (; groups.size() > newest; groups.pop_front())
        for (const Copy &copy : groups.front())
            copy.real ? std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes)) : std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    __syncwarp();
}
int load_shared(unsigned from) { int found; std::memcpy(&found, dynamic_shared + from, 4); return found; }
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
void load_matrices(unsigned (&to)[4], unsigned from) { load_8x8(to, from, false); }
void load_transposed(unsigned (&to)[4], unsigned from) { load_8x8(to, from, true); }
static element half_of(unsigned bits, int half) { return static_cast<element>(bits >> 16 * half); }
unsigned transposed(unsigned matrix)
{
    return collective(matrix, [] {
        const int row = lane() / 4, column = lane() % 4 * 2;
        unsigned halves[2];
        for (int half = 0; half < 2; ++half)
            halves[half] = half_of(read_of<unsigned>((column + half) * 4 + row / 2, 0), row % 2);
        return halves[0] | halves[1] << 16;
    });
}
void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
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

// -------------------------------------------------------------------------------------------------- lora_primitives.py
namespace {
struct Mail { unsigned char *to, *mailbox; float value[4]; };
struct Mailbox { short missing, turn; int bytes; };
std::vector<unsigned char *> cluster_memory;
std::vector<Mail> mails;
Mailbox &mailbox_at(unsigned char *memory, unsigned at) { return *reinterpret_cast<Mailbox *>(memory + at); }
void report(Mailbox &box, int reports, int bytes)
{
    box.missing -= reports;
    box.bytes += bytes;
    if (box.missing == 0 && box.bytes == 0)
        box.missing = 1, box.turn ^= 1;
}
void deliver()
{
    for (const Mail &mail : mails) {
        std::memcpy(mail.to, mail.value, sizeof mail.value);
        report(*reinterpret_cast<Mailbox *>(mail.mailbox), 0, -16);
    }
    mails.clear();
}
} // namespace
void cluster_arrive() { ++running().cluster_arrivals; }
void cluster_wait()
{
    ++running().cluster_waits;
    wait_at(&CLUSTER_BARRIER);
}
void cluster_meet()
{
    cluster_arrive();
    cluster_wait();
}
void open_mailbox(unsigned mailbox) { mailbox_at(dynamic_shared, mailbox) = {1, 0, 0}; }
void announce(unsigned mailbox, int bytes) { report(mailbox_at(dynamic_shared, mailbox), 1, bytes); }
void send(unsigned to, unsigned mailbox, int block, const float (&value)[4])
{
    unsigned char *memory = cluster_memory[static_cast<size_t>(block)];
    Mail mail = {memory + to, memory + mailbox, {}};
    std::memcpy(mail.value, value, sizeof value);
    mails.push_back(mail);
}
void wait_for_mail(unsigned mailbox, int turn)
{
    running().mailbox = mailbox;
    running().mail_turn = turn;
    wait_at(&MAILBOX);
}

// ---------------------------------------------------------------------------------------------------------- scheduling
static bool released_alone(const Fiber &fiber)
{
    if (fiber.waits_for == &MAILBOX)
        return mailbox_at(fiber.memory, fiber.mailbox).turn != fiber.mail_turn;
    return fiber.waits_for == &CLUSTER_BARRIER && std::all_of(fibers.begin(), fibers.end(), [&](const Fiber *other) {
        return other->done || other->cluster_arrivals >= fiber.cluster_waits;
    });
}
// blocks of one cluster, their shared memory in `cluster_memory`; the first of them is `first`
static void run_cluster(Index first, unsigned threads)
{
    make_fibers(first, threads, static_cast<unsigned>(cluster_memory.size()));
    for (size_t i = 0; i < fibers.size(); ++i)
        fibers[i]->memory = cluster_memory[i / threads];
    auto advance = [](Fiber &fiber) {
        dynamic_shared = fiber.memory;
        if (!fiber.done)
            resume(fiber);
    };
    for (Fiber *fiber : fibers)
        advance(*fiber);
    for (bool moved = true; moved;) {
        moved = false;
        for (size_t begin = 0; begin < fibers.size(); begin += WARP)
            if (fibers[begin]->waits_for == &WARP_BARRIER && released(*fibers[begin], begin, begin + WARP)) {
                for (size_t i = begin; i < begin + WARP; ++i)
                    advance(*fibers[i]);
                moved = true;
            }
        for (Fiber *fiber : fibers)
            if (!fiber->done && released_alone(*fiber)) {
                advance(*fiber);
                moved = true;
            }
        for (size_t begin = 0; !moved && begin < fibers.size(); begin += threads)
            if (fibers[begin]->waits_for == &BLOCK_BARRIER && released(*fibers[begin], begin, begin + threads)) {
                for (size_t i = begin; i < begin + threads; ++i)
                    advance(*fibers[i]);
                moved = true;
            }
        if (!moved && !mails.empty()) {
            deliver();
            moved = true;
        }
    }
    check_all_ended("its warp or block does not wait with it");
}
void run_grid(void (*kernel)(void **), bool of_bfloat16, Index grid, unsigned threads, unsigned shared_bytes,
              unsigned cluster, const unsigned *order, void **arguments)
{
    std::vector<std::vector<unsigned char>> memories(cluster, std::vector<unsigned char>(shared_bytes + 128));
    cluster_memory.clear();
    for (auto &memory : memories)
        cluster_memory.push_back(memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128);
    gridDim = grid;
    set_kernel(kernel, of_bfloat16, arguments);
    for (unsigned i = 0; i < grid.x * grid.y * grid.z / cluster; ++i) {
        for (unsigned char *memory : cluster_memory)
            std::memset(memory, 0xff, shared_bytes);
        const unsigned first = order[i] * cluster;
        run_cluster({first % grid.x, first / grid.x % grid.y, first / grid.x / grid.y}, threads);
    }
}
