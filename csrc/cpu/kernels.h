// The list is the truth: a kernel that is not a member here does not exist. Each ISA file fills one such table.
#pragma once
#include "adjusted_ce.h"
#include "logdet.h"
#include "subset_scores.h"

namespace ltk {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kDTypes = 4;

struct Kernels {
    AdjustedCeRows adjusted_ce[kDTypes];
    LogdetBatch logdet_f64;
    SubsetScoresPacks subset_scores_f64;
};

}  // namespace ltk
