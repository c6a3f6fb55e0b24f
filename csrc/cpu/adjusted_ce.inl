// Body of adjusted_ce.h. A row is read once from memory, one exp a logit: the exponentials, relative to a reference
// near the row's maximum, wait in scratch for the row's sum, and a last pass scales them into the gradient.
#include <cmath>
#include <limits>
#include <type_traits>

#include "vector_gradients.h"

#define LTK_FORMULA static inline
#include "../formulas.inl"
#include "vector_gradients.inl"

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

// How far a logit may lie above the reference: e^24 times the number of classes is far from overflow, and probabilities
// that far below 1 keep their float precision.
constexpr int kHeadroom = 24;

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
    double z;            // logit of the label, times its label scale
    double target_u;     // adjusted logit of the label, margin included, before the row scale
    double target_a;     // sigma target_u
    double aside;        // how far target_u is below what margin and label scale made it of
    double slope = 1.0;  // of target_a in the label's logit, in units of row scale times class scale
    double smoothing;    // of the label
};

// The factor on the gradient of row i.
template <class Real>
static inline double upstream_of(const AdjustedCe& job, int64_t i) noexcept {
    const double factor =
        job.grad_scale *
        (job.row_coef == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.row_coef)[i]));
    if (job.sample_weight == nullptr) return factor;
    return factor * static_cast<double>(static_cast<const Real*>(job.sample_weight)[i]);
}

// Row i has this loss, before its own weight.
template <class Real>
static inline void put_loss(const AdjustedCe& job, int64_t i, double loss) noexcept {
    if (job.sample_weight != nullptr) loss *= static_cast<double>(static_cast<const Real*>(job.sample_weight)[i]);
    static_cast<Real*>(job.row_loss)[i] = static_cast<Real>(loss);
}

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
template <class V, bool Scale, bool Shift, class T, class Mask>
LTK_INLINE typename V::Reg adjusted(const T* z, const typename V::Real* scale, const typename V::Real* shift, int64_t j,
                                    Mask mask) noexcept {
    typename V::Reg x = V::load(z + j, mask);
    if (Scale && Shift) return V::fma(V::load(scale + j, mask), x, V::load(shift + j, mask));
    if (Scale) return V::mul(V::load(scale + j, mask), x);
    if (Shift) return V::add(x, V::load(shift + j, mask));
    return x;
}

// What a row's softmax needs to know of its classes but the label's.
template <class V>
struct RowSums {
    typename V::Real reference;  // near their largest a_j; -inf where all are masked
    double others = 0.0;         // sum of exp(a_j - reference)
    double smooth_a = 0.0;       // sum of weight_j a_j, where it is asked for
};

