// The part of the loss that no instruction set changes: label check, denominator, threads, reduction.
#include "adjusted_ce.h"

#include <cmath>
#include <limits>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "vector_gradients.h"

namespace ltk {
namespace {

constexpr int64_t kDTypeSize[kDTypes] = {4, 8, 2, 2};

struct Denominators {
    double weighted = 0.0;
    int64_t rows = 0;
    bool finite = true;  // the sample weights
};

template <class Real>
double weight_of(const AdjustedCe& job, int64_t label) noexcept {
    return job.weight == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.weight)[label]);
}

// One pass over the labels. Returns the first bad row, or -1.
template <class Real>
int64_t check_labels(const AdjustedCe& job, Denominators& sum) noexcept {
    for (int64_t i = 0; i < job.rows; ++i) {
        const int64_t a = job.target[i];
        if (a == job.ignore_index) continue;
        if (a < 0 || a >= job.classes) return i;
        double weight = weight_of<Real>(job, a);
        if (job.target_b != nullptr) {
            const int64_t b = job.target_b[i];
            if (b < 0 || b >= job.classes) return i;
            const double lam = static_cast<double>(static_cast<const Real*>(job.lam)[i]);
            weight = lam * weight + (1.0 - lam) * weight_of<Real>(job, b);
        }
        if (job.sample_weight != nullptr) {
            const double own = static_cast<double>(static_cast<const Real*>(job.sample_weight)[i]);
            sum.finite &= std::isfinite(own);
            weight *= own;
        }
        sum.weighted += weight;
        ++sum.rows;
    }
    return -1;
}

// The first table with an entry that is not finite (-inf removes a class and is allowed in shift; a smoothing lies in
// [0, 1]), or -1. C reads a table; the rows cost B C.
template <class Real>
int64_t check_tables(const AdjustedCe& job) noexcept {
    const void* tables[] = {job.shift,  job.scale,     job.margin,     job.row_scale,
                            job.weight, job.smoothing, job.label_scale};
    for (int64_t t = 0; t < kSampleWeight; ++t) {
        const Real* table = static_cast<const Real*>(tables[t]);
        if (table == nullptr) continue;
        const bool share = t == 5;
        const Real lowest = share    ? Real(0)
                            : t == 0 ? -std::numeric_limits<Real>::infinity()
                                     : std::numeric_limits<Real>::lowest();
        const Real highest = share ? Real(1) : std::numeric_limits<Real>::max();
        bool good = true;
        for (int64_t j = 0; j < job.classes; ++j) good &= table[j] >= lowest && table[j] <= highest;
        if (!good) return t;
    }
    return -1;
}

template <class Real>
int64_t prepare(AdjustedCe& job, Reduction reduction, double* denominator) noexcept {
    Denominators sum;
    const int64_t bad = check_labels<Real>(job, sum);
    if (bad >= 0) return bad;
    const int64_t table = check_tables<Real>(job);
    if (table >= 0) return -2 - table;
    if (!sum.finite) return -2 - kSampleWeight;
    *denominator = reduction == Reduction::mean         ? sum.weighted
                   : reduction == Reduction::batch_mean ? static_cast<double>(sum.rows)
                                                        : 1.0;
    job.grad_scale = 1.0 / *denominator;
    job.smoothing_total = static_cast<double>(job.classes);
    if ((job.label_smoothing != 0.0 || job.smoothing != nullptr) && job.weight != nullptr) {
        job.smoothing_total = 0.0;
        for (int64_t j = 0; j < job.classes; ++j) job.smoothing_total += weight_of<Real>(job, j);
    }
    return -1;
}

template <class Real>
int64_t run(AdjustedCe& job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    double denominator;
    const int64_t status = prepare<Real>(job, reduction, &denominator);
    if (status != -1) return status;

    // In its own memory, unread before: the gradient replaces logits that sit in the cache, or is small enough to stay
    // there.
    const int64_t bytes = job.rows * job.classes * kDTypeSize[dtype];
    job.stream = bytes > kStreamBytes && job.grad != nullptr && job.grad != job.logits && job.target_b == nullptr;
    if (job.stream && job.grad_stride == job.classes) prefer_huge_pages(job.grad, bytes);

    const AdjustedCeRows rows = kernels().adjusted_ce[dtype];
    const int64_t block = job.vectors != nullptr ? job.vectors->slice : rows_a_block(job.classes);
    parallel_rows(job.rows, block, threads, [&](int64_t begin, int64_t end, int worker) {
        rows(job, begin, end, static_cast<Real*>(scratch) + worker * adjusted_ce_scratch(job.classes));
    });

    if (reduction != Reduction::none) {
        const double total = sum_of<Real>(job.row_loss, job.rows) / denominator;
        *static_cast<Real*>(loss) = static_cast<Real>(total);
        if (job.vectors != nullptr)
            add_up(job, reduction == Reduction::mean ? total : 0.0, sizeof(Real) == sizeof(double), threads);
    } else if (job.vectors != nullptr) {
        add_up(job, 0.0, sizeof(Real) == sizeof(double), threads);
    }
    return -1;
}

}  // namespace

int64_t adjusted_ce_prepare(AdjustedCe& job, bool wide, Reduction reduction, double* denominator) noexcept {
    return wide ? prepare<double>(job, reduction, denominator) : prepare<float>(job, reduction, denominator);
}

int64_t adjusted_ce(AdjustedCe job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept {
    alignas(64) double stack[kStack];  // of reals: float uses half of it
    const bool wide = static_cast<DType>(dtype) == DType::f64;
    if (scratch == nullptr) {
        scratch = stack;
        const int64_t used = threads * adjusted_ce_scratch(job.classes);
        if (job.row_loss == nullptr)
            job.row_loss =
                wide ? static_cast<void*>(stack + used) : static_cast<void*>(reinterpret_cast<float*>(stack) + used);
    }
    if (wide) return run<double>(job, dtype, reduction, loss, scratch, threads);
    return run<float>(job, dtype, reduction, loss, scratch, threads);
}

}  // namespace ltk
