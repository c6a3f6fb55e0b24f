// Body of row_logsumexp.h. Columns are sorted by group, so that a row is at most two ranges of others around one of its
// own, and no loop has a mask in it. Each side has a reference of its own: with one, a group far below the others would
// be lost.

namespace ltk {
namespace LTK_NAMESPACE {

// Calls f(begin, end) for the parts of [begin, end) around `absent`, in runs of at most kBlock columns.
template <class F>
LTK_INLINE void present_runs(int64_t begin, int64_t end, int64_t absent, F f) noexcept {
    const bool here = absent >= begin && absent < end;
    for (int part = 0; part < (here ? 2 : 1); ++part) {
        const int64_t last = here && part == 0 ? absent : end;
        for (int64_t at = part == 1 ? absent + 1 : begin; at < last; at += kBlock)
            f(at, at + kBlock < last ? at + kBlock : last);
    }
}

// Calls f(j, mask, slot); `slot` rotates over four independent accumulators.
template <class V, class F>
LTK_INLINE void slotted_vectors(int64_t begin, int64_t end, F f) noexcept {
    int64_t j = begin;
    for (; j + 4 * V::N <= end; j += 4 * V::N) {
        f(j, V::all(), 0);
        f(j + V::N, V::all(), 1);
        f(j + 2 * V::N, V::all(), 2);
        f(j + 3 * V::N, V::all(), 3);
    }
    for (; j + V::N <= end; j += V::N) f(j, V::all(), 0);
    if (j < end) f(j, V::first(end - j), 0);
}

template <class V, bool Shift, class Real = typename V::Real>
LTK_INLINE Real highest(const Real* x, const Real* shift, typename V::Reg sigma, int64_t begin, int64_t end,
                        int64_t absent) noexcept {
    using Reg = typename V::Reg;
    const Reg lowest = V::set(static_cast<Real>(-INFINITY));
    Reg top[4] = {lowest, lowest, lowest, lowest};
    present_runs(begin, end, absent, [&](int64_t from, int64_t to) LTK_INLINE_LAMBDA {
        slotted_vectors<V>(from, to, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
            Reg s = V::mul(V::load(x + j, mask), sigma);
            if (Shift) s = V::add(s, V::load(shift + j, mask));
            top[slot] = V::max(top[slot], V::select(mask, s, lowest));
        });
    });
    return V::horizontal_max(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
}

// exp(s - reference) in place of the dots, and their sum.
template <class V, bool Shift, class Real = typename V::Real>
LTK_INLINE double exponentials(Real* x, const Real* shift, typename V::Reg sigma, Real reference, int64_t begin,
                               int64_t end, int64_t absent, bool keep) noexcept {
    using Reg = typename V::Reg;
    const Reg minus = V::set(-reference), zero = V::set(0);
    double total = 0.0;
    present_runs(begin, end, absent, [&](int64_t from, int64_t to) LTK_INLINE_LAMBDA {
        Reg sum[4] = {zero, zero, zero, zero};
        slotted_vectors<V>(from, to, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
            const Reg y =
                V::exp(V::fma(V::load(x + j, mask), sigma, Shift ? V::add(V::load(shift + j, mask), minus) : minus));
            sum[slot] = V::add(sum[slot], V::select(mask, y, zero));
            if (keep) V::store(x + j, y, mask);
        });
        total += static_cast<double>(V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))));
    });
    return total;
}

// One side of a row.
template <class Real>
struct Side {
    Real reference;
    double lse;
};

template <class V, bool Shift, class Real = typename V::Real>
LTK_INLINE Side<Real> side_of(Real* x, const Real* shift, double row_scale, const double* fixed, const int64_t (&at)[4],
                              int64_t absent, bool keep) noexcept {
    const typename V::Reg sigma = V::set(static_cast<Real>(row_scale));
    Real reference;
    if (fixed != nullptr) {
        reference = static_cast<Real>(*fixed);
    } else {
        const Real first = highest<V, Shift>(x, shift, sigma, at[0], at[1], absent);
        const Real second = highest<V, Shift>(x, shift, sigma, at[2], at[3], absent);
        reference = first > second ? first : second;
        if (reference == -static_cast<Real>(INFINITY)) reference = 0;  // no column, or none above -inf
    }
    if (reference == static_cast<Real>(INFINITY)) return {reference, INFINITY};
    const double sum = exponentials<V, Shift>(x, shift, sigma, reference, at[0], at[1], absent, keep) +
                       exponentials<V, Shift>(x, shift, sigma, reference, at[2], at[3], absent, keep);
    return {reference, static_cast<double>(reference) + std::log(sum)};
}

