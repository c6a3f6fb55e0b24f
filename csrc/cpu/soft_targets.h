// Softmax cross-entropy against a distribution, or any non-negative row, over the classes; and distillation, whose
// distribution is the softmax of a teacher's logits. Logits and targets are read once, and the gradient is formed
// beside the loss.
#pragma once
#include <cstdint>

#include "adjusted_ce.h"

namespace ltk {

// With a_j = sigma (scale_j z_j + shift_j) and t_j = weight_j (keep q_j + floor):
//   row loss = -sum_j t_j log softmax(a)_j                  q the target's row
//   row loss = KL(q || softmax(a)), q = softmax(sigma y)    y the target's row of a teacher's logits; t = q
// A class with t_j = 0 adds nothing, whatever its logit. Tables, row weights and everything written are real: double
// for float64 logits, else float.
struct SoftTargets {
    const void* logits;  // rows x classes, unit class stride
    int64_t logits_stride;
    const void* target;  // rows x classes, unit class stride, in the logits' type, or real where `real_target`
    int64_t target_stride;
    bool real_target;
    bool teacher;
    const void* shift;  // (classes,) or null, as all tables; scale not without shift
    const void* scale;
    const void* weight;
    const void* row_weight;  // (rows,) factor on each row's loss, or null
    const void* row_coef;    // (rows,) factor on each row's gradient (an upstream gradient), or null
    double sigma;
    double keep;
    double floor;
    double factor;      // on every row's loss
    double grad_scale;  // factor on every gradient, beside `factor`
    int64_t rows;
    int64_t classes;
    void* row_loss;  // (rows,)
    void* grad;      // rows x classes, or null
    bool stream;     // write the gradient past the caches
};

// The rows [begin, end); -1, or the first of them whose target has an entry that is negative or not finite. `scratch`
// holds adjusted_ce_scratch(classes) reals.
using SoftTargetRows = int64_t (*)(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept;

// A whole batch. The loss (real) is the sum of the weighted rows over `denominator`; it is not written where the
// reduction is none. Returns -1, or the first row with a bad target: what has been written is then of no use. `scratch`
// holds threads
// * adjusted_ce_scratch(classes) reals.
int64_t soft_targets(SoftTargets job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept;

}  // namespace ltk
