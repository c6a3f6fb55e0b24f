// A contrastive loss of unit rows against themselves: all that is beside its products. Rows are sorted by label, those
// that are ignored left out, so that a row's positives are the others of one range; no similarity exceeds `scale`,
// which is the reference of all exponentials. With s_ij = scale a_i . a_j, m_i positives p of row i and j over all
// other rows:
//   l_i = weight_i (log(e^base_i + gamma sum_j e^s_ij) - (beta linear_i + alpha sum_p s_ip) / (beta + alpha m_i))
// and 0 where beta + alpha m_i is 0. "Real" is float or double, the working type.
#pragma once
#include <cstdint>

#include "adjusted_ce.h"

namespace ltk {

// What the steps share: the rows in their order.
struct SelfRows {
    int64_t kept;     // rows that are not ignored
    int64_t width;    // of a row
    void* unit;       // kept x width reals: the rows in order, of unit length
    double* inverse;  // (kept,) 1 / length; its negative where the length is below `eps` and 1 / eps stands for it
    int64_t* order;   // (rows,) the row at each place; the ignored ones last
    int64_t* begin;   // (kept,) the range of the row's label
    int64_t* end;
};

struct SelfStart {
    SelfRows rows;
    const void* features;  // rows x width reals, unit column stride
    int64_t stride;
    double eps;
    double* positive;  // (kept,) sum of the products with the row's positives
};

// Of rows [first, first + rows) with those from `first` on: the upper part of a symmetric matrix, whose diagonal counts
// nowhere.
struct SelfProducts {
    void* products;  // rows x columns reals, unit column stride
    int64_t stride;
    int64_t rows;
    int64_t columns;
    double scale;
    double* total;       // (rows,) sums of e^(s - scale), which take the products' place; or, where there are factors,
    const void* factor;  // (columns,) reals: those times factor_i + factor_j, what row i and row j give to each other
    bool kept;           // the exponentials are there already
};

// One row each; (rows,) in the caller's order, or (kept,) in ours.
struct SelfLosses {
    SelfRows rows;
    int64_t all;  // rows, the ignored ones included
    double scale, alpha, beta, gamma;
    const double* positive;  // (kept,)
    const double* total;     // (kept,)
    const double* weight;    // (rows,) or null: 1
    const double* upstream;  // (rows,) or null: 1
    const double* base;      // (rows,) or null: -inf
    const double* linear;    // (rows,) or null: 0
    double* loss;            // (rows,)
    double* of_base;         // (rows,) gradients, or null
    double* of_linear;
    void* factor;   // (kept,) reals: of SelfProducts
    double* slope;  // (kept,) of the sum of products with positives, less its sign and scale
};

struct SelfGradient {
    SelfRows rows;
    double scale;
    const double* slope;
    void* products;  // kept x width reals: the factors times the unit rows; overwritten
    double* along;   // (kept,) product of the row's gradient with the row
    void* out;       // rows x width reals: gradient of the features
};

// All rows [begin, end), or all labels whose range begins there, by the steps of self_contrast.cpp.
struct SelfContrastKernels {
    void (*unit)(const SelfStart& job, int64_t begin, int64_t end) noexcept;
    void (*positives)(const SelfStart& job, int64_t begin, int64_t end, void* scratch) noexcept;
    void (*products)(const SelfProducts& job, int64_t begin, int64_t end) noexcept;
    void (*gradient)(const SelfGradient& job, int64_t begin, int64_t end, void* scratch) noexcept;
};

// `dtype` is f32 or f64 of kernels.h. Scratch: threads * 2 * width reals.

// Fills all of job.rows of `all` rows with these labels, and the sums with the positives.
void self_contrast_start(SelfStart& job, const int64_t* labels, int64_t all, int64_t ignore_index, int dtype,
                         void* scratch, int threads) noexcept;
void self_contrast_products(const SelfProducts& job, int dtype, int threads) noexcept;
// The sum of the losses, divided as `reduction` says.
double self_contrast_losses(const SelfLosses& job, Reduction reduction, int dtype) noexcept;
// The gradient with respect to `scale`.
double self_contrast_gradient(const SelfGradient& job, int64_t all, int dtype, void* scratch, int threads) noexcept;

}  // namespace ltk
