// The only threads of the CPU part. Work is cut into blocks whose size depends on the shape alone, never on the number
// of threads, so that 1 and 64 threads give the same bits.
#pragma once
#include <cstdint>

namespace ltk {

// Calls body(context, block, worker) for block = 0 .. blocks-1, on at most `threads` threads; 0 <= worker < threads.
// Runs serially in a forked child: OpenMP's pool does not survive fork(), and a parallel region there hangs.
void parallel_blocks(int64_t blocks, int threads, void (*body)(void* context, int64_t block, int worker) noexcept,
                     void* context) noexcept;

}  // namespace ltk