template <class V, class Real = typename V::Real>
LTK_INLINE void scale_range(Real* x, int64_t begin, int64_t end, double factor) noexcept {
    const typename V::Reg by = V::set(static_cast<Real>(factor));
    each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        V::store(x + j, V::mul(V::load(x + j, mask), by), mask);
    });
}

// e^(a - b) with nothing above nothing being nothing.
static inline double ratio(double a, double b) noexcept {
    return a == -INFINITY ? 0.0 : std::exp(a - b);
}

template <class V, bool Shift>
static void logsumexp_rows(const RowLogsumexp& job, int64_t begin, int64_t end) noexcept {
    using Real = typename V::Real;
    const Real* shift = static_cast<const Real*>(job.shift);
    for (int64_t i = begin; i < end; ++i) {
        Real* x = static_cast<Real*>(job.dots) + i * job.stride;
        if (job.loss != nullptr && job.weight[i] == 0.0) {
            job.loss[i] = 0.0;
            if (job.grad_base != nullptr) job.grad_base[i] = 0.0;
            if (job.coefficients)
                std::memset(static_cast<void*>(x), 0, static_cast<size_t>(job.columns) * sizeof(Real));
            continue;
        }
        const int64_t own_begin = job.own_begin == nullptr ? job.columns : job.own_begin[i];
        const int64_t own_end = job.own_begin == nullptr ? job.columns : job.own_end[i];
        const int64_t absent = job.absent == nullptr ? -1 : job.absent[i];
        const double* fixed = job.reference == nullptr ? nullptr : job.reference + i;
        const int64_t around[4] = {0, own_begin, own_end, job.columns}, within[4] = {own_begin, own_end, 0, 0};
        const Side<Real> other = side_of<V, Shift>(x, shift, job.row_scale[i], fixed, around, absent, job.coefficients);
        const Side<Real> own = side_of<V, Shift>(x, shift, job.row_scale[i], fixed, within, absent, job.coefficients);

        double of_other, of_own;  // factors of the exponentials
        if (job.loss != nullptr) {
            const double base = job.base == nullptr ? -INFINITY : job.base[i];
            const double raised = own.lse == -INFINITY ? own.lse : own.lse + (job.bonus == nullptr ? 0 : job.bonus[i]);
            double top = other.lse > raised ? other.lse : raised;
            top = base > top ? base : top;
            const double all =
                top == -INFINITY ? top : top + std::log(ratio(base, top) + ratio(other.lse, top) + ratio(raised, top));
            const double weight = job.weight[i];
            job.loss[i] = weight * (job.minus_own ? all - own.lse : all);
            if (job.grad_base != nullptr) job.grad_base[i] = weight * ratio(base, all);
            if (!job.coefficients) continue;
            // The factors of empty sides would be those of nothing.
            of_other = other.lse == -INFINITY ? 0.0 : weight * std::exp(static_cast<double>(other.reference) - all);
            of_own = own.lse == -INFINITY
                         ? 0.0
                         : weight * (std::exp(static_cast<double>(own.reference) - all + (raised - own.lse)) -
                                     (job.minus_own ? std::exp(static_cast<double>(own.reference) - own.lse) : 0.0));
        } else {
            job.other[i] = other.lse;
            job.own[i] = own.lse;
            if (!job.coefficients) continue;
            of_other = other.lse == -INFINITY
                           ? 0.0
                           : job.grad_other[i] * std::exp(static_cast<double>(other.reference) - other.lse);
            of_own =
                own.lse == -INFINITY ? 0.0 : job.grad_own[i] * std::exp(static_cast<double>(own.reference) - own.lse);
        }
        if (absent >= 0) x[absent] = 0;
        scale_range<V>(x, 0, own_begin, of_other);
        scale_range<V>(x, own_begin, own_end, of_own);
        scale_range<V>(x, own_end, job.columns, of_other);
    }
}

// Named by type, and by ISA through the namespace: a profile reads without the source.
#define LTK_ROW_LOGSUMEXP(name, V)                                                                   \
    static void row_logsumexp_##name(const RowLogsumexp& job, int64_t begin, int64_t end) noexcept { \
        if (job.shift != nullptr) return logsumexp_rows<V, true>(job, begin, end);                   \
        logsumexp_rows<V, false>(job, begin, end);                                                   \
    }
LTK_ROW_LOGSUMEXP(f32, F32)
LTK_ROW_LOGSUMEXP(f64, F64)
#undef LTK_ROW_LOGSUMEXP

}  // namespace LTK_NAMESPACE
}  // namespace ltk
