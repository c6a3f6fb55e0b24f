// Two log-sum-exps a row of similarities, over the columns of the row's own group and over all others, and in their
// place the coefficients of the two gradient products. The similarities are s_ij = row_scale_i dot_ij + shift_j.
#pragma once
#include <cstdint>

namespace ltk {

struct RowLogsumexp {
    void* dots;  // rows x columns in the working type, unit column stride; what `coefficients` says takes their place
    int64_t stride;
    int64_t rows;
    int64_t columns;
    const void* shift;        // (columns,) in the working type, or null
    const double* row_scale;  // (rows,)
    const int64_t*
        own_begin;  // (rows,) the columns of a row's own group are [own_begin, own_end); null: there are none
    const int64_t* own_end;
    const int64_t* absent;    // (rows,) a column that counts nowhere; -1: none. Or null
    const double* reference;  // (rows,) not below any s_ij, and not above by more than 86; null: maxima are looked for

    // The loss of a row, log(e^base + e^other + e^(own + bonus)), less `own` with minus_own, where `loss` is not null;
    // with a weight of 0 it is 0, whatever the row holds.
    double* loss;
    const double* weight;  // (rows,)
    const double* base;    // (rows,), or null: -inf
    const double* bonus;   // (rows,), or null: 0
    bool minus_own;
    double* grad_base;  // (rows,) gradient of the weighted loss, or null

    // The log-sum-exps themselves where `loss` is null.
    double* other;  // (rows,)
    double* own;
    const double* grad_other;  // (rows,) upstream gradients; for coefficients
    const double* grad_own;

    bool coefficients;  // whether gradients with respect to s_ij are to take the place of the dots
};

using RowLogsumexpRows = void (*)(const RowLogsumexp& job, int64_t begin, int64_t end) noexcept;

// `dtype` is f32 or f64 of kernels.h: the working type.
void row_logsumexp(const RowLogsumexp& job, int dtype, int threads) noexcept;

}  // namespace ltk
