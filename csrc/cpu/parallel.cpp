#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

// libgomp is not built with ThreadSanitizer, which therefore sees neither the start nor the end of a parallel region
// and would call every buffer that passes them a race. These tell it of the two, and of nothing else; the region's own
// variables, which the compiler passes on in between, are not looked at.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#define LTK_ACQUIRE(where) __tsan_acquire(where)
#define LTK_RELEASE(where) __tsan_release(where)
#define LTK_NOT_LOOKED_AT __attribute__((no_sanitize("thread")))
#else
#define LTK_ACQUIRE(where) ((void)(where))
#define LTK_RELEASE(where) ((void)(where))
#define LTK_NOT_LOOKED_AT
#endif

namespace ltk {
namespace {

std::atomic<bool> forked_child{false};

struct ForkGuard {
    ForkGuard() {
        pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });
    }
} fork_guard;

}  // namespace

LTK_NOT_LOOKED_AT
void parallel_blocks(int64_t blocks, int threads, void (*body)(void*, int64_t, int) noexcept, void* context) noexcept {
    if (threads > blocks) threads = static_cast<int>(blocks);
    if (threads <= 1 || forked_child.load(std::memory_order_relaxed) || omp_in_parallel()) {
        for (int64_t block = 0; block < blocks; ++block) body(context, block, 0);
        return;
    }
    // Dynamic: another process may own one of the cores. Which worker takes a block does not change the result.
    char begin, end;  // their addresses name the two events
    LTK_RELEASE(&begin);
#pragma omp parallel num_threads(threads)
    {
        LTK_ACQUIRE(&begin);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t block = 0; block < blocks; ++block) body(context, block, omp_get_thread_num());
        LTK_RELEASE(&end);
    }
    LTK_ACQUIRE(&end);
}

}  // namespace ltk
