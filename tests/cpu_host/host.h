// What the two files beside this share: numbers of every type, tolerances, and a call of the loss.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <vector>

#include "adjusted_ce.h"
#include "kernels.h"
#define LTK_NAMESPACE cpu_host
#include "simd.h"

namespace ltk {
namespace cpu_host {

using Numbers = std::vector<double>;
using Labels = std::vector<int64_t>;

// As TOLERANCES of tests/oracle.py, in the order of DType; tests/test_isa.py holds the two together.
struct Tolerance {
    double epsilon, factor, out, floor;
};
constexpr Tolerance kTolerances[kDTypes] = {
    {1.2e-7, 2.0, 1.2e-7, 4e-36},
    {2.2e-16, 4.0, 2.2e-16, 1e-300},
    {1.2e-7, 2.0, 3.9e-3, 4e-36},
    {1.2e-7, 2.0, 4.9e-4, 3.0e-8},
};

inline int64_t compared = 0, telling = 0, wrong = 0;

inline void within(const char* what, int dtype, double got, double expected, double allowed) {
    ++compared;
    telling += std::abs(expected) > 2 * allowed;  // zero in its place would be found
    if (got == expected || (got != got && expected != expected) || std::abs(got - expected) <= allowed) return;
    if (++wrong <= 20) std::printf("%s, dtype %d: %.9g is not %.9g +- %.2g\n", what, dtype, got, expected, allowed);
}

inline uint64_t state = 1;
inline double uniform(double low, double high) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * static_cast<double>(state >> 40) * 0x1p-24;
}
inline Numbers numbers(int64_t n, double low, double high) {
    Numbers out(static_cast<size_t>(n));
    for (double& x : out) x = static_cast<double>(static_cast<float>(uniform(low, high)));
    return out;
}
inline Labels labels(int64_t n, int64_t classes) {
    Labels out(static_cast<size_t>(n));
    for (int64_t& x : out) x = static_cast<int64_t>(uniform(0, static_cast<double>(classes)));
    return out;
}

template <class T>
constexpr int kCode = std::is_same_v<T, float>    ? 0
                      : std::is_same_v<T, double> ? 1
                      : std::is_same_v<T, bf16>   ? 2
                                                  : 3;
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
T made(double x) {
    if constexpr (std::is_arithmetic_v<T>) {
        return static_cast<T>(x);
    } else {
        T y;
        from_float(static_cast<float>(x), &y);
        return y;
    }
}
template <class T>
inline double read(T x) {
    if constexpr (std::is_arithmetic_v<T>)
        return static_cast<double>(x);
    else
        return static_cast<double>(to_float(x));
}
template <class T>
std::vector<T> as(const Numbers& from) {
    std::vector<T> out;
    for (const double x : from) out.push_back(made<T>(x));
    return out;
}
template <class T>
inline Numbers back(const std::vector<T>& from) {
    Numbers out;
    for (const T x : from) out.push_back(read(x));
    return out;
}
template <class T>
inline Numbers rounded(const Numbers& from) {
    return back(as<T>(from));
}
template <class T>
void* or_null(std::vector<T>& values) {
    return values.empty() ? nullptr : values.data();
}

// Gradients whose rows have `classes` entries, with the cancellation of oracle.py's `cond` where it is above 1.
inline void compare_rows(const char* what, int dtype, const Numbers& got, const Numbers& expected, int64_t classes,
                         const Numbers& size, double cond, const Tolerance& t) {
    for (size_t begin = 0, i = 0; begin < expected.size(); begin += static_cast<size_t>(classes), ++i) {
        double largest = 0.0;
        for (size_t j = 0; j < static_cast<size_t>(classes); ++j)
            largest = std::fmax(largest, std::abs(expected[begin + j]));
        const double relative = t.factor * t.epsilon * (4 + size[size.size() == 1 ? 0 : i]);
        for (size_t j = 0; j < static_cast<size_t>(classes); ++j) {
            const double e = expected[begin + j];
            double allowed = cond * (relative + t.out) * std::abs(e) + t.floor;
            if (cond > 1) allowed += relative * largest;
            within(what, dtype, got[begin + j], e, allowed);
        }
    }
}

struct Loss {
    int64_t rows, classes;
    Numbers logits, shift, scale, margin, row_scale, weight, smoothing, label_scale, sample_weight, lam;
    Labels target, target_b;
    double focal = 0.0, label_smoothing = 0.0;
    ClosedForm form{Form::none, nullptr, nullptr, {0, 0, 0}};
    Numbers form_table;
    int64_t seed = 12345;
};
struct Result {
    Numbers rows, grad, size;
    double mean = 0.0;
};

template <class T>
Result by_kernel(const Loss& loss, int threads) {
    using Real = RealOf<T>;
    auto logits = as<T>(loss.logits);
    std::vector<T> grad(logits.size());
    std::vector<Real> row_loss(static_cast<size_t>(loss.rows));
    auto shift = as<Real>(loss.shift), scale = as<Real>(loss.scale), margin = as<Real>(loss.margin),
         row_scale = as<Real>(loss.row_scale), weight = as<Real>(loss.weight), smoothing = as<Real>(loss.smoothing),
         label_scale = as<Real>(loss.label_scale), sample_weight = as<Real>(loss.sample_weight),
         lam = as<Real>(loss.lam), table = as<Real>(loss.form_table);
    AdjustedCe job{};
    job.logits = logits.data();
    job.logits_stride = job.grad_stride = job.classes = loss.classes;
    job.rows = loss.rows;
    job.target = loss.target.data();
    job.target_b = loss.target_b.empty() ? nullptr : loss.target_b.data();
    job.lam = or_null(lam);
    job.shift = or_null(shift);
    job.scale = or_null(scale);
    job.margin = or_null(margin);
    job.row_scale = or_null(row_scale);
    job.weight = or_null(weight);
    job.smoothing = or_null(smoothing);
    job.label_scale = or_null(label_scale);
    job.sample_weight = or_null(sample_weight);
    job.focal_gamma = loss.focal;
    job.label_smoothing = loss.label_smoothing;
    job.ignore_index = -100;
    job.row_loss = row_loss.data();
    job.grad = grad.data();
    job.closed = loss.form;
    job.closed.table = or_null(table);
    job.closed.seed = &loss.seed;
    std::vector<double> scratch(static_cast<size_t>(threads * adjusted_ce_scratch(loss.classes)));
    Result out;
    Real mean = 0;
    if (adjusted_ce(job, kCode<T>, Reduction::mean, &mean, scratch.data(), threads) != -1) ++wrong;
    out.grad = back(grad);
    out.rows = back(row_loss);
    out.mean = static_cast<double>(mean);
    return out;
}

inline Loss batch(int64_t rows, int64_t classes) {
    Loss loss{};
    loss.rows = rows;
    loss.classes = classes;
    loss.logits = numbers(rows * classes, -4, 4);
    loss.target = labels(rows, classes);
    loss.target[static_cast<size_t>(rows) / 2] = -100;
    return loss;
}

void check_exp();
void check_losses();

}  // namespace cpu_host
}  // namespace ltk