// First pass over a row. Where `e` is not null the exponentials are left there, relative to their block's entry of
// block_reference, with 0 in the label's place. A label outside the row leaves no class out.
template <class V, bool Scale, bool Shift, class T, class Table = typename V::Real>
LTK_INLINE RowSums<V> row_sums(const T* z, int64_t classes, const Table* scale, const Table* shift, int64_t label,
                               double row_scale, bool smooth, const Table* weight, Table* e,
                               Table* block_reference) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real infinity = static_cast<Real>(INFINITY);
    const Reg sigma = V::set(static_cast<Real>(row_scale));
    const Reg minus_infinity = V::set(-infinity);
    const auto exponent = [&](int64_t j, auto mask, Reg minus_reference) LTK_INLINE_LAMBDA {
        const Reg x = V::fma(adjusted<V, Scale, Shift>(z, scale, shift, j, mask), sigma, minus_reference);
        return V::select(mask, x, minus_infinity);
    };
    const auto highest_of = [&](int64_t begin, int64_t end) {
        Reg top = minus_infinity;
        for_vectors<V>(begin, end, label, [&](int64_t j, auto mask, int) LTK_INLINE_LAMBDA {
            const Reg a = V::mul(sigma, adjusted<V, Scale, Shift>(z, scale, shift, j, mask));
            top = V::max(top, V::select(mask, a, minus_infinity));
        });
        return V::horizontal_max(top);
    };

    // Any reference near the maximum serves as well as the maximum, and the first columns have one. It moves where a
    // block exceeds it by more than kHeadroom, or where it is -inf because the columns before were masked classes.
    RowSums<V> row;
    row.reference = highest_of(0, classes < 2 * V::N ? classes : 2 * V::N);
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        double here;
        for (bool again = false;; again = true) {
            const Real usable = row.reference == -infinity ? Real(0) : row.reference;
            const Reg minus_reference = V::set(-usable);
            Reg sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
            Reg top[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
            for_vectors<V>(begin, end, label, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
                prefetch(z + j);
                const Reg x = exponent(j, mask, minus_reference);
                top[slot] = V::max(top[slot], x);
                const Reg y = V::exp(x);
                sum[slot] = V::add(sum[slot], y);
                // Every lane is written: the label's place must hold 0, the lanes past the row are padding of the
                // scratch.
                if (e != nullptr) V::store(e + j, y, V::all());
            });
            here = V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
            const Real above = V::horizontal_max(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
            if (again || !(above > kHeadroom || (row.reference == -infinity && above > -infinity))) break;
            const Real moved = highest_of(begin, end);
            if (row.others != 0.0)
                row.others *= std::exp(static_cast<double>(row.reference) - static_cast<double>(moved));
            row.reference = moved;
        }
        row.others += here;
        if (e != nullptr) block_reference[block] = row.reference;

        if (smooth) {
            const Real usable = row.reference == -infinity ? Real(0) : row.reference;
            Reg below = V::set(0), weights = V::set(0);
            for_vectors<V>(begin, end, label, [&](int64_t j, auto mask, int) LTK_INLINE_LAMBDA {
                const Reg a = V::mul(sigma, adjusted<V, Scale, Shift>(z, scale, shift, j, mask));
                const Reg w = weight == nullptr ? V::set(1) : V::load(weight + j, mask);
                below = V::add(below, V::select(mask, V::mul(w, V::sub(a, V::set(usable))), V::set(0)));
                weights = V::add(weights, V::select(mask, w, V::set(0)));
            });
            row.smooth_a += static_cast<double>(V::horizontal_sum(below)) +
                            static_cast<double>(usable) * static_cast<double>(V::horizontal_sum(weights));
        }
    }
    return row;
}

