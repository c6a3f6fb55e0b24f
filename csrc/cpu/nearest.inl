// Body of nearest.h: almost every score is below what a row keeps already, so the scan is all that is read at full
// speed.

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, class Real>
static inline int64_t first_above(const Real* values, int64_t begin, int64_t end, Real least) noexcept {
    constexpr int64_t kStep = 8 * V::N;
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
        typename V::Reg top = V::load(values + j, V::all());
        for (int64_t k = V::N; k < kStep; k += V::N) top = V::max(top, V::load(values + j + k, V::all()));
        if (V::horizontal_max(top) > least) break;
    }
    while (j < end && !(values[j] > least)) ++j;
    return j;
}

static int64_t first_above_f32(const float* values, int64_t begin, int64_t end, float least) noexcept {
    return first_above<F32>(values, begin, end, least);
}
static int64_t first_above_f64(const double* values, int64_t begin, int64_t end, double least) noexcept {
    return first_above<F64>(values, begin, end, least);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
