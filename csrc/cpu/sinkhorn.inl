// Body of sinkhorn.h: one row's softmax.

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, class Real>
static inline void sinkhorn_row(const Real* s, const Real* shift, Real inverse, int64_t classes, Real* out) noexcept {
    using Reg = typename V::Reg;
    const Reg factor = V::set(inverse), lowest = V::set(static_cast<Real>(-INFINITY));
    Reg top = lowest;
    each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        const Reg x = V::fma(V::load(s + j, mask), factor, V::load(shift + j, mask));
        V::store(out + j, x, mask);
        top = V::max(top, V::select(mask, x, lowest));
    });
    const Reg highest = V::set(V::horizontal_max(top));
    Reg sum = V::set(0);
    each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        const Reg x = V::sub(V::load(out + j, mask), highest);
        const Reg e = V::exp(V::select(mask, x, lowest));
        V::store(out + j, e, mask);
        sum = V::add(sum, e);
    });
    const Reg share = V::set(Real(1) / V::horizontal_sum(sum));
    each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        V::store(out + j, V::mul(V::load(out + j, mask), share), mask);
    });
}

static void sinkhorn_row_f32(const float* s, const float* shift, float inverse, int64_t classes, float* out) noexcept {
    sinkhorn_row<F32>(s, shift, inverse, classes, out);
}
static void sinkhorn_row_f64(const double* s, const double* shift, double inverse, int64_t classes,
                             double* out) noexcept {
    sinkhorn_row<F64>(s, shift, inverse, classes, out);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