// Loss of one label of one row, whose first pass left `row`, `e` and `block_reference`; its gradient, plus `add` where
// that is not null, goes to `grad` (null: loss only). With Tables its shares of the tables' gradients go to `sums`, and
// `grad` is not null.
template <class V, bool Scale, bool Shift, bool Tables = false, class T, class G>
LTK_INLINE double term_of_sums(const AdjustedCe& job, const T* z, const Term<typename V::Real>& term,
                               const RowSums<V>& row, double upstream, const typename V::Real* e,
                               const typename V::Real* block_reference, const typename V::Real* add, G* grad,
                               const TableSums<typename V::Real>* sums = nullptr) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real* weight = static_cast<const Real*>(job.weight);
    const int64_t classes = job.classes;
    const bool smooth = term.smoothing != 0.0;
    const double row_reference = static_cast<double>(row.reference);
    const double smooth_a = row.smooth_a;

    // A label that towers over the reference (or is the only class left) takes its place: e^710 overflows.
    const bool towers = term.target_a - row_reference > 500.0;
    const double base = towers ? term.target_a : row_reference;
    const double shrink = towers ? std::exp(row_reference - base) : 1.0;
    const double others = row.others * shrink;
    const double label_below = term.target_a - base;
    const double label_e = std::exp(label_below);
    const double total = others + label_e;
    // Near the maximum log(total) would round a small loss away; log1p keeps its relative accuracy.
    const double nll = others < 2.0 * label_e ? log1p_of<Real>(others / label_e) : std::log(total) - label_below;
    double phi, slope;
    focal(job.focal_gamma, nll, &phi, &slope);
    const double label_weight = weight == nullptr ? 1.0 : static_cast<double>(weight[term.label]);
    const double hard = (1.0 - term.smoothing) * label_weight * term.share;
    const double soft = term.smoothing / static_cast<double>(classes) * term.share;
    double loss = hard * phi;
    if (smooth)
        loss += soft * ((std::log(total) + base) * job.smoothing_total - (smooth_a + label_weight * term.target_a));
    if (grad == nullptr) return loss;

    // dL/dz_j = upstream sigma beta_j (G P_j - c_j), G = hard phi' + sum c, c_j = soft weight_j. The label's own entry
    // is minus the sum of the others and not P_y - 1, which cancels to 0 on confident rows.
    const double outer = upstream * term.sigma;
    const double soft_total = smooth ? soft * job.smoothing_total : 0.0;
    const double g = hard * slope + soft_total;
    double label_grad =
        soft_total * (label_e / total) - hard * slope * (others / total) - (smooth ? soft * label_weight : 0.0);
    const double label_h = label_grad * outer;
    // Copies: a store of a vector may alias anything, and `sums` would be read again for each of them.
    Real* const shift_sum = Tables ? sums->shift : nullptr;
    Real* const scale_sum = Tables ? sums->scale : nullptr;
    const bool of_row_scale = Tables && sums->row_scale;
    Real label_sums[2] = {};
    if constexpr (Tables) {
        if (shift_sum != nullptr) label_sums[0] = shift_sum[term.label] + static_cast<Real>(label_h);
        if (scale_sum != nullptr) label_sums[1] = scale_sum[term.label] + static_cast<Real>(label_h * term.z);
    }
    label_grad *= outer * term.slope * (Scale ? static_cast<double>(scale[term.label]) : 1.0);
    if (add != nullptr) label_grad += static_cast<double>(add[term.label]);
    const double per_exponential = outer * g * shrink / total;
    double along = 0.0;  // the row's derivative in sigma
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        const double from = static_cast<double>(block_reference[block]);
        // A block of masked classes alone has reference -inf, and zeros for exponentials.
        const double factor = from == row_reference || from == -INFINITY ? 1.0 : std::exp(from - row_reference);
        const Reg k = V::set(static_cast<Real>(per_exponential * factor));
        const Reg c = V::set(static_cast<Real>(-outer * soft));
        // What the tables' gradients take along. A masked class (-inf) counts as very low: its h is 0, and 0 inf is
        // not.
        const Reg lowest = V::set(std::numeric_limits<Real>::lowest());
        const Reg k_row = V::set(static_cast<Real>(upstream * g * shrink / total * factor));
        const Reg c_row = V::set(static_cast<Real>(-upstream * soft));
        const Reg target_u = V::set(static_cast<Real>(term.target_u));
        Reg along_block = V::set(0);
        const auto take = [&](int64_t j, auto mask, Reg p, Reg h) LTK_INLINE_LAMBDA {
            if (shift_sum != nullptr) V::store(shift_sum + j, V::add(V::load(shift_sum + j, mask), h), mask);
            if (scale_sum != nullptr) {
                const Reg logit = V::max(V::load(z + j, mask), lowest);
                V::store(scale_sum + j, V::fma(h, logit, V::load(scale_sum + j, mask)), mask);
            }
            if (of_row_scale) {
                Reg y = V::mul(k_row, p);
                if (smooth) y = V::add(y, weight == nullptr ? c_row : V::mul(c_row, V::load(weight + j, mask)));
                const Reg u = V::max(adjusted<V, Scale, Shift>(z, scale, shift, j, mask), lowest);
                along_block = V::fma(V::select(mask, y, V::set(0)), V::sub(u, target_u), along_block);
            }
        };
        const auto value = [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            const Reg p = V::load(e + j, mask);
            Reg y = V::mul(k, p);
            if (smooth) y = V::add(y, weight == nullptr ? c : V::mul(c, V::load(weight + j, mask)));
            if constexpr (Tables) take(j, mask, p, y);
            if (Scale) y = V::mul(y, V::load(scale + j, mask));
            if (add != nullptr) y = V::add(y, V::load(add + j, mask));
            return y;
        };
        int64_t j = begin;
        if (job.stream) {
            const int64_t head = V::unaligned(grad + j);
            if (head > 0 && j < end) {
                const int64_t n = head < end - j ? head : end - j;
                V::store(grad + j, value(j, V::first(n)), V::first(n));
                j += n;
            }
            for (; j + V::N <= end; j += V::N) V::stream(grad + j, value(j, V::all()));
        } else {
            for (; j + V::N <= end; j += V::N) V::store(grad + j, value(j, V::all()), V::all());
        }
        if (j < end) V::store(grad + j, value(j, V::first(end - j)), V::first(end - j));
        if constexpr (Tables) along += static_cast<double>(V::horizontal_sum(along_block));
    }
    put(label_grad, grad + term.label);
    if constexpr (Tables) {
        // The loops went over the label's place, where smoothing alone leaves something.
        if (shift_sum != nullptr) shift_sum[term.label] = label_sums[0];
        if (scale_sum != nullptr) scale_sum[term.label] = label_sums[1];
        if (smooth && term.aside != 0.0) along += upstream * soft * label_weight * term.aside;
        sums->terms[0] = static_cast<Real>(-label_h);
        sums->terms[1] = static_cast<Real>(along);
        sums->terms[2] = static_cast<Real>(upstream * term.share * phi);
    }
    return loss;
}

