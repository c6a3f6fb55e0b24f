#include "row_logsumexp.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {

void row_logsumexp(const RowLogsumexp& job, int dtype, int threads) noexcept {
    const RowLogsumexpRows rows = kernels().row_logsumexp[dtype];
    parallel_rows(job.rows, rows_a_block(job.columns), threads,
                  [&](int64_t begin, int64_t end, int) { rows(job, begin, end); });
}

}  // namespace ltk
