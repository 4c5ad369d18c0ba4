// Fibers, which the emulations of all cards run CUDA threads by: a thread waits at a place until the scheduler of its
// card resumes it. Not for kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <deque>
#include <memory>
#include <ucontext.h>
#include <vector>

#include "cuda_emulation.hpp"

struct Copy { void *to; const void *from; int bytes, real; };
struct Fiber : Thread {
    ucontext_t context;
    jmp_buf resumes_at;
    std::unique_ptr<char[]> stack;
    Index block;
    unsigned char *memory = nullptr;
    size_t first_of_block = 0;
    bool started = false, done = false;
    const void *waits_for = nullptr;
    unsigned mailbox = 0;
    int mail_turn = 0;
    int cluster_arrivals = 0, cluster_waits = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
/* all threads of the blocks that run now, block by block */
extern std::vector<Fiber *> fibers;
inline Fiber &running() { return *static_cast<Fiber *>(current); }
extern const char WARP_BARRIER, BLOCK_BARRIER;

/* `kernel` for the threads of so many blocks, the first of which is `first`; nothing has run yet */
void make_fibers(Index first, unsigned threads, unsigned blocks);
void set_kernel(void (*kernel)(void **), bool bfloat16, void **arguments);
/* until the fiber waits again or ends */
void resume(Fiber &fiber);
/* whether all fibers of a range that have not ended wait where this one does */
bool released(const Fiber &fiber, size_t begin, size_t end);
/* ends the process where a fiber has not come to its end */
void check_all_ended(const char *why);
