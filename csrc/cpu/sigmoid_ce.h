// The general sigmoid loss: a binary cross-entropy a class, each with its own factors, for multi-label targets and for
// labels.
//   a_j = beta_j z_j + delta_j
//   l = sum over positive j of P_j w_j phi(softplus(-a_j)) + sum over negative j of N_j m_j w_j phi(softplus(lambda
//   a_j)), times alpha_y where there is one label y
//   phi(l) = (1 - e^-l)^gamma l,   m_j = [sigmoid(a_j) >= theta],   w_j = map0 + sigmoid(map1 (q_j / sum over positive
//   k of q_k - map2)), both constant for the gradient
#pragma once
#include <cstdint>

namespace ltk {

// (classes,) real each, or null: 1, and 0 for the shift.
struct SigmoidTables {
    const void* negative;   // N
    const void* positive;   // P
    const void* scale;      // beta
    const void* shift;      // delta; -inf removes a class
    const void* rebalance;  // q, above 0; null: w = 1
    double map[3];
    double threshold = 0.0;       // theta in [0, 1); 0: m = 1
    double negative_scale = 1.0;  // lambda
    double focal_gamma = 0.0;     // gamma
};

enum class Hot : int { none = 0, u8 = 1, f32 = 2 };

// "real" is double for float64 logits, float for all others.
struct SigmoidCe {
    const void* logits;  // rows x classes, unit class stride
    int64_t logits_stride;
    int64_t rows;
    int64_t classes;
    const int64_t* target;  // (rows,) labels, or null:
    const void* hot;        // rows x classes, unit class stride: 1, 0, or ignored (-1 and ignore_index)
    int64_t hot_stride;
    Hot hot_type;
    int64_t ignore_index;
    SigmoidTables tables;
    const void* weight;         // alpha, (classes,) real, or null; with labels alone
    const void* sample_weight;  // (rows,) real, or null
    const void* row_coef;       // (rows,) real upstream gradients, or null
    double grad_scale;          // factor on every gradient: 1 / denominator of the reduction, times the upstream one
    void* row_loss;             // (rows,) real
    void* grad;                 // rows x classes real, or null
    void* statistics;           // (2, classes) real, or null: sums over the rows of |dl / da_j| as a positive, as a
                                // negative; without alpha and sample weights
    void* columns;              // sigmoid_ce_columns reals of scratch, with statistics
    int64_t slice;              // rows whose sums `columns` keeps together
};

// The rows [begin, end), which lie in one slice. Returns whether all their entries of `hot` are known.
using SigmoidCeRows = bool (*)(const SigmoidCe& job, int64_t begin, int64_t end) noexcept;

// Whether a row has a label, or an entry that is not ignored: the rows that a mean is over.
bool sigmoid_ce_counts(const SigmoidCe& job, int64_t row) noexcept;

int64_t sigmoid_ce_columns(int64_t rows, int64_t classes) noexcept;

// What `sigmoid_ce` returns: -1; a row with a label out of range; or one of these. Beside -1 what was written is to be
// thrown away.
constexpr int64_t kBadHot = -2, kBadSigmoidTable = -3;

// `reduction` is a Reduction of adjusted_ce.h, `upstream` the factor of a reduced loss' gradient; `*loss` (real) is
// written unless the reduction is none.
int64_t sigmoid_ce(SigmoidCe job, int dtype, int reduction, double upstream, void* loss, int threads) noexcept;

}  // namespace ltk
