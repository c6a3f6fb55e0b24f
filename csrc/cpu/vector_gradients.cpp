#include "vector_gradients.h"

#include "parallel.h"

namespace ltk {
namespace {

constexpr int64_t kColumns = 1024;  // that are added over the slices at a time

template <class Real>
void add_slices(const ColumnSums& sums, void* const* out, int threads) noexcept {
    if (sums.count == 0) return;
    parallel_rows(sums.classes, kColumns, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t n = end - begin;
        for (int column = 0; column < sums.count; ++column) {
            double sum[kColumns] = {};
            for (int64_t s = 0; s < sums.slices; ++s) {
                const Real* part =
                    static_cast<const Real*>(sums.columns) + (s * sums.count + column) * sums.stride + begin;
                for (int64_t j = 0; j < n; ++j) sum[j] += static_cast<double>(part[j]);
            }
            Real* to = static_cast<Real*>(out[column]) + begin;
            for (int64_t j = 0; j < n; ++j) to[j] = static_cast<Real>(sum[j]);
        }
    });
}

template <class Real>
void add_labels(const AdjustedCe& job, double mean_loss) noexcept {
    const VectorGradients& v = *job.vectors;
    const int labels = job.target_b == nullptr ? 1 : 2;
    for (int t = 0; t < kRowTerms; ++t) {
        Real* out = static_cast<Real*>(v.out[2 + t]);
        if (out == nullptr) continue;
        const double of_weight = t == 2 ? mean_loss * job.grad_scale : 0.0;
        for (int64_t j = 0; j < job.classes; ++j) v.labels[j] = 0.0;
        for (int64_t i = 0; i < job.rows; ++i) {
            if (job.target[i] == job.ignore_index) continue;
            const double lam = labels == 1 ? 1.0 : static_cast<double>(static_cast<const Real*>(job.lam)[i]);
            const double of_row = job.sample_weight == nullptr
                                      ? of_weight
                                      : of_weight * static_cast<double>(static_cast<const Real*>(job.sample_weight)[i]);
            const Real* term = static_cast<const Real*>(v.terms) + i * labels * kRowTerms + t;
            v.labels[job.target[i]] += static_cast<double>(term[0]) - of_row * lam;
            if (labels == 2) v.labels[job.target_b[i]] += static_cast<double>(term[kRowTerms]) - of_row * (1.0 - lam);
        }
        for (int64_t j = 0; j < job.classes; ++j) out[j] = static_cast<Real>(v.labels[j]);
    }
}

}  // namespace

// Few enough rows that their sums are good in float, and many enough slices for the threads; but not so few rows that
// the slices' sums rival the logits in memory.
int64_t slice_rows(int64_t rows, int64_t classes) noexcept {
    const int64_t share = (rows + 31) / 32;
    const int64_t wanted = share < 8 ? 8 : share > 128 ? 128 : share;
    const int64_t least = 16384 / classes < 1024 ? 16384 / classes : 1024;
    return wanted > least ? wanted : least;
}

int64_t slices_of(int64_t rows, int64_t classes) noexcept {
    const int64_t slice = slice_rows(rows, classes);
    return (rows + slice - 1) / slice;
}

void add_columns(const ColumnSums& sums, void* const* out, bool wide, int threads) noexcept {
    wide ? add_slices<double>(sums, out, threads) : add_slices<float>(sums, out, threads);
}

int64_t vector_gradients_scratch(int64_t rows, int64_t classes, int columns, int labels, bool wide) noexcept {
    const int64_t reals = slices_of(rows, classes) * columns * adjusted_ce_row(classes) + rows * labels * kRowTerms;
    return adjusted_ce_row(classes) + (wide ? reals : (reals + 1) / 2);
}

VectorGradients vector_gradients(const AdjustedCe& job, void* const* out, double* scratch, bool wide) noexcept {
    VectorGradients v{};
    for (int t = 0; t < kTables; ++t) v.out[t] = out[t];
    v.slice = slice_rows(job.rows, job.classes);
    v.stride = adjusted_ce_row(job.classes);
    v.labels = scratch;
    v.columns = scratch + v.stride;
    const int64_t reals = slices_of(job.rows, job.classes) * ((out[0] != nullptr) + (out[1] != nullptr)) * v.stride;
    v.terms = static_cast<char*>(v.columns) + reals * (wide ? 8 : 4);
    return v;
}

void add_up(const AdjustedCe& job, double mean_loss, bool wide, int threads) noexcept {
    const VectorGradients& v = *job.vectors;
    void* out[2];
    int count = 0;
    for (int t = 0; t < 2; ++t)
        if (v.out[t] != nullptr) out[count++] = v.out[t];
    add_columns({v.columns, slices_of(job.rows, job.classes), v.stride, job.classes, count}, out, wide, threads);
    wide ? add_labels<double>(job, mean_loss) : add_labels<float>(job, mean_loss);
}

}  // namespace ltk
