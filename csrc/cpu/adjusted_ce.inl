// Body of adjusted_ce.h. A row is read once from memory: block by block, each block's maximum and then its exponentials
// while the block sits in the first-level cache; one exp a logit. The exponentials wait in scratch, relative to their
// block's maximum, for the row's sum, and a last pass scales them into the gradient.
#include <cmath>

namespace ltk {
namespace LTK_NAMESPACE {

static inline double get(const double* p) noexcept {
    return *p;
}
static inline double get(const float* p) noexcept {
    return static_cast<double>(*p);
}
static inline double get(const bf16* p) noexcept {
    return static_cast<double>(to_float(*p));
}
static inline double get(const f16* p) noexcept {
    return static_cast<double>(to_float(*p));
}
static inline void put(double x, double* p) noexcept {
    *p = x;
}
static inline void put(double x, float* p) noexcept {
    *p = static_cast<float>(x);
}
static inline void put(double x, bf16* p) noexcept {
    from_float(static_cast<float>(x), p);
}
static inline void put(double x, f16* p) noexcept {
    from_float(static_cast<float>(x), p);
}

// Most rows have one block, or the label at the maximum: then the argument is 0, and libm's exp is a fifth of a short
// row's time.
static inline double exp_of(double x) noexcept {
    return x == 0.0 ? 1.0 : std::exp(x);
}

// log(1 + x) for x >= 0. In double precision log(1 + x) itself is good to float accuracy down to 1e-7, at a third of
// log1p's time.
template <class Real>
static inline double log1p_of(double x) noexcept {
    if (sizeof(Real) == sizeof(double)) return std::log1p(x);
    return x < 1e-7 ? x : std::log(1.0 + x);
}

// What one label of one row needs.
template <class Real>
struct Term {
    int64_t label;
    double share;        // lam, 1 - lam, or 1
    double sigma;        // row scale
    double target_a;     // adjusted logit of the label, margin included
    double slope = 1.0;  // of target_a in the label's logit, in units of row scale times class scale
};

// Calls f(j, mask, slot) for the vectors of [begin, end), the label's lane masked out. `slot` rotates over 0..3 in the
// long runs of full vectors, for four independent accumulators. The three calls stay separate loops: a test per vector
// costs more than the exp.
template <class V, class F>
LTK_INLINE void for_vectors(int64_t begin, int64_t end, int64_t label, F f) noexcept {
    constexpr int64_t n = V::N;
    const int64_t full = begin + (end - begin) / n * n;
    const bool here = label >= begin && label < end;
    const int64_t at = here ? begin + (label - begin) / n * n : end;
    int64_t j = begin;
    for (int part = 0; part < 2; ++part) {
        const int64_t stop = part == 0 && at < full ? at : full;
        for (; j + 4 * n <= stop; j += 4 * n) {
            f(j, V::all(), 0);
            f(j + n, V::all(), 1);
            f(j + 2 * n, V::all(), 2);
            f(j + 3 * n, V::all(), 3);
        }
        for (; j < stop; j += n) f(j, V::all(), 0);
        if (part == 0 && at < full) {
            f(at, V::without(V::all(), label - at), 0);
            j += n;
        }
    }
    if (full < end) {
        typename V::Mask mask = V::first(end - full);
        if (at == full) mask = V::without(mask, label - at);
        f(full, mask, 0);
    }
}

// beta * z + delta of one vector.
template <class V, bool Scale, bool Shift, class T>
LTK_INLINE typename V::Reg adjusted(const T* z, const typename V::Real* scale, const typename V::Real* shift, int64_t j,
                                    typename V::Mask mask) noexcept {
    typename V::Reg x = V::load(z + j, mask);
    if (Scale && Shift) return V::fma(V::load(scale + j, mask), x, V::load(shift + j, mask));
    if (Scale) return V::mul(V::load(scale + j, mask), x);
    if (Shift) return V::add(x, V::load(shift + j, mask));
    return x;
}

// phi(l) = (1 - e^-l)^gamma l and its derivative, in log space: 1 - p = -expm1(-l) is exact where p rounds to 1.
static inline void focal(double gamma, double l, double* phi, double* slope) noexcept {
    if (gamma == 0.0) {
        *phi = l;
        *slope = 1.0;
        return;
    }
    const double q = -std::expm1(-l);
    if (q <= 0.0) {  // also the limit at l = 0 for every gamma > 0; a NaN falls through
        *phi = 0.0;
        *slope = 0.0;
        return;
    }
    const double power = std::pow(q, gamma);
    const double p = std::exp(-l);
    *phi = power * l;
    *slope = power + (p > 0.0 ? gamma * l * p * power / q : 0.0);
}

// Loss of one label of one row; its gradient, plus `add` where that is not null, goes to `grad` (null: loss only).
template <class V, bool Scale, bool Shift, class T, class G>
static inline double row_term(const AdjustedCe& job, const T* z, const Term<typename V::Real>& term, double upstream,
                              typename V::Real* e, typename V::Real* block_max, const typename V::Real* add,
                              G* grad) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    using Mask = typename V::Mask;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real* weight = static_cast<const Real*>(job.weight);
    const int64_t classes = job.classes;
    const Real infinity = static_cast<Real>(INFINITY);
    const Reg sigma = V::set(static_cast<Real>(term.sigma));
    const Reg minus_infinity = V::set(-infinity);
    const bool smooth = job.label_smoothing != 0.0;

