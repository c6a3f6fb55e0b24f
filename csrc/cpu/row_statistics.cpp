#include "row_statistics.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {
namespace {

// As the fused loss: some microseconds of work a block. A part may have no classes: its statistics are those of a row
// that is masked whole.
int64_t block_rows(const ClassPart& job) noexcept {
    if (job.classes == 0) return job.rows > 0 ? job.rows : 1;
    return job.classes >= 16384 ? 1 : 16384 / job.classes;
}

}  // namespace

void row_statistics(const ClassPart& job, int dtype, bool smooth, double* out, int threads) noexcept {
    struct Context {
        const ClassPart& job;
        RowStatisticsRows rows;
        bool smooth;
        int64_t block;
        double* out;
    } context{job, kernels().row_statistics[dtype], smooth, block_rows(job), out};
    parallel_blocks((job.rows + context.block - 1) / context.block, threads,
                    [](void* c, int64_t index, int) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = index * x.block;
                        const int64_t end = begin + x.block < x.job.rows ? begin + x.block : x.job.rows;
                        x.rows(x.job, x.smooth, begin, end, x.out);
                    },
                    &context);
}

void row_maxima(const ClassPart& job, int dtype, double* out, int64_t* index, int threads) noexcept {
    struct Context {
        const ClassPart& job;
        MaximaRows rows;
        int64_t block;
        double* out;
        int64_t* index;
    } context{job, kernels().row_maxima[dtype], block_rows(job), out, index};
    parallel_blocks((job.rows + context.block - 1) / context.block, threads,
                    [](void* c, int64_t at, int) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = at * x.block;
                        const int64_t end = begin + x.block < x.job.rows ? begin + x.block : x.job.rows;
                        x.rows(x.job, begin, end, x.out, x.index);
                    },
                    &context);
}

void gradient_from_statistics(const ClassPart& job, int dtype, const double* row, void* grad, int64_t grad_stride,
                              int threads) noexcept {
    struct Context {
        const ClassPart& job;
        GradientRows rows;
        int64_t block;
        const double* row;
        void* grad;
        int64_t grad_stride;
    } context{job, kernels().gradient_from_statistics[dtype], block_rows(job), row, grad, grad_stride};
    parallel_blocks((job.rows + context.block - 1) / context.block, threads,
                    [](void* c, int64_t index, int) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = index * x.block;
                        const int64_t end = begin + x.block < x.job.rows ? begin + x.block : x.job.rows;
                        x.rows(x.job, x.row, begin, end, x.grad, x.grad_stride);
                    },
                    &context);
}

}  // namespace ltk
