#include "row_logsumexp.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {
namespace {

// Some microseconds of work a block.
int64_t block_rows(int64_t columns) noexcept {
    return columns >= 16384 ? 1 : 16384 / (columns + 1) + 1;
}

}  // namespace

void row_logsumexp(const RowLogsumexp& job, int dtype, int threads) noexcept {
    struct Context {
        const RowLogsumexp& job;
        RowLogsumexpRows rows;
        int64_t block;
    } context{job, kernels().row_logsumexp[dtype], block_rows(job.columns)};
    parallel_blocks((job.rows + context.block - 1) / context.block, threads,
                    [](void* c, int64_t index, int) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = index * x.block;
                        const int64_t end = begin + x.block < x.job.rows ? begin + x.block : x.job.rows;
                        x.rows(x.job, begin, end);
                    },
                    &context);
}

void symmetric_rows(const SymmetricRows& job, int dtype, int threads) noexcept {
    struct Context {
        const SymmetricRows& job;
        SymmetricRowsRows rows;
        int64_t block;
    } context{job, kernels().symmetric_rows[dtype], block_rows(job.columns)};
    parallel_blocks((job.rows + context.block - 1) / context.block, threads,
                    [](void* c, int64_t index, int) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = index * x.block;
                        const int64_t end = begin + x.block < x.job.rows ? begin + x.block : x.job.rows;
                        x.rows(x.job, begin, end);
                    },
                    &context);
}

}  // namespace ltk
