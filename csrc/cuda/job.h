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
    cluster = 2,    // ... of up to 16 such blocks
    memory = 3,     // a row is read twice, from any number of classes on
};

constexpr int log2_of(int power) noexcept {
    return power > 1 ? 1 + log2_of(power / 2) : 0;
}

struct Plan {
    bool registers;
    int threads;  // of one row in one block: a power of two
    int block;    // threads: a multiple of 32 and of `threads`
    int cluster;  // blocks that share a row
    int threads_log2, cluster_log2;
};

// A table that is read along with the logits, in vectors of 16 bytes. Rows whose vectors begin at any column find a
// copy for each distance to a 16-byte boundary: column 0 of copy p lies p elements behind one.
struct Table {
    const void* source;  // (classes,) real, or null
    void* copies;        // null: the table itself will do for all rows
    int64_t step;        // elements from a copy's column 0 to the next one's
};

// One call, for every kernel of the loss. The pointers are device pointers; ce.grad_scale and ce.smoothing_total are
// not used. `real` is as in adjusted_ce.h.
struct RowsJob {
    AdjustedCe ce;
    Reduction reduction;
    Plan plan;
    Table scale, shift, weight;  // shift: of the sigmoid loss, the factors of the negatives
    int copied;                  // tables with copies
    int64_t groups;              // of rows: one partial loss each
    int partials;                // of the denominator; 0 where the reduction divides by nothing
    double* denominators;        // (kMaxPartials,)
    unsigned* ticket;            // blocks that are done
    double* group_loss;          // (groups,)
    void* loss;                  // (rows,) real, or one
    int64_t row_coef_stride;     // of ce.row_coef: 1, or 0 for one number
};

constexpr int kMaxPartials = 32;
constexpr int kPartialRows = 512;  // rows of one partial denominator, as long as there are few enough
constexpr int kMemoryBlock = 256;  // threads of a kernel that reads a row from memory: no registers to hold it

// Elements between copies of a table, whole vectors: 4 of float or 2 of double, which take as many bytes.
constexpr int64_t table_pitch(int64_t classes) noexcept {
    return (classes + 7) / 4 * 4;
}
constexpr int64_t table_doubles(int64_t classes) noexcept {
    return 2 * table_pitch(classes);
}
// Scratch in doubles: ticket (and what keeps the copies on a 16-byte boundary), copies of `tables` tables, partial
// denominators, partial losses (at most one a row).
constexpr int64_t adjusted_ce_cuda_scratch(int64_t rows, int64_t classes, int tables) noexcept {
    return 2 + tables * table_doubles(classes) + kMaxPartials + rows;
}

// The largest power of two, up to `width`, that divides x.
inline int64_t granule_of(int64_t x, int64_t width) noexcept {
    while (width > 1 && x % width != 0) width /= 2;
    return width;
}

// What a thread can hold: `held` vectors of `width` logits, `ends` logits of those in front of a row's first vector and
// behind its last. Rows begin at multiples of `granule` elements from a 16-byte boundary.
struct Room {
    int width, held, ends, cluster_block;
};
inline Plan plan_rows(const Room& room, int64_t classes, int64_t granule, Path path, int largest_cluster) noexcept {
    const int64_t vectors = classes / room.width;
    const int64_t ends = 2 * room.width - granule - granule_of(classes, granule);
    Plan plan{true, 4, 128, 1, 0, 0};
    const auto fits = [&](int64_t threads) { return threads * room.held >= vectors && threads * room.ends >= ends; };
    const bool clusters = path == Path::cluster || largest_cluster > 1;
    // Small blocks: several find room on an SM, and one of them loads while another computes and a third stores.
    while (plan.threads < (clusters ? room.cluster_block : 512) && !fits(plan.threads)) plan.threads *= 2;
    // 128 threads a block hold 32 warps an SM even where an SM takes 16 blocks only (sm_75, sm_86 and sm_89).
    plan.block = plan.threads > 128 ? plan.threads : 128;
    if (clusters && (path == Path::cluster || !fits(plan.threads))) {
        plan.cluster = 2;
        plan.threads = room.cluster_block;
        while (plan.cluster < largest_cluster && !fits(plan.threads * plan.cluster)) plan.cluster *= 2;
        while (plan.threads < 512 && !fits(plan.threads * plan.cluster)) plan.threads *= 2;
        plan.block = plan.threads;
    }
    if (path == Path::memory || plan.cluster > largest_cluster || !fits(plan.threads * plan.cluster)) {
        plan.registers = false;
        plan.cluster = 1;
        if (plan.threads > kMemoryBlock) plan.threads = kMemoryBlock;
        if (plan.block > kMemoryBlock) plan.block = kMemoryBlock;
    }
    plan.threads_log2 = log2_of(plan.threads);
    plan.cluster_log2 = log2_of(plan.cluster);
    return plan;
}

}  // namespace cuda
}  // namespace ltk
