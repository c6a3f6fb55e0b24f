// Binary cross-entropy over the classes with one positive, the label: one pass, loss and gradient together.
//   row loss = alpha_y ( phi(softplus(-z_y)) + sum over j != y of negative_j phi(softplus(z_j)) ),   phi(l) = (1 -
//   e^-l)^gamma l

namespace ltk {
namespace LTK_NAMESPACE {

// log(1 + t), 0 <= t <= 1, as 2 atanh(t / (2 + t)): keeps the relative accuracy of a small t. At most 3 ULP.
template <class Reg, class V>
static inline Reg log1p_unit(Reg t, V) noexcept {
    const Reg s = t / V::add(t, V::set(2.0f));
    const Reg x = V::mul(s, s);
    Reg q = V::fma(V::set(2.0f / 13), x, V::set(2.0f / 11));
    q = V::fma(q, x, V::set(2.0f / 9));
    q = V::fma(q, x, V::set(2.0f / 7));
    q = V::fma(q, x, V::set(2.0f / 5));
    q = V::fma(q, x, V::set(2.0f / 3));
    return V::fma(V::mul(q, x), s, V::add(s, s));
}
static inline double log1p_unit(double t, F64) noexcept {
    return std::log1p(t);
}

// phi(softplus(x)) and its derivative in x, for one logit in double.
static inline void focal_softplus(double gamma, double x, double* value, double* slope) noexcept {
    const double t = std::exp(-std::fabs(x));
    const double log1p_t = std::log1p(t);
    const double l = (x > 0.0 ? x : 0.0) + log1p_t;
    const double p = (x < 0.0 ? t : 1.0) / (1.0 + t);
    if (gamma == 0.0) {
        *value = l;
        *slope = p;
        return;
    }
    const double q = (x < 0.0 ? 1.0 : t) / (1.0 + t);  // 1 - p without cancellation
    const double power = std::exp(-gamma * ((x < 0.0 ? -x : 0.0) + log1p_t));
    *value = power * l;
    *slope = power * (p + gamma * q * l);
}

template <class V, bool Focal, class T, class G>
static inline double sigmoid_term(const AdjustedCe& job, const T* z, int64_t label, double share, double upstream,
                                  const typename V::Real* add, G* grad) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* negative = static_cast<const Real*>(job.closed.table);
    const double hard =
        share * (job.weight == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.weight)[label]));
    const Reg outer = V::set(static_cast<Real>(hard * upstream));
    const Reg gamma = V::set(static_cast<Real>(job.focal_gamma));
    const Reg zero = V::set(0), one = V::set(1);
    // Before anything is written: the gradient may replace the logits.
    double value, slope;
    focal_softplus(job.focal_gamma, -get(z + label), &value, &slope);

    double others = 0.0;
    for (int64_t begin = 0; begin < job.classes; begin += kBlock) {
        const int64_t end = begin + kBlock < job.classes ? begin + kBlock : job.classes;
        Reg sum[4] = {zero, zero, zero, zero};
        for_vectors<V>(begin, end, label, [&](int64_t j, auto mask, int slot) {
            const Reg x = V::load(z + j, mask);
            const Reg minus = V::sub(zero, x);
            const Reg t = V::exp(V::sub(zero, V::max(x, minus)));
            const Reg log1p_t = log1p_unit(t, V{});
            Reg l = V::add(V::max(x, zero), log1p_t);
            const Reg inverse = one / V::add(one, t);
            const Reg p = V::mul(x < zero ? t : one, inverse);
            Reg d = p;
            if (Focal) {
                const Reg q = V::mul(x < zero ? one : t, inverse);
                const Reg power = V::exp(V::sub(zero, V::mul(gamma, V::add(V::max(minus, zero), log1p_t))));
                d = V::mul(power, V::fma(V::mul(gamma, q), l, p));
                l = V::mul(power, l);
            }
            if (negative != nullptr) {
                const Reg w = V::load(negative + j, mask);
                l = V::mul(w, l);
                d = V::mul(w, d);
            }
            sum[slot] = V::add(sum[slot], V::select(mask, l, zero));
            if (grad == nullptr) return;
            d = V::mul(outer, d);
            if (add != nullptr) d = V::add(d, V::load(add + j, mask));
            V::store(grad + j, d, mask);
        });
        others += static_cast<double>(V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))));
    }
    if (grad != nullptr) {
        double label_grad = -hard * upstream * slope;
        if (add != nullptr) label_grad += static_cast<double>(add[label]);
        put(label_grad, grad + label);
    }
    return hard * (value + others);
}

template <class V, bool Focal, class T>
static void sigmoid_rows_of(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    Real* first = static_cast<Real*>(scratch);
    const Real* nothing = nullptr;
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        T* grad = job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + i * job.grad_stride;
        const int64_t label = job.target[i];
        if (label == job.ignore_index) {
            static_cast<Real*>(job.row_loss)[i] = 0;
            if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.classes) * sizeof(T));
            continue;
        }
        const double upstream = upstream_of<Real>(job, i);
        if (job.target_b == nullptr) {
            put_loss<Real>(job, i, sigmoid_term<V, Focal>(job, z, label, 1.0, upstream, nothing, grad));
            continue;
        }
        const double lam = static_cast<double>(static_cast<const Real*>(job.lam)[i]);
        double sum = sigmoid_term<V, Focal>(job, z, label, lam, upstream, nothing, grad == nullptr ? nullptr : first);
        sum += sigmoid_term<V, Focal>(job, z, job.target_b[i], 1.0 - lam, upstream, first, grad);
        put_loss<Real>(job, i, sum);
    }
}

template <class V, class T>
static void sigmoid_rows(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    if (job.focal_gamma != 0.0) return sigmoid_rows_of<V, true, T>(job, begin, end, scratch);
    sigmoid_rows_of<V, false, T>(job, begin, end, scratch);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
