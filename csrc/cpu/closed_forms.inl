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

template <class V, class T>
static void closed_rows(const AdjustedCe& shared, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
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
