// Binary cross-entropy over the classes, one of them positive (the label) or any number (multi-label targets): one
// pass, loss and gradient together; sigmoid_ce.h has the formula. Both calls of it stand on `sigmoid_row`: the closed
// form of adjusted_ce.h, below, and sigmoid_ce.inl.
#include "sigmoid_ce.h"

namespace ltk {
namespace LTK_NAMESPACE {

// log(1 + t), 0 <= t <= 1, as 2 atanh(w), w = t / (2 + t): keeps the relative accuracy of a small t. At most 4 ULP.
template <class Reg, class V>
static inline Reg log1p_unit(Reg, Reg w, V) noexcept {
    return two_atanh<V>(w);
}
static inline double log1p_unit(double t, double, F64) noexcept {
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

// The tables of the closed form: its factors of the positives, where there are any, are a second row of its table.
static inline SigmoidTables sigmoid_tables(const AdjustedCe& job, size_t real) noexcept {
    SigmoidTables s{};
    s.negative = job.closed.table;
    if (job.closed.options[1] != 0.0)
        s.positive = static_cast<const char*>(job.closed.table) + static_cast<size_t>(job.classes) * real;
    s.scale = job.scale;
    s.shift = job.shift;
    s.threshold = job.closed.options[0];
    s.focal_gamma = job.focal_gamma;
    return s;
}

// log(theta / (1 - theta)), which a_j is compared with; -inf without a threshold.
static inline double threshold_logit(double theta) noexcept {
    return theta > 0.0 ? std::log(theta / (1.0 - theta)) : -INFINITY;
}

// What a row needs beside its logits. Dense: `hot` holds its targets and `label` is -1.
template <class Real, class Hot>
struct SigmoidRow {
    const SigmoidTables* tables;
    int64_t classes;
    int64_t label;
    const Hot* hot;
    Real ignored;        // entries of `hot` that count for nothing, beside -1
    double hard;         // factor of the loss
    double upstream;     // factor of the gradient beside it
    Real* of_positives;  // sums of |d l / d a_j| over the rows, before both factors; null where not wanted
    Real* of_negatives;
    bool bad = false;  // out: an entry of `hot` is none of 0, 1 and ignored
};

// The rebalanced weight of a class, a function of its share q_j / (sum of the row's positive q).
template <class V>
static inline typename V::Reg rebalanced(typename V::Reg share, const double* map) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Reg zero = V::set(0), one = V::set(1);
    const Reg y = V::mul(V::set(static_cast<Real>(map[1])), V::sub(share, V::set(static_cast<Real>(map[2]))));
    const Reg t = V::exp(V::sub(zero, V::max(y, V::sub(zero, y))));
    return V::add(V::set(static_cast<Real>(map[0])), (y < zero ? t : one) / V::add(one, t));
}

// General: there may be more than factors of the negatives. The gradient of the row, plus `add` where that is not null,
// goes to `grad` (null: loss only), which may be the logits.
template <class V, bool Focal, bool General, bool Dense, class Hot, class T, class G>
static inline double sigmoid_row(SigmoidRow<typename V::Real, Hot>& row, const T* z, const typename V::Real* add,
                                 G* grad) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const SigmoidTables& s = *row.tables;
    const int64_t classes = row.classes, label = row.label;
    const Real* negative = static_cast<const Real*>(s.negative);
    const Real* positive = General ? static_cast<const Real*>(s.positive) : nullptr;
    const Real* scale = General ? static_cast<const Real*>(s.scale) : nullptr;
    const Real* shift = General ? static_cast<const Real*>(s.shift) : nullptr;
    const Real* rebalance = General ? static_cast<const Real*>(s.rebalance) : nullptr;
    Real* const of_positives = General ? row.of_positives : nullptr;
    Real* const of_negatives = General ? row.of_negatives : nullptr;
    const Reg zero = V::set(0), one = V::set(1), two = V::set(2);
    const Reg outer = V::set(static_cast<Real>(row.hard * row.upstream));
    const Reg gamma = V::set(static_cast<Real>(s.focal_gamma));
    const Reg theta = V::set(static_cast<Real>(threshold_logit(General ? s.threshold : 0.0)));
    const Reg steep = V::set(static_cast<Real>(General ? s.negative_scale : 1.0));
    const bool thresholded = General && s.threshold > 0.0;
    const bool focal = General ? s.focal_gamma != 0.0 : Focal;  // what is general is compiled once for both

