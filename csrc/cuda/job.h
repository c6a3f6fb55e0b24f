// What the loss kernels are told, and how a call is cut into threads, blocks and clusters.
#pragma once
#include <cstdint>

#include "../cpu/adjusted_ce.h"

namespace ltk {
namespace cuda {

// Which body serves. The codes are those of ltkernels/_cuda.py.
enum class Path : int {
    any = 0,
    registers = 1,  // a row stays in the registers of up to 512 threads
    cluster = 2,    // ... of up to 16 blocks of 512 threads
    memory = 3,     // a row is read twice, from any number of classes on
};

struct Plan {
    bool registers;
    int threads;  // of one row in one block: a power of two
    int block;    // threads: a multiple of 32 and of `threads`
    int cluster;  // blocks that share a row
};

// One call, for every kernel of the loss. The pointers are device pointers; ce.grad_scale and ce.smoothing_total are
// not used. `real` is as in adjusted_ce.h.
struct RowsJob {
    AdjustedCe ce;
    Reduction reduction;
    Plan plan;
    int64_t groups;           // of rows: one partial loss each
    int partials;             // of the denominator; 0 where the reduction divides by nothing
    double* denominators;     // (kMaxPartials,)
    unsigned* ticket;         // blocks that are done
    double* group_loss;       // (groups,)
    void* loss;               // (rows,) real, or one
    int64_t row_coef_stride;  // of ce.row_coef: 1, or 0 for one number
};

constexpr int kMaxPartials = 32;
constexpr int kMemoryBlock = 256;  // threads of a kernel that reads a row from memory: no registers to hold it

// Scratch in doubles: ticket, partial denominators, partial losses (at most one a row).
constexpr int64_t adjusted_ce_cuda_scratch(int64_t rows) noexcept {
    return 1 + kMaxPartials + rows;
}

// `held` vectors of `width` elements fit into a thread's registers; `largest_cluster` blocks can share a row.
inline Plan plan_rows(int width, int held, int64_t classes, bool aligned, Path path, int largest_cluster) noexcept {
    const int64_t vectors = (classes + (aligned ? 0 : width - 1) + width - 1) / width;
    Plan plan{true, 4, 128, 1};
    const auto fits = [&](int threads, int64_t each) { return static_cast<int64_t>(threads) * each >= vectors; };
    // Rows inside a warp use half of the registers: 4096 rows of 100 classes would not fill a large device otherwise.
    while (plan.threads < 32 && !fits(plan.threads, held / 2)) plan.threads *= 2;
    // Longer rows fill the registers first: fewer warps to combine, more 16-byte loads in flight a thread. Two or three
    // blocks of 256 threads find room on an SM, and one of them loads while another stores; of 512 threads there is
    // one.
    const bool clusters = path == Path::cluster || largest_cluster > 1;
    while (plan.threads < (clusters ? 256 : 512) && !fits(plan.threads, held)) plan.threads *= 2;
    // 128 threads a block hold 32 warps an SM even where an SM takes 16 blocks only (sm_75, sm_86 and sm_89).
    plan.block = plan.threads > 128 ? plan.threads : 128;
    if (clusters && (path == Path::cluster || !fits(plan.threads, held))) {
        plan.cluster = 2;
        plan.threads = plan.block;
        while (plan.cluster < 8 && !fits(plan.threads * plan.cluster, held)) plan.cluster *= 2;
        // Clusters of more than 8 blocks are not portable: longer blocks first.
        while (plan.threads < 512 && !fits(plan.threads * plan.cluster, held)) plan.threads *= 2;
        while (plan.cluster < 16 && !fits(plan.threads * plan.cluster, held)) plan.cluster *= 2;
        plan.block = plan.threads;
    }
    if (path == Path::memory || plan.cluster > largest_cluster || !fits(plan.threads * plan.cluster, held)) {
        plan.registers = false;
        plan.cluster = 1;
        if (plan.threads > kMemoryBlock) plan.threads = kMemoryBlock;
        if (plan.block > kMemoryBlock) plan.block = kMemoryBlock;
    }
    return plan;
}

}  // namespace cuda
}  // namespace ltk
