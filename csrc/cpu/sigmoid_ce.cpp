// What no instruction set changes: labels and tables looked at, denominator, threads, reduction.
#include "sigmoid_ce.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "isa.h"
#include "parallel.h"
#include "vector_gradients.h"

namespace ltk {
namespace {

// The first entry says it, nearly always.
template <class Hot>
bool row_counts(const SigmoidCe& job, int64_t row) noexcept {
    const Hot* hot = static_cast<const Hot*>(job.hot) + row * job.hot_stride;
    for (int64_t j = 0; j < job.classes; ++j) {
        const double entry = static_cast<double>(hot[j]);
        if (entry != -1.0 && entry != static_cast<double>(job.ignore_index)) return true;
    }
    return false;
}

template <class Real>
bool tables_are_good(const SigmoidCe& job) noexcept {
    const SigmoidTables& s = job.tables;
    const void* tables[] = {s.negative, s.positive, s.scale, s.shift, s.rebalance, job.weight};
    bool good = true;
    for (int t = 0; t < 6; ++t) {
        const Real* table = static_cast<const Real*>(tables[t]);
        if (table == nullptr) continue;
        const Real lowest = t == 3   ? -std::numeric_limits<Real>::infinity()
                            : t == 4 ? std::numeric_limits<Real>::min()
                                     : std::numeric_limits<Real>::lowest();
        for (int64_t j = 0; j < job.classes; ++j)
            good &= table[j] >= lowest && table[j] <= std::numeric_limits<Real>::max();
    }
    return good;
}

template <class Real>
int64_t run(SigmoidCe& job, int dtype, Reduction reduction, double upstream, void* loss, int threads) noexcept {
    if (!tables_are_good<Real>(job)) return kBadSigmoidTable;
    double weighted = 0.0;
    int64_t rows = 0;
    for (int64_t i = 0; i < job.rows; ++i) {
        if (!sigmoid_ce_counts(job, i)) continue;
        double weight = 1.0;
        if (job.hot_type == Hot::none) {
            const int64_t label = job.target[i];
            if (label < 0 || label >= job.classes) return i;
            if (job.weight != nullptr) weight = static_cast<double>(static_cast<const Real*>(job.weight)[label]);
        }
        if (job.sample_weight != nullptr) weight *= static_cast<double>(static_cast<const Real*>(job.sample_weight)[i]);
        weighted += weight;
        ++rows;
    }
    if (!std::isfinite(weighted)) return kBadSigmoidTable;  // a sample weight
    const double denominator = reduction == Reduction::mean         ? weighted
                               : reduction == Reduction::batch_mean ? static_cast<double>(rows)
                                                                    : 1.0;
    job.grad_scale = upstream / denominator;
    job.slice = slice_rows(job.rows, job.classes);
    const SigmoidCeRows kernel = kernels().sigmoid_ce[dtype];
    std::atomic<bool> known{true};
    parallel_rows(job.rows, job.slice, threads, [&](int64_t begin, int64_t end, int) {
        if (!kernel(job, begin, end)) known.store(false, std::memory_order_relaxed);
    });
    if (!known.load()) return kBadHot;
    if (job.statistics != nullptr) {
        void* const out[] = {job.statistics, static_cast<Real*>(job.statistics) + job.classes};
        add_columns({job.columns, slices_of(job.rows, job.classes), adjusted_ce_row(job.classes), job.classes, 2}, out,
                    sizeof(Real) == sizeof(double), threads);
    }
    if (reduction != Reduction::none)
        *static_cast<Real*>(loss) = static_cast<Real>(sum_of<Real>(job.row_loss, job.rows) / denominator);
    return -1;
}

}  // namespace

bool sigmoid_ce_counts(const SigmoidCe& job, int64_t row) noexcept {
    switch (job.hot_type) {
        case Hot::u8:
            return row_counts<uint8_t>(job, row);
        case Hot::f32:
            return row_counts<float>(job, row);
        default:
            return job.target[row] != job.ignore_index;
    }
}

int64_t sigmoid_ce_columns(int64_t rows, int64_t classes) noexcept {
    return slices_of(rows, classes) * 2 * adjusted_ce_row(classes);
}

int64_t sigmoid_ce(SigmoidCe job, int dtype, int reduction, double upstream, void* loss, int threads) noexcept {
    const Reduction by = static_cast<Reduction>(reduction);
    if (static_cast<DType>(dtype) == DType::f64) return run<double>(job, dtype, by, upstream, loss, threads);
    return run<float>(job, dtype, by, upstream, loss, threads);
}

}  // namespace ltk
