// The loss in two phases, for rows whose classes are not all in one place: statistics of a part of the classes, which
// add up over the parts, and the gradient of a part from the statistics of the whole. Each phase reads the logits once.
#pragma once
#include <cstdint>

namespace ltk {

// A part of the classes of every row. Tables are in the working type (double for float64 logits, else float).
struct ClassPart {
    const void* logits;  // rows x classes, unit class stride
    int64_t logits_stride;
    const int64_t*
        target;  // (rows,) class within the part; outside [0, classes): the label is elsewhere. -2: an ignored row
    const void* shift;        // (classes,) or null
    const void* scale;        // (classes,) or null
    const void* weight;       // (classes,) or null; label smoothing alone reads it
    const double* row_scale;  // (rows,) sigma of the row's label
    int64_t rows;
    int64_t classes;
};
constexpr int64_t kIgnoredRow = -2;

// Doubles of one row's statistics: a reference r near the largest a_j but the label's (-inf where all are masked); the
// sum of exp(a_j - r) over them; the label's own a_y without its margin (-inf where the label is elsewhere); and with
// `smooth` the sum of weight_j a_j over all but the label. Ignored rows are 0.
constexpr int kStatistics = 4;

// Doubles of one row for the gradient: reference r; factor of exp(a_j - r) scale_j; factor of weight_j scale_j (label
// smoothing); and the label's own gradient, which is written in its place. An ignored row's gradient is 0 whatever they
// are.
constexpr int kGradientTerms = 4;

using RowStatisticsRows = void (*)(const ClassPart& job, bool smooth, int64_t begin, int64_t end, double* out) noexcept;
using GradientRows = void (*)(const ClassPart& job, const double* row, int64_t begin, int64_t end, void* grad,
                              int64_t grad_stride) noexcept;

// As the statistics, without a smoothing sum, but the reference is the largest a_j but the label's, and `index` (rows,)
// its class, the lowest of equal ones; -1 where there is none above -inf, for ignored rows, and where one is NaN, which
// the reference is then.
using MaximaRows = void (*)(const ClassPart& job, int64_t begin, int64_t end, double* out, int64_t* index) noexcept;

// `dtype` is a DType of kernels.h; `out` (rows, kStatistics), `row` (rows, kGradientTerms), `grad` rows x classes in
// the logits' type, which may be the logits' own memory.
void row_statistics(const ClassPart& job, int dtype, bool smooth, double* out, int threads) noexcept;
void row_maxima(const ClassPart& job, int dtype, double* out, int64_t* index, int threads) noexcept;
void gradient_from_statistics(const ClassPart& job, int dtype, const double* row, void* grad, int64_t grad_stride,
                              int threads) noexcept;

}  // namespace ltk
