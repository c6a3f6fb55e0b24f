// The list is the truth: a kernel that is not a member here does not exist. Each ISA file fills one such table.
#pragma once
#include "adjusted_ce.h"
#include "balance.h"
#include "experts.h"
#include "greedy.h"
#include "logdet.h"
#include "nearest.h"
#include "row_logsumexp.h"
#include "row_statistics.h"
#include "self_contrast.h"
#include "sigmoid_ce.h"
#include "sinkhorn.h"
#include "soft_targets.h"
#include "subset_scores.h"

namespace ltk {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kDTypes = 4;

// The exp that the bodies use, for the test of its accuracy.
using ExpArray = void (*)(const float* x, float* y, int64_t n) noexcept;

struct Kernels {
    ExpArray exp_f32;
    AdjustedCeRows adjusted_ce[kDTypes];
    RowStatisticsRows row_statistics[kDTypes];
    MaximaRows row_maxima[kDTypes];
    GradientRows gradient_from_statistics[kDTypes];
    SoftTargetRows soft_targets[kDTypes];
    ExpertRows experts[kDTypes];
    LogdetBatch logdet_f64;
    SubsetScoresPacks<double> subset_scores_f64;
    SubsetScoresPacks<float> subset_scores_f32;
    Factor factor_f64;
    RankUpdate rank_update_f64;
    LowerTimes lower_times_f64;
    BalanceRows balance_f32;
    FirstAbove<float> first_above_f32;
    FirstAbove<double> first_above_f64;
    SinkhornRow<float> sinkhorn_row_f32;
    SinkhornRow<double> sinkhorn_row_f64;
    SigmoidCeRows sigmoid_ce[kDTypes];
    RowLogsumexpRows row_logsumexp[2];  // f32, f64
    SelfContrastKernels self_contrast[2];
};

}  // namespace ltk