    double highest = term.target_a;
    double others = 0.0;    // sum of exp(a - highest) over the classes but the label
    double smooth_a = 0.0;  // sum of weight * a over the classes but the label
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        Reg top[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
        for_vectors<V>(begin, end, term.label, [&](int64_t j, Mask mask, int slot) LTK_INLINE_LAMBDA {
            const Reg a = V::mul(sigma, adjusted<V, Scale, Shift>(z, scale, shift, j, mask));
            top[slot] = V::max(top[slot], V::select(mask, a, minus_infinity));
        });
        Real local = V::horizontal_max(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
        const double block_top = local;
        block_max[block] = local;
        // A block of masked classes, or of the label alone, has no maximum; 0 makes its exponentials 0 and not NaN.
        if (local == -infinity) local = 0;

        const Reg reference = V::set(-local);
        Reg sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
        for_vectors<V>(begin, end, term.label, [&](int64_t j, Mask mask, int slot) LTK_INLINE_LAMBDA {
            const Reg x = adjusted<V, Scale, Shift>(z, scale, shift, j, mask);
            const Reg y = V::exp(V::select(mask, V::fma(x, sigma, reference), minus_infinity));
            sum[slot] = V::add(sum[slot], y);
            // Every lane is written: the label's place must hold 0, the lanes past the row are padding of the scratch.
            if (grad != nullptr) V::store(e + j, y, V::all());
        });
        const double here = V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
        if (block_top > highest) {
            others = (others == 0.0 ? 0.0 : others * std::exp(highest - block_top)) + here;
            highest = block_top;
        } else if (here != 0.0) {  // true for NaN
            others += here * exp_of(static_cast<double>(local) - highest);
        }

        if (smooth) {
            Reg below = V::set(0), weights = V::set(0);
            for_vectors<V>(begin, end, term.label, [&](int64_t j, Mask mask, int) LTK_INLINE_LAMBDA {
                const Reg a = V::mul(sigma, adjusted<V, Scale, Shift>(z, scale, shift, j, mask));
                const Reg w = weight == nullptr ? V::set(1) : V::load(weight + j, mask);
                below = V::add(below, V::select(mask, V::mul(w, V::add(a, reference)), V::set(0)));
                weights = V::add(weights, V::select(mask, w, V::set(0)));
            });
            smooth_a += static_cast<double>(V::horizontal_sum(below)) +
                        static_cast<double>(local) * static_cast<double>(V::horizontal_sum(weights));
        }
    }

    const double label_e = exp_of(term.target_a - highest);
    const double total = others + label_e;
    // Near the maximum log(total) would round a small loss away; log1p keeps its relative accuracy.
    const double label_below = term.target_a - highest;
    const double nll = label_below > -1.0 ? log1p_of<Real>(others / label_e) : std::log(total) - label_below;
    double phi, slope;
    focal(job.focal_gamma, nll, &phi, &slope);
    const double label_weight = weight == nullptr ? 1.0 : static_cast<double>(weight[term.label]);
    const double hard = (1.0 - job.label_smoothing) * label_weight * term.share;
    const double soft = job.label_smoothing / static_cast<double>(classes) * term.share;
    double loss = hard * phi;
    if (smooth)
        loss += soft * ((std::log(total) + highest) * job.smoothing_total - (smooth_a + label_weight * term.target_a));
    if (grad == nullptr) return loss;

    // dL/dz_j = upstream sigma beta_j (G P_j - c_j), G = hard phi' + sum c, c_j = soft weight_j. The label's own entry
    // is minus the sum of the others and not P_y - 1, which cancels to 0 on confident rows.
    const double outer = upstream * term.sigma;
    const double soft_total = smooth ? soft * job.smoothing_total : 0.0;
    const double g = hard * slope + soft_total;
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        const double factor = exp_of(static_cast<double>(block_max[block]) - highest) / total;
        const Reg k = V::set(static_cast<Real>(outer * g * factor));
        const Reg c = V::set(static_cast<Real>(-outer * soft));
        const auto write = [&](int64_t j, Mask mask) LTK_INLINE_LAMBDA {
            Reg y = V::mul(k, V::load(e + j, mask));
            if (smooth) y = V::add(y, weight == nullptr ? c : V::mul(c, V::load(weight + j, mask)));
            if (Scale) y = V::mul(y, V::load(scale + j, mask));
            if (add != nullptr) y = V::add(y, V::load(add + j, mask));
            V::store(grad + j, y, mask);
        };
        int64_t j = begin;
        for (; j + V::N <= end; j += V::N) write(j, V::all());
        if (j < end) write(j, V::first(end - j));
    }
    double label_grad =
        soft_total * (label_e / total) - hard * slope * (others / total) - (smooth ? soft * label_weight : 0.0);
    label_grad *= outer * term.slope * (Scale ? static_cast<double>(scale[term.label]) : 1.0);
    if (add != nullptr) label_grad += static_cast<double>(add[term.label]);
    put(label_grad, grad + term.label);
    return loss;
}

template <class V>
static inline Term<typename V::Real> make_term(const AdjustedCe& job, double z, int64_t label, double share) noexcept {
    using Real = typename V::Real;
    const auto at = [label](const void* table, double neutral) {
        return table == nullptr ? neutral : static_cast<double>(static_cast<const Real*>(table)[label]);
    };
    Term<Real> term;
    term.label = label;
    term.share = share;
    term.sigma = at(job.row_scale, 1.0);
    term.target_a = term.sigma * (at(job.scale, 1.0) * z + at(job.shift, 0.0) - at(job.margin, 0.0));
    return term;
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk

#include "adjusted_ce_narrow.inl"

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, bool Scale, bool Shift, class T>
static void rows(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    if (narrow_serves<V>(job)) return narrow_rows<V, Scale, Shift, T>(job, begin, end);
    Real* e = static_cast<Real*>(scratch);
    Real* first = e + adjusted_ce_row(job.classes);  // gradient of a mixed row's first label
    Real* block_max = first + adjusted_ce_row(job.classes);
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        T* grad = job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + i * job.grad_stride;
        Real* loss = static_cast<Real*>(job.row_loss) + i;
        const int64_t label = job.target[i];
        if (label == job.ignore_index) {
            *loss = 0;
            if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.classes) * sizeof(T));
            continue;
        }
        const double upstream =
            job.grad_scale *
            (job.row_coef == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.row_coef)[i]));
        const double lam = job.target_b == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.lam)[i]);
        const Term<Real> a = make_term<V>(job, get(z + label), label, lam);
        if (job.target_b == nullptr) {
            *loss = static_cast<Real>(row_term<V, Scale, Shift>(job, z, a, upstream, e, block_max, nullptr, grad));
            continue;
        }
        const int64_t label_b = job.target_b[i];
        const Term<Real> b = make_term<V>(job, get(z + label_b), label_b, 1.0 - lam);
        double sum =
            row_term<V, Scale, Shift>(job, z, a, upstream, e, block_max, nullptr, grad == nullptr ? nullptr : first);
        sum += row_term<V, Scale, Shift>(job, z, b, upstream, e, block_max, first, grad);
        *loss = static_cast<Real>(sum);
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk

#include "closed_forms.inl"
#include "sigmoid_bce.inl"

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, class T>
static void rows_of(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    if (job.closed.form == Form::sigmoid) return sigmoid_rows<V, T>(job, begin, end, scratch);
    if (job.closed.form != Form::none) return closed_rows<V, T>(job, begin, end, scratch);
    if (job.scale != nullptr && job.shift != nullptr) return rows<V, true, true, T>(job, begin, end, scratch);
    if (job.scale != nullptr) return rows<V, true, false, T>(job, begin, end, scratch);
    if (job.shift != nullptr) return rows<V, false, true, T>(job, begin, end, scratch);
    rows<V, false, false, T>(job, begin, end, scratch);
}

// Named by type, and by ISA through the namespace: a profile reads without the source.
static void adjusted_ce_f32(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    rows_of<F32, float>(job, begin, end, scratch);
}
static void adjusted_ce_f64(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    rows_of<F64, double>(job, begin, end, scratch);
}
static void adjusted_ce_bf16(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    rows_of<F32, bf16>(job, begin, end, scratch);
}
static void adjusted_ce_f16(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    rows_of<F32, f16>(job, begin, end, scratch);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
