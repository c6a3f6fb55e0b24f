// The closed forms of adjusted_ce.h: Seesaw, softmax equalization and the cloud write their term D_ij to a row of
// scratch, which row_term then reads as its shift, so that there is one softmax body; ArcFace changes the label's logit
// alone. No C x C table exists.

namespace ltk {
namespace LTK_NAMESPACE {

// Seesaw, Wang et al. 2021, in logarithms: D_j = p min(0, log n_j - log n_y) + q max(0, log P_j - log
// max(P_y, eps)), where the second difference is z_j - max(z_y, lse + log eps), lse = log sum exp z. D_y = 0 by itself.
template <class V, class T>
static inline void seesaw_term(const AdjustedCe& job, const T* z, int64_t label, typename V::Real* d) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const int64_t classes = job.classes;
    const Real* log_counts = static_cast<const Real*>(job.closed.table);
    const Reg minus_infinity = V::set(static_cast<Real>(-INFINITY));
    Reg top = minus_infinity;
    each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        top = V::max(top, V::select(mask, V::load(z + j, mask), minus_infinity));
    });
    const Real highest = V::horizontal_max(top);
    double total = 0.0;
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        Reg sum = V::set(0);
        each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            const Reg x = V::sub(V::load(z + j, mask), V::set(highest));
            sum = V::add(sum, V::exp(V::select(mask, x, minus_infinity)));
        });
        total += static_cast<double>(V::horizontal_sum(sum));
    }
    const double floor = static_cast<double>(highest) + std::log(total) + job.closed.options[2];
    const double own = get(z + label);
    const Reg p = V::set(static_cast<Real>(-job.closed.options[0]));
    const Reg q = V::set(static_cast<Real>(job.closed.options[1]));
    const Reg reference = V::set(static_cast<Real>(own > floor ? own : floor));
    const Reg label_count = V::set(log_counts[label]);
    const Reg zero = V::set(0);
    each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        const Reg rarer = V::max(V::sub(label_count, V::load(log_counts + j, mask)), zero);
        const Reg ahead = V::max(V::sub(V::load(z + j, mask), reference), zero);
        V::store(d + j, V::fma(p, rarer, V::mul(q, ahead)), mask);
    });
}

// Class j != y of the table is masked with the given probability.
template <class Real>
static inline void equalization_term(const AdjustedCe& job, int64_t row, int64_t label, Real* d) noexcept {
    const Real* table = static_cast<const Real*>(job.closed.table);
    const uint32_t key = equalization_key(*job.closed.seed, row);
    const int32_t limit = equalization_limit(job.closed);
    const Real masked = static_cast<Real>(-INFINITY);
    for (int64_t j = 0; j < job.classes; ++j)
        d[j] = table[j] != 0 && equalization_draws(key, j, limit) ? masked : Real(0);
    d[label] = 0;
}

// Minus the sizes of one row's noise, not yet clamped.
static inline void cloud_sizes(uint32_t key, int64_t classes, double* d) noexcept {
    for (int64_t j = 0; j < classes; ++j) d[j] = -cloud_size(key, j);
}
// In float, written for the compiler to make vectors of, which it does in a function by itself: no branch, no call. The
// logarithm is Cephes' logf (10^-7 of its value; of (1/sqrt 2, sqrt 2) a polynomial, the exponent apart; at most 0),
// the sine its series to x^11 (6 10^-8).
__attribute__((noinline)) static void cloud_sizes(uint32_t key, int64_t classes64, float* d) noexcept {
    const int32_t classes = static_cast<int32_t>(classes64);
    for (int32_t j = 0; j < classes; ++j) {
        const uint32_t first = mix32(mix32(static_cast<uint32_t>(j) + 0x9e3779b9u) ^ key);
        const uint32_t second = mix32(first + 0x9e3779b9u);
        const float u = static_cast<float>(static_cast<int32_t>((first >> 8) + 1)) * 0x1p-24f;
        uint32_t bits;
        std::memcpy(&bits, &u, sizeof bits);
        const uint32_t above = bits - 0x3f3504f3u;  // of 1 / sqrt 2: its exponent bits are the number of halvings
        const float halvings = static_cast<float>(static_cast<int32_t>(above) >> 23);
        bits = (above & 0x007fffffu) + 0x3f3504f3u;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        x -= 1.0f;
        float p = 7.0376836292e-2f * x - 1.1514610310e-1f;
        p = p * x + 1.1676998740e-1f;
        p = p * x - 1.2420140846e-1f;
        p = p * x + 1.4249322787e-1f;
        p = p * x - 1.6668057665e-1f;
        p = p * x + 2.0000714765e-1f;
        p = p * x - 2.4999993993e-1f;
        p = p * x + 3.3333331174e-1f;
        const float log_u = halvings * 0.693147181f + (x + (x * x * (p * x - 0.5f)));
        const float v = static_cast<float>(static_cast<int32_t>(second >> 8)) * (0x1p-24f * 1.57079633f), w = v * v;
        float q = -2.50521084e-8f * w + 2.75573192e-6f;
        q = q * w - 1.98412698e-4f;
        q = q * w + 8.33333333e-3f;
        q = q * w - 1.66666667e-1f;
        const float sine = v + v * (w * q);
        d[j] = -std::sqrt(-2.0f / 9.0f * log_u) * sine;
    }
}

