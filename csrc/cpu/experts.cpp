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

    struct Context {
        const Experts& job;
        ExpertRows rows;
        int64_t block;
        Real* scratch;
    };
    const int64_t block = classes >= 16384 ? 1 : 16384 / classes;
    Context context{job, kernels().experts[dtype], block, static_cast<Real*>(scratch)};
    parallel_blocks((rows + block - 1) / block, threads,
                    [](void* c, int64_t index, int worker) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const AdjustedCe& one = x.job.joint;
                        const int64_t begin = index * x.block;
                        const int64_t end = begin + x.block < one.rows ? begin + x.block : one.rows;
                        x.rows(x.job, begin, end, x.scratch + worker * experts_scratch(x.job.experts, one.classes));
                    },
                    &context);
    if (reduction == Reduction::none) return -1;
    // In row order and in double: the same bits for any number of threads.
    double total = 0.0;
    for (int e = 0; e <= job.experts; ++e) {
        const Real* row_loss = static_cast<const Real*>(job.row_loss) + e * rows;
        double sum = 0.0;
        for (int64_t i = 0; i < rows; ++i) sum += static_cast<double>(row_loss[i]);
        total += sum / denominator[e];
    }
    *static_cast<Real*>(loss) = static_cast<Real>(total);
    return -1;
}

}  // namespace

int64_t experts_ce(Experts job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    if (static_cast<DType>(dtype) == DType::f64) return run<double>(job, dtype, reduction, loss, scratch, threads);
    return run<float>(job, dtype, reduction, loss, scratch, threads);
}

}  // namespace ltk
