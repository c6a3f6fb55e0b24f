#include "sinkhorn.h"

#include <cmath>

#include "isa.h"

namespace ltk {
namespace {

// Below this share of its prior a column is summed in logarithms: single entries of it may have been rounded to 0.
constexpr double kSmall = 1e-12;

template <class Real>
SinkhornRow<Real> row_kernel() noexcept;
template <>
SinkhornRow<float> row_kernel<float>() noexcept {
    return kernels().sinkhorn_row_f32;
}
template <>
SinkhornRow<double> row_kernel<double>() noexcept {
    return kernels().sinkhorn_row_f64;
}

// log of the mean over the rows of label j, whatever its size.
template <class Real>
double log_column(const Sinkhorn& job, int64_t j) noexcept {
    double highest = -INFINITY, sum = 0.0;
    for (int64_t i = 0; i < job.rows; ++i) {
        const Real* s = static_cast<const Real*>(job.similarities) + i * job.stride;
        double top = -INFINITY, total = 0.0;
        for (int64_t k = 0; k < job.classes; ++k) top = std::fmax(top, job.inverse * s[k] + job.potential[k]);
        for (int64_t k = 0; k < job.classes; ++k) total += std::exp(job.inverse * s[k] + job.potential[k] - top);
        const double x = job.inverse * s[j] + job.potential[j] - top - std::log(total);
        if (x > highest) {
            sum = sum * std::exp(highest - x) + 1.0;
            highest = x;
        } else {
            sum += std::exp(x - highest);
        }
    }
    return highest + std::log(sum / static_cast<double>(job.rows));
}

template <class Real>
void run(Sinkhorn& job) noexcept {
    const SinkhornRow<Real> row = row_kernel<Real>();
    const Real* s = static_cast<const Real*>(job.similarities);
    Real* labels = static_cast<Real*>(job.labels);
    Real* shift = static_cast<Real*>(job.shift);
    for (int64_t j = 0; j < job.classes; ++j) job.potential[j] = std::log(job.prior[j]);
    job.iterations = 0;
    while (true) {
        double top = -INFINITY;  // a constant in all potentials changes nothing
        for (int64_t j = 0; j < job.classes; ++j) top = std::fmax(top, job.potential[j]);
        for (int64_t j = 0; j < job.classes; ++j) {
            job.potential[j] -= top;
            shift[j] = static_cast<Real>(job.potential[j]);
            job.columns[j] = 0.0;
        }
        for (int64_t i = 0; i < job.rows; ++i) {
            Real* out = labels + i * job.classes;
            row(s + i * job.stride, shift, static_cast<Real>(job.inverse), job.classes, out);
            for (int64_t j = 0; j < job.classes; ++j) job.columns[j] += static_cast<double>(out[j]);
        }
        job.error = 0.0;
        for (int64_t j = 0; j < job.classes; ++j) {
            job.columns[j] /= static_cast<double>(job.rows);
            job.error += std::fabs(job.columns[j] - job.prior[j]);
        }
        if (job.error <= job.tolerance || job.iterations == job.limit) return;
        ++job.iterations;
        for (int64_t j = 0; j < job.classes; ++j) {
            const bool small = job.columns[j] < kSmall * job.prior[j];
            const double sum = small ? log_column<Real>(job, j) : std::log(job.columns[j]);
            job.columns[j] = std::log(job.prior[j]) - sum;  // not into the potential yet: other columns may read it
        }
        for (int64_t j = 0; j < job.classes; ++j) job.potential[j] += job.columns[j];
    }
}

}  // namespace

void sinkhorn(Sinkhorn& job, bool single) noexcept {
    single ? run<float>(job) : run<double>(job);
}

}  // namespace ltk