// The same from the first pass on.
template <class V, bool Scale, bool Shift, bool Tables = false, class T, class G>
static inline double row_term(const AdjustedCe& job, const T* z, const Term<typename V::Real>& term, double upstream,
                              typename V::Real* e, typename V::Real* block_reference, const typename V::Real* add,
                              G* grad, const TableSums<typename V::Real>* sums = nullptr) noexcept {
    using Real = typename V::Real;
    const RowSums<V> row =
        row_sums<V, Scale, Shift>(z, job.classes, static_cast<const Real*>(job.scale),
                                  static_cast<const Real*>(job.shift), term.label, term.sigma, term.smoothing != 0.0,
                                  static_cast<const Real*>(job.weight), grad == nullptr ? nullptr : e, block_reference);
    return term_of_sums<V, Scale, Shift, Tables>(job, z, term, row, upstream, e, block_reference, add, grad, sums);
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
    term.slope = at(job.label_scale, 1.0);
    term.smoothing = at(job.smoothing, job.label_smoothing);
    term.z = term.slope * z;
    const double scale = at(job.scale, 1.0), margin = at(job.margin, 0.0);
    term.target_u = scale * term.z + at(job.shift, 0.0) - margin;
    term.target_a = term.sigma * term.target_u;
    term.aside = job.label_scale == nullptr ? margin : margin + scale * (z - term.z);
    return term;
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk

#include "adjusted_ce_narrow.inl"

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, bool Scale, bool Shift, class T, bool Tables = false>
static void rows(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    if (narrow_serves<V>(job)) return narrow_rows<V, Scale, Shift, T, Tables>(job, begin, end);
    Real* e = static_cast<Real*>(scratch);
    Real* first = e + adjusted_ce_row(job.classes);  // gradient of a mixed row's first label
    // Tables need the last pass over a row; without `grad` what it writes is left here.
    T* unwanted = reinterpret_cast<T*>(first + adjusted_ce_row(job.classes));
    Real* block_reference = first + 2 * adjusted_ce_row(job.classes);
    TableSums<Real> sums{};
    if constexpr (Tables) sums = table_sums<Real>(job, begin);
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        T* grad = job.grad != nullptr ? static_cast<T*>(job.grad) + i * job.grad_stride : Tables ? unwanted : nullptr;
        const int64_t label = job.target[i];
        if (label == job.ignore_index) {
            static_cast<Real*>(job.row_loss)[i] = 0;
            if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.classes) * sizeof(T));
            continue;
        }
        const double upstream = upstream_of<Real>(job, i);
        const double lam = job.target_b == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.lam)[i]);
        const Term<Real> a = make_term<V>(job, get(z + label), label, lam);
        if constexpr (Tables)
            sums.terms = static_cast<Real*>(job.vectors->terms) + i * kRowTerms * (job.target_b == nullptr ? 1 : 2);
        if (job.target_b == nullptr) {
            put_loss<Real>(
                job, i,
                row_term<V, Scale, Shift, Tables>(job, z, a, upstream, e, block_reference, nullptr, grad, &sums));
            continue;
        }
        const int64_t label_b = job.target_b[i];
        const Term<Real> b = make_term<V>(job, get(z + label_b), label_b, 1.0 - lam);
        double sum = row_term<V, Scale, Shift, Tables>(job, z, a, upstream, e, block_reference, nullptr,
                                                       grad == nullptr ? nullptr : first, &sums);
        sums.terms += kRowTerms;
        sum += row_term<V, Scale, Shift, Tables>(job, z, b, upstream, e, block_reference, first, grad, &sums);
        put_loss<Real>(job, i, sum);
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
    if (job.vectors != nullptr && job.scale != nullptr) return rows<V, true, true, T, true>(job, begin, end, scratch);
    if (job.vectors != nullptr) return rows<V, false, true, T, true>(job, begin, end, scratch);
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