// d_j = -table_j min(size_j, 1).
template <class V, class Real>
static inline void cloud_term(const AdjustedCe& job, int64_t row, Real* d) noexcept {
    const Real* table = static_cast<const Real*>(job.closed.table);
    cloud_sizes(equalization_key(*job.closed.seed, row), job.classes, d);
    each_vector<V>(0, job.classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        V::store(d + j, V::mul(V::load(table + j, mask), V::max(V::load(d + j, mask), V::set(-1))), mask);
    });
}

template <class V>
static inline Term<typename V::Real> angular_term(const AdjustedCe& job, double c,
                                                  Term<typename V::Real> term) noexcept {
    double value;
    arcface<typename V::Real>(job.closed, c, &value, &term.slope);
    term.target_a = term.sigma * value;
    return term;
}

// 2 atanh(w), |w| <= 1/3.
template <class V>
static inline typename V::Reg two_atanh(typename V::Reg w) noexcept {
    using Reg = typename V::Reg;
    const Reg x = V::mul(w, w);
    Reg q = V::fma(V::set(2.0f / 13), x, V::set(2.0f / 11));
    q = V::fma(q, x, V::set(2.0f / 9));
    q = V::fma(q, x, V::set(2.0f / 7));
    q = V::fma(q, x, V::set(2.0f / 5));
    q = V::fma(q, x, V::set(2.0f / 3));
    return V::fma(V::mul(q, x), w, V::add(w, w));
}

// log(a / b) of positive numbers whose difference is known better than they are. `far`: a may be up to 256 times b, or
// the reverse, and beyond twice that the eighth root is taken first.
template <class V>
static inline typename V::Reg log_ratio(typename V::Reg a, typename V::Reg b, typename V::Reg difference, bool far,
                                        V) noexcept {
    using Reg = typename V::Reg;
    const Reg w = difference / V::add(a, b);
    if (!far) return two_atanh<V>(w);
    const Reg root = V::sqrt(V::sqrt(V::sqrt(a / b)));
    const Reg eighth = two_atanh<V>(V::sub(root, V::set(1)) / V::add(root, V::set(1)));
    const Reg third = V::set(static_cast<typename V::Real>(1.0 / 3.0));
    return V::max(w, V::sub(V::set(0), w)) > third ? V::mul(V::set(8), eighth) : two_atanh<V>(w);
}
static inline double log_ratio(double, double b, double difference, bool, F64) noexcept {
    return std::log1p(difference / b);
}

// ProCo, Du et al. 2024: g_j = log C_p(kappa_j) - log C_p(kt_j), kt_j^2 = kappa_j^2 + 1 / tau^2 + 2 kappa_j cos_j /
// tau, where C_p normalises the von Mises-Fisher density. Debye's uniform expansion of the Bessel function of order nu
// = p/2 - 1 in x = kappa / nu, s = sqrt(1 + x^2), t = 1 / s gives
//   -log C_p = nu (s - log(1 + s)) - log(s) / 2 + log S(t) + constant,   S = 1 + u1(t) / nu + u2(t) / nu^2 + u3(t) /
//   nu^3
// in which log kappa has cancelled. Differences are formed of what differs, ds = st - s, so that nothing large cancels.
template <class V, class T>
static inline void vmf_row(const AdjustedCe& job, const T* cosines, typename V::Real* g,
                           typename V::Real* slope) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* kappa = static_cast<const Real*>(job.closed.table);
    const Real* root = kappa + job.classes;
    const Real* log_series = root + job.classes;
    const double order = job.closed.options[0] / 2.0 - 1.0, tau = job.closed.options[1];
    const bool far = 1.0 / (tau * order) > 1.5;  // else st lies within a factor of 2 of s
    const auto set = [](double x) { return V::set(static_cast<Real>(x)); };
    const Reg one = set(1.0), nu = set(order), i1 = set(1.0 / order);
    const Reg i2 = set(1.0 / (order * order)), i3 = set(1.0 / (order * order * order));
    const Reg along = set(2.0 / (tau * order * order)), constant = set(1.0 / (tau * tau * order * order));
    const Reg per_kappa = set(1.0 / (tau * order)), half = set(-0.5);
    each_vector<V>(0, job.classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        const Reg k = V::load(kappa + j, mask), s = V::load(root + j, mask);
        const Reg d2 = V::fma(V::mul(along, k), V::load(cosines + j, mask), constant);
        const Reg st = V::sqrt(V::max(V::fma(s, s, d2), one));
        const Reg ds = d2 / V::add(st, s);
        const Reg first = log_ratio(V::add(one, st), V::add(one, s), ds, far, V{});
        const Reg second = log_ratio(st, s, ds, far, V{});
        const Reg t = one / st;
        const Reg x = V::mul(t, t);
        const Reg u1 = V::fma(set(-5.0 / 24), x, set(3.0 / 24));
        const Reg u2 = V::fma(V::fma(set(385.0 / 1152), x, set(-462.0 / 1152)), x, set(81.0 / 1152));
        Reg u3 = V::fma(set(-425425.0 / 414720), x, set(765765.0 / 414720));
        u3 = V::fma(V::fma(u3, x, set(-369603.0 / 414720)), x, set(30375.0 / 414720));
        // S - 1
        const Reg v = V::mul(t, V::fma(V::mul(V::mul(t, t), i3), u3, V::fma(V::mul(t, i2), u2, V::mul(i1, u1))));
        const Reg series = log_ratio(V::add(one, v), one, v, false, V{});
        Reg y = V::fma(nu, V::sub(ds, first), V::mul(half, second));
        y = V::add(y, V::sub(series, V::load(log_series + j, mask)));
        V::store(g + j, y, mask);
        if (slope == nullptr) return;
        const Reg du1 = V::fma(set(-15.0 / 24), x, set(3.0 / 24));
        const Reg du2 = V::fma(V::fma(set(2310.0 / 1152), x, set(-1848.0 / 1152)), x, set(162.0 / 1152));
        Reg du3 = V::fma(set(-3828825.0 / 414720), x, set(5360355.0 / 414720));
        du3 = V::fma(V::fma(du3, x, set(-1848015.0 / 414720)), x, set(91125.0 / 414720));
        const Reg dv = V::fma(V::mul(x, i3), du3, V::fma(V::mul(t, i2), du2, V::mul(i1, du1)));
        const Reg d = V::sub(one / V::add(one, st), V::mul(V::mul(x, i1), V::fma(t, dv / V::add(one, v), set(0.5))));
        V::store(slope + j, V::mul(V::mul(per_kappa, k), d), mask);
    });
}

