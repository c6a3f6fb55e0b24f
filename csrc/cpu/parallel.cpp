#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace ltk {
namespace {

std::atomic<bool> forked_child{false};

struct ForkGuard {
    ForkGuard() {
        pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });
    }
} fork_guard;

}  // namespace

void parallel_blocks(int64_t blocks, int threads, void (*body)(void*, int64_t, int) noexcept, void* context) noexcept {
    if (threads > blocks) threads = static_cast<int>(blocks);
    if (threads <= 1 || forked_child.load(std::memory_order_relaxed) || omp_in_parallel()) {
        for (int64_t block = 0; block < blocks; ++block) body(context, block, 0);
        return;
    }
    // Dynamic: another process may own one of the cores. Which worker takes a block does not change the result.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) body(context, block, omp_get_thread_num());
}

}  // namespace ltk
