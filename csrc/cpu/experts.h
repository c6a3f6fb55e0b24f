// The losses of several experts on one batch, coupled: each expert's cross-entropy, and one term of all of them, whose
// gradient is added while an expert's own is formed. A row's logits are read from memory once.
#pragma once
#include <cstdint>

#include "adjusted_ce.h"

namespace ltk {

// What couples experts, with p_e the softmax of u_ej = sigma inverse_temperature_j z_ej (or of what expert e's loss
// makes of its logits with scale and shift, where `adjusted`):
//   mean_kl    sum_e KL(p || p_e), p the softmax of the mean of u_e, without a gradient of its own
//   mutual_kl  sum over e != f of KL(p_f || p_e) / (E - 1)
//   sum        the loss `joint` of the sum of all z_e
enum class Coupling : int { mean_kl = 1, mutual_kl = 2, sum = 3 };

constexpr int kExperts = 8;

struct Experts {
    AdjustedCe expert[kExperts];  // one batch: rows, classes, target and sample weights are the same; no closed forms,
                                  // no mixed labels; shift and scale both or neither; `grad` is rows x classes reals,
                                  // or null
    AdjustedCe joint;             // of the coupling "sum"; its target and sample weights count for every coupling
    double factor[kExperts + 1];  // on each expert's loss, and on the coupling
    int experts;                  // at least 1
    Coupling coupling;
    bool adjusted;
    double sigma;
    const void* inverse_temperature;  // (classes,) real or null
    void* row_loss;                   // (experts + 1, rows) real, each with its sample weight and its factor
};

// Reals of scratch one thread needs.
constexpr int64_t experts_scratch(int experts, int64_t classes) noexcept {
    return (3 * experts + 3) * adjusted_ce_row(classes) +
           (experts + 1) * adjusted_ce_row((classes + kBlock - 1) / kBlock);
}

using ExpertRows = void (*)(const Experts& job, int64_t begin, int64_t end, void* scratch) noexcept;

// A whole batch. The loss (real) is the sum of the experts' and the coupling's, each reduced by itself; it is not
// written where the reduction is none. Returns as `adjusted_ce`; tables of expert e are counted from 8 e on, those of
// the joint loss after the last expert's: -2 - 8 e - t. `scratch` holds threads * experts_scratch(experts, classes)
// reals.
int64_t experts_ce(Experts job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept;

}  // namespace ltk
