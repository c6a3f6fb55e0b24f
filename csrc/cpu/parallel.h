// The only threads of the CPU part. Work is cut into blocks whose size depends on the shape alone, never on the number
// of threads, so that 1 and 64 threads give the same bits.
#pragma once
#include <cstdint>

namespace ltk {

// Calls body(context, block, worker) for block = 0 .. blocks-1, on at most `threads` threads; 0 <= worker < threads.
// Runs serially in a forked child: OpenMP's pool does not survive fork(), and a parallel region there hangs.
void parallel_blocks(int64_t blocks, int threads, void (*body)(void* context, int64_t block, int worker) noexcept,
                     void* context) noexcept;

// Calls f(begin, end, worker) for the parts of `block` rows that [0, rows) is cut into.
template <class F>
void parallel_rows(int64_t rows, int64_t block, int threads, F f) noexcept {
    struct Context {
        F& f;
        int64_t rows, block;
    } context{f, rows, block};
    parallel_blocks((rows + block - 1) / block, threads,
                    [](void* c, int64_t index, int worker) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = index * x.block;
                        x.f(begin, begin + x.block < x.rows ? begin + x.block : x.rows, worker);
                    },
                    &context);
}

// Rows a block where a row is a pass over `columns` numbers: 16 384 of them are some microseconds of work, and less
// would not pay for waking a thread.
inline int64_t rows_a_block(int64_t columns) noexcept {
    return columns >= 16384 ? 1 : 16384 / (columns > 0 ? columns : 1);
}

// In order and in double: the same bits for any number of threads.
template <class Real>
double sum_of(const void* rows, int64_t count) noexcept {
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(static_cast<const Real*>(rows)[i]);
    return total;
}

}  // namespace ltk
