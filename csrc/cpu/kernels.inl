// Included once by each ISA file, which names the namespace. Two files compiled with different flags must not share the name of
// an inline function: the linker keeps one copy of it, and the baseline could then run AVX-512 code. Hence one namespace per
// ISA, nothing from <algorithm> or <vector>, and no static objects here.
#include "kernels.h"
#include "simd.h"

#include "adjusted_ce.inl"
#include "logdet.inl"
#include "subset_scores.inl"

namespace ltk {
namespace LTK_NAMESPACE {

extern const Kernels kernels;
const Kernels kernels = {
    {adjusted_ce_f32, adjusted_ce_f64, adjusted_ce_bf16, adjusted_ce_f16},
    logdet_f64,
    subset_scores_f64,
};

}  // namespace LTK_NAMESPACE
}  // namespace ltk
