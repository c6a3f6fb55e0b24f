#include "row_statistics.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {

// A part may have no classes: its statistics are those of a row that is masked whole.
void row_statistics(const ClassPart& job, int dtype, bool smooth, double* out, int threads) noexcept {
    const RowStatisticsRows rows = kernels().row_statistics[dtype];
    parallel_rows(job.rows, rows_a_block(job.classes), threads,
                  [&](int64_t begin, int64_t end, int) { rows(job, smooth, begin, end, out); });
}

void row_maxima(const ClassPart& job, int dtype, double* out, int64_t* index, int threads) noexcept {
    const MaximaRows rows = kernels().row_maxima[dtype];
    parallel_rows(job.rows, rows_a_block(job.classes), threads,
                  [&](int64_t begin, int64_t end, int) { rows(job, begin, end, out, index); });
}

void gradient_from_statistics(const ClassPart& job, int dtype, const double* row, void* grad, int64_t grad_stride,
                              int threads) noexcept {
    const GradientRows rows = kernels().gradient_from_statistics[dtype];
    parallel_rows(job.rows, rows_a_block(job.classes), threads,
                  [&](int64_t begin, int64_t end, int) { rows(job, row, begin, end, grad, grad_stride); });
}

}  // namespace ltk
