// The CUDA C++ of smbench_kernels on a processor: what kernels see of it, the functions of cuda_primitives.py and of
// lora_primitives.py and the built-ins that they use. Each CUDA thread is a fiber; a collective makes a fiber wait for
// its warp. cuda_emulation.cpp, which is compiled once for all kernels, does the work, so that a kernel is compiled in
// a moment: no heavy header belongs here. <cmath> is one, and declares an __expf of its own: it may only come before.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

typedef unsigned short element;
constexpr int WARP = 32;
#if BFLOAT16
constexpr bool ELEMENTS_ARE_BFLOAT16 = true;
#else
constexpr bool ELEMENTS_ARE_BFLOAT16 = false;
#endif
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x = 0, y = 0, z = 0; };
struct Thread {
    Index index;
    unsigned published[8] = {};
};
extern Thread *current;
extern Index blockIdx, gridDim;
extern unsigned char *dynamic_shared;
#define threadIdx (current->index)

// ----------------------------------------------------------------------------------------------------------- built-ins
extern "C" {
float expf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float sqrtf(float) noexcept;
float tanhf(float) noexcept;
}
int lane();
void wait_at(const void *place);
void __syncwarp();
void __syncthreads();
inline void __threadfence() {}
const unsigned *published_of(int lane);
template <class T> static void publish(int slot, T value) { std::memcpy(&current->published[slot], &value, sizeof value); }
template <class T> static T read_of(int other, int slot)
{
    T value;
    std::memcpy(&value, published_of(other) + slot, sizeof value);
    return value;
}
// all lanes have published before any reads, all have read before any publishes again
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
int __reduce_add_sync(unsigned, int value);
int __reduce_max_sync(unsigned, int value);
int __any_sync(unsigned, int value);
unsigned __ballot_sync(unsigned, int value);
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int *at, int by) { int old = *at; *at += by; return old; }
#define __expf expf
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }

// -------------------------------------------------------------------------------------------------- cuda_primitives.py
inline unsigned as_bits(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
float widened(element value);
element narrowed(float value);
inline unsigned packed(float low, float high) { return narrowed(low) | static_cast<unsigned>(narrowed(high)) << 16; }
float power_of_2(float exponent);
unsigned shared_address(const void *at);
void copy_16(unsigned to, const void *from, bool real);
void copy_4(unsigned to, const void *from, bool real);
void commit();
void wait_for_copies_but(size_t newest);
template <int N> static void wait_but() { wait_for_copies_but(N); }
int load_shared(unsigned from);
inline float load_past_l1(const float *from) { return *from; }
inline void load_past_l1(float &first, float &second, const float *from) { first = from[0]; second = from[1]; }
void load_matrices(unsigned (&to)[4], unsigned from);
void load_transposed(unsigned (&to)[4], unsigned from);
unsigned transposed(unsigned matrix);
void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
// what the hardware does not take unless it is at a multiple of its size
template <class T> static void must_be_aligned(const T *at, size_t bytes)
{
    if (reinterpret_cast<uintptr_t>(at) % bytes)
        std::abort();
}
template <int N> struct Vector { element value[N]; };
template <int N> static Vector<N> loaded(const element *at)
{
    Vector<N> found;
    must_be_aligned(at, sizeof found);
    std::memcpy(&found, at, sizeof found);
    return found;
}

// -------------------------------------------------------------------------------------------------- lora_primitives.py
template <int N> static void load_words(unsigned (&to)[N], const element *at, bool real)
{
    if (real)
        must_be_aligned(at, sizeof to);
    real ? std::memcpy(to, at, sizeof to) : std::memset(to, 0, sizeof to);
}
inline unsigned load_element(const element *at, bool real) { return real ? *at : 0; }
template <int N> static void load_recent_words(unsigned (&to)[N], const element *at, bool real) { load_words(to, at, real); }
inline unsigned load_recent_element(const element *at, bool real) { return real ? *at : 0; }
template <class T> static void load_recent(T (&to)[4], const T *at)
{
    must_be_aligned(at, sizeof to);
    std::memcpy(to, at, sizeof to);
}
inline int load_recent(const int *at) { return *at; }
inline void wait_for_previous() {}
inline void let_next_start() {}
void cluster_arrive();
void cluster_wait();
void cluster_meet();
void open_mailbox(unsigned mailbox);
void announce(unsigned mailbox, int bytes);
void send(unsigned to, unsigned mailbox, int block, const float (&value)[4]);
void wait_for_mail(unsigned mailbox, int turn);

// --------------------------------------------------------------------------------------------------------------- entry
/* all blocks of a grid, cluster by cluster in the order given */
void run_grid(void (*kernel)(void **), bool bfloat16, Index grid, unsigned threads, unsigned shared_bytes,
              unsigned cluster, const unsigned *order, void **arguments);
template <class... Arguments, size_t... I>
static void apply(void (*kernel)(Arguments...), void **arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<std::remove_const_t<Arguments> *>(arguments[I])...);
}
template <class... Arguments> static void call(void (*kernel)(Arguments...), void **arguments)
{
    apply(kernel, arguments, std::index_sequence_for<Arguments...>());
}
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define EMULATED(kernel)                                                                                               \
    EXPORTED void emulate_##kernel(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes,        \
                                   unsigned cluster, const unsigned *order, void **arguments)                          \
    {                                                                                                                  \
        run_grid([](void **given) { call(kernel, given); }, ELEMENTS_ARE_BFLOAT16, {x, y, z}, threads, shared_bytes,   \
                 cluster, order, arguments);                                                                           \
    }
