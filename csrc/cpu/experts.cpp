#include "experts.h"

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace ltk {
namespace {

template <class Real>
int64_t run(Experts& job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    const bool wide = sizeof(Real) == sizeof(double);
    const int64_t rows = job.joint.rows, classes = job.joint.classes;
    double denominator[kExperts + 1];
    for (int e = 0; e <= job.experts; ++e) {
        AdjustedCe& each = e < job.experts ? job.expert[e] : job.joint;
        const int64_t status = adjusted_ce_prepare(each, wide, reduction, &denominator[e]);
        if (status >= 0) return status;
        if (status != -1) return status - (kSampleWeight + 1) * e;
        each.grad_scale *= job.factor[e];
    }
    const int64_t bytes = rows * classes * static_cast<int64_t>(sizeof(Real));
    for (int e = 0; e < job.experts; ++e) {
        AdjustedCe& each = job.expert[e];
        each.stream = bytes > kStreamBytes && each.grad != nullptr;
        if (each.stream) prefer_huge_pages(each.grad, bytes);
    }

    const ExpertRows kernel = kernels().experts[dtype];
    parallel_rows(rows, rows_a_block(classes), threads, [&](int64_t begin, int64_t end, int worker) {
        kernel(job, begin, end, static_cast<Real*>(scratch) + worker * experts_scratch(job.experts, classes));
    });
    if (reduction == Reduction::none) return -1;
    double total = 0.0;
    for (int e = 0; e <= job.experts; ++e)
        total += sum_of<Real>(static_cast<const Real*>(job.row_loss) + e * rows, rows) / denominator[e];
    *static_cast<Real*>(loss) = static_cast<Real>(total);
    return -1;
}

}  // namespace

int64_t experts_ce(Experts job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    if (static_cast<DType>(dtype) == DType::f64) return run<double>(job, dtype, reduction, loss, scratch, threads);
    return run<float>(job, dtype, reduction, loss, scratch, threads);
}

}  // namespace ltk
