// Included once by each ISA file, which names the namespace. Two files compiled with different flags must not share the
// name of an inline function: the linker keeps one copy of it, and the baseline could then run AVX-512 code. Hence one
// namespace per ISA, nothing from <algorithm> or <vector>, and no static objects here.
#include "kernels.h"
#include "simd.h"

#include "adjusted_ce.inl"
#include "balance.inl"
#include "greedy.inl"
#include "logdet.inl"
#include "nearest.inl"
#include "row_logsumexp.inl"
#include "row_statistics.inl"
#include "sigmoid_ce.inl"
#include "sinkhorn.inl"
#include "soft_targets.inl"
#include "subset_scores.inl"

// On the steps of soft_targets.inl, and of row_logsumexp.inl.
#include "experts.inl"
#include "self_contrast.inl"

namespace ltk {
namespace LTK_NAMESPACE {

static void exp_f32(const float* x, float* y, int64_t n) noexcept {
    each_vector<F32>(0, n, [&](int64_t i, auto mask) { F32::store(y + i, F32::exp(F32::load(x + i, mask)), mask); });
}

extern const Kernels kernels;
const Kernels kernels = {
    exp_f32,
    {adjusted_ce_f32, adjusted_ce_f64, adjusted_ce_bf16, adjusted_ce_f16},
    {row_statistics_f32, row_statistics_f64, row_statistics_bf16, row_statistics_f16},
    {row_maxima_f32, row_maxima_f64, row_maxima_bf16, row_maxima_f16},
    {gradient_f32, gradient_f64, gradient_bf16, gradient_f16},
    {soft_targets_f32, soft_targets_f64, soft_targets_bf16, soft_targets_f16},
    {experts_f32, experts_f64, experts_bf16, experts_f16},
    logdet_f64,
    subset_scores_f64,
    subset_scores_f32,
    factor_f64,
    rank_update_f64,
    lower_times_f64,
    balance_f32,
    first_above_f32,
    first_above_f64,
    sinkhorn_row_f32,
    sinkhorn_row_f64,
    {sigmoid_ce_f32, sigmoid_ce_f64, sigmoid_ce_bf16, sigmoid_ce_f16},
    {row_logsumexp_f32, row_logsumexp_f64},
    {{self_unit<F32>, self_positives<F32>, self_products<F32>, self_gradient<F32>},
     {self_unit<F64>, self_positives<F64>, self_products<F64>, self_gradient<F64>}},
};

}  // namespace LTK_NAMESPACE
}  // namespace ltk