    double share = 0.0;  // sum of the positives' q
    if (rebalance != nullptr) {
        if constexpr (Dense) {
            Reg sum = zero;
            each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
                const Reg q = V::load(rebalance + j, mask);
                sum = V::add(sum, V::load(row.hot + j, mask) == one ? q : zero);
            });
            share = static_cast<double>(V::horizontal_sum(sum));
        } else {
            share = static_cast<double>(rebalance[label]);
        }
    }
    const Reg per_share = V::set(static_cast<Real>(1.0 / share));

    // The label, before anything is written: the gradient may replace the logits.
    double value = 0.0, slope = 0.0;
    if constexpr (!Dense) {
        double a = get(z + label);
        if (scale != nullptr) a *= static_cast<double>(scale[label]);
        if (shift != nullptr) a += static_cast<double>(shift[label]);
        focal_softplus(s.focal_gamma, -a, &value, &slope);
        double factor = positive == nullptr ? 1.0 : static_cast<double>(positive[label]);
        if (rebalance != nullptr) factor *= s.map[0] + 1.0 / (1.0 + std::exp(-s.map[1] * (1.0 - s.map[2])));
        value *= factor;
        slope *= factor;
        if (of_positives != nullptr) of_positives[label] += static_cast<Real>(slope);
        if (scale != nullptr) slope *= static_cast<double>(scale[label]);
    }

    double others = 0.0;
    Reg strange = zero;
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        Reg sum[4] = {zero, zero, zero, zero};
        const auto each = [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
            Reg a = V::load(z + j, mask);
            if (scale != nullptr) a = V::mul(a, V::load(scale + j, mask));
            if (shift != nullptr) a = V::add(a, V::load(shift + j, mask));
            Reg x = General ? V::mul(steep, a) : a;
            Reg hot = zero, sign = one;
            if constexpr (Dense) {
                hot = V::load(row.hot + j, mask);
                sign = V::sub(one, V::add(hot, hot));  // -1 for a positive
                x = hot == one ? V::mul(sign, a) : x;
            }
            const Reg minus = V::sub(zero, x);
            const Reg t = V::exp(V::sub(zero, V::max(x, minus)));
            // One division for 1 / (1 + t) and for t / (2 + t), which log1p is made of.
            const Reg t1 = V::add(one, t), t2 = V::add(two, t);
            const Reg both = one / V::mul(t1, t2);
            const Reg inverse = V::mul(both, t2);
            const Reg log1p_t = log1p_unit(t, V::mul(V::mul(t, t1), both), V{});
            Reg l = V::add(V::max(x, zero), log1p_t);
            const Reg p = V::mul(x < zero ? t : one, inverse);
            Reg d = p;
            if (focal) {
                const Reg q = V::mul(x < zero ? one : t, inverse);
                const Reg power = V::exp(V::sub(zero, V::mul(gamma, V::add(V::max(minus, zero), log1p_t))));
                d = V::mul(power, V::fma(V::mul(gamma, q), l, p));
                l = V::mul(power, l);
            }
            if constexpr (General) {
                d = Dense ? (hot == one ? d : V::mul(steep, d)) : V::mul(steep, d);
                if (thresholded) {  // a NaN stays
                    const Reg kept_l = a < theta ? zero : l, kept_d = a < theta ? zero : d;
                    l = Dense ? (hot == one ? l : kept_l) : kept_l;
                    d = Dense ? (hot == one ? d : kept_d) : kept_d;
                }
                if (rebalance != nullptr) {
                    const Reg w = rebalanced<V>(V::mul(V::load(rebalance + j, mask), per_share), s.map);
                    l = V::mul(w, l);
                    d = V::mul(w, d);
                }
            }
            if (negative != nullptr || (Dense && positive != nullptr)) {
                Reg w = negative == nullptr ? one : V::load(negative + j, mask);
                if (Dense) w = hot == one ? (positive == nullptr ? one : V::load(positive + j, mask)) : w;
                l = V::mul(w, l);
                d = V::mul(w, d);
            }
            if constexpr (Dense) {  // what is neither 0 nor 1 counts for nothing, whatever its logit is
                const Reg neither = V::mul(hot, V::sub(hot, one));
                strange = neither == zero ? strange : one;
                l = neither == zero ? l : zero;
                d = neither == zero ? d : zero;
                if (of_positives != nullptr) {
                    const Reg here = hot == one ? d : zero, there = hot == one ? zero : d;
                    V::store(of_positives + j, V::add(V::load(of_positives + j, mask), here), mask);
                    V::store(of_negatives + j, V::add(V::load(of_negatives + j, mask), there), mask);
                }
                d = V::mul(sign, d);
            } else if (of_negatives != nullptr) {
                V::store(of_negatives + j, V::add(V::load(of_negatives + j, mask), d), mask);
            }
            sum[slot] = V::add(sum[slot], V::select(mask, l, zero));
            if (grad == nullptr) return;
            if (scale != nullptr) d = V::mul(d, V::load(scale + j, mask));
            d = V::mul(outer, d);
            if (add != nullptr) d = V::add(d, V::load(add + j, mask));
            V::store(grad + j, d, mask);
        };
        if constexpr (Dense)
            each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA { each(j, mask, 0); });
        else
            for_vectors<V>(begin, end, label, each);
        others += static_cast<double>(V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))));
    }
    if constexpr (Dense) {
        row.bad = false;
        if (V::horizontal_max(strange) > Real(0))
            for (int64_t j = 0; j < classes; ++j) {
                const Real entry = static_cast<Real>(row.hot[j]);
                row.bad |= !(entry == Real(0) || entry == Real(1) || entry == Real(-1) || entry == row.ignored);
            }
    }
    if (!Dense && grad != nullptr) {
        double label_grad = -row.hard * row.upstream * slope;
        if (add != nullptr) label_grad += static_cast<double>(add[label]);
        put(label_grad, grad + label);
    }
    return row.hard * (value + others);
}

