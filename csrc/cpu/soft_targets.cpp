#include "soft_targets.h"

#include <atomic>
#include <cmath>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace ltk {
namespace {

template <class Real>
int64_t run(SoftTargets& job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    AdjustedCe tables{};
    tables.classes = job.classes;
    tables.shift = job.shift;
    tables.scale = job.scale;
    tables.weight = job.weight;
    double denominator;
    const int64_t status = adjusted_ce_prepare(tables, sizeof(Real) == sizeof(double), reduction, &denominator);
    if (status != -1) return status;
    double weights = static_cast<double>(job.rows);
    if (job.row_weight != nullptr) {
        weights = 0.0;
        for (int64_t i = 0; i < job.rows; ++i) {
            const double own = static_cast<double>(static_cast<const Real*>(job.row_weight)[i]);
            if (!std::isfinite(own)) return -2 - kSampleWeight;
            weights += own;
        }
    }
    denominator = reduction == Reduction::mean         ? weights
                  : reduction == Reduction::batch_mean ? static_cast<double>(job.rows)
                                                       : 1.0;
    job.grad_scale = 1.0 / denominator;
    const int64_t bytes = job.rows * job.classes * static_cast<int64_t>(sizeof(Real));
    job.stream = bytes > kStreamBytes && job.grad != nullptr;
    if (job.stream) prefer_huge_pages(job.grad, bytes);

    const SoftTargetRows rows = kernels().soft_targets[dtype];
    std::atomic<int64_t> bad{job.rows};  // the first row, whichever thread comes upon another before
    parallel_rows(job.rows, rows_a_block(job.classes), threads, [&](int64_t begin, int64_t end, int worker) {
        Real* own = static_cast<Real*>(scratch) + worker * adjusted_ce_scratch(job.classes);
        const int64_t row = rows(job, begin, end, own);
        int64_t first = bad.load(std::memory_order_relaxed);
        while (row >= 0 && row < first && !bad.compare_exchange_weak(first, row)) {
        }
    });
    if (bad < job.rows) return bad;
    if (reduction != Reduction::none)
        *static_cast<Real*>(loss) = static_cast<Real>(sum_of<Real>(job.row_loss, job.rows) / denominator);
    return -1;
}

}  // namespace

int64_t soft_targets(SoftTargets job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    if (static_cast<DType>(dtype) == DType::f64) return run<double>(job, dtype, reduction, loss, scratch, threads);
    return run<float>(job, dtype, reduction, loss, scratch, threads);
}

}  // namespace ltk