template <class V, bool Shift, class T>
static void vmf_rows(const AdjustedCe& shared, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    AdjustedCe job = shared;
    job.stream = false;  // row_term leaves its gradient in scratch
    Real* e = static_cast<Real*>(scratch);
    Real* g = e + adjusted_ce_row(job.classes);
    Real* slope = g + adjusted_ce_row(job.classes);
    Real* block_max = slope + adjusted_ce_row(job.classes);
    for (int64_t i = begin; i < end; ++i) {
        const T* cosines = static_cast<const T*>(job.logits) + i * job.logits_stride;
        T* grad = job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + i * job.grad_stride;
        const int64_t label = job.target[i];
        if (label == job.ignore_index) {
            static_cast<Real*>(job.row_loss)[i] = 0;
            if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.classes) * sizeof(T));
            continue;
        }
        vmf_row<V>(job, cosines, g, grad == nullptr ? nullptr : slope);
        const Term<Real> term = make_term<V>(job, get(g + label), label, 1.0);
        const double loss =
            row_term<V, false, Shift>(job, static_cast<const Real*>(g), term, upstream_of<Real>(job, i), e, block_max,
                                      static_cast<const Real*>(nullptr), grad == nullptr ? nullptr : g);
        put_loss<Real>(job, i, loss);
        if (grad == nullptr) continue;
        each_vector<V>(0, job.classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            V::store(grad + j, V::mul(V::load(g + j, mask), V::load(slope + j, mask)), mask);
        });
    }
}

template <class V, class T>
static void closed_rows(const AdjustedCe& shared, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    if (shared.closed.form == Form::vmf) {
        if (shared.shift == nullptr) return vmf_rows<V, false, T>(shared, begin, end, scratch);
        return vmf_rows<V, true, T>(shared, begin, end, scratch);
    }
    AdjustedCe job = shared;
    Real* e = static_cast<Real*>(scratch);
    Real* first = e + adjusted_ce_row(job.classes);
    Real* d = first + adjusted_ce_row(job.classes);
    Real* block_max = d + adjusted_ce_row(job.classes);
    const bool angular = job.closed.form == Form::arcface;
    if (!angular) job.shift = d;

    const auto one_label = [&](int64_t i, const T* z, int64_t label, double share, double upstream, const Real* add,
                               auto* grad) {
        const double own = get(z + label);
        if (angular) {
            const Term<Real> term = angular_term<V>(job, own, make_term<V>(job, own, label, share));
            return row_term<V, false, false>(job, z, term, upstream, e, block_max, add, grad);
        }
        if (job.closed.form == Form::seesaw)
            seesaw_term<V>(job, z, label, d);
        else if (job.closed.form == Form::cloud)
            cloud_term<V>(job, i, d);
        else
            equalization_term(job, i, label, d);
        return row_term<V, false, true>(job, z, make_term<V>(job, own, label, share), upstream, e, block_max, add,
                                        grad);
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
            put_loss<Real>(job, i, one_label(i, z, label, 1.0, upstream, static_cast<const Real*>(nullptr), grad));
            continue;
        }
        const double lam = static_cast<double>(static_cast<const Real*>(job.lam)[i]);
        double sum =
            one_label(i, z, label, lam, upstream, static_cast<const Real*>(nullptr), grad == nullptr ? nullptr : first);
        sum += one_label(i, z, job.target_b[i], 1.0 - lam, upstream, first, grad);
        put_loss<Real>(job, i, sum);
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