template <class V, bool Focal, bool General, class T>
static void sigmoid_rows_of(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    Real* first = static_cast<Real*>(scratch);
    const Real* nothing = nullptr;
    const SigmoidTables tables = sigmoid_tables(job, sizeof(Real));
    const auto one_label = [&](const T* z, int64_t label, double share, double upstream, const Real* add, auto* grad) {
        SigmoidRow<Real, Real> row{};
        row.tables = &tables;
        row.classes = job.classes;
        row.label = label;
        row.hard = share;
        if (job.weight != nullptr) row.hard *= static_cast<double>(static_cast<const Real*>(job.weight)[label]);
        row.upstream = upstream;
        return sigmoid_row<V, Focal, General, false>(row, z, add, grad);
    };
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
            put_loss<Real>(job, i, one_label(z, label, 1.0, upstream, nothing, grad));
            continue;
        }
        const double lam = static_cast<double>(static_cast<const Real*>(job.lam)[i]);
        double sum = one_label(z, label, lam, upstream, nothing, grad == nullptr ? nullptr : first);
        sum += one_label(z, job.target_b[i], 1.0 - lam, upstream, first, grad);
        put_loss<Real>(job, i, sum);
    }
}

template <class V, class T>
static void sigmoid_rows(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    const bool general =
        job.scale != nullptr || job.shift != nullptr || job.closed.options[0] != 0.0 || job.closed.options[1] != 0.0;
    if (general) return sigmoid_rows_of<V, true, true, T>(job, begin, end, scratch);
    if (job.focal_gamma != 0.0) return sigmoid_rows_of<V, true, false, T>(job, begin, end, scratch);
    sigmoid_rows_of<V, false, false, T>(job, begin, end, scratch);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
