// Body of self_contrast.h, on the exponentials of row_logsumexp.inl.

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, class Real = typename V::Real>
LTK_INLINE Real dot_product(const Real* a, const Real* b, int64_t width) noexcept {
    const typename V::Reg zero = V::set(0);
    typename V::Reg sum[4] = {zero, zero, zero, zero};
    slotted_vectors<V>(0, width, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
        sum[slot] = V::fma(V::load(a + j, mask), V::load(b + j, mask), sum[slot]);
    });
    return V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
}

// sum += by a
template <class V, class Real = typename V::Real>
LTK_INLINE void add_times(Real* sum, const Real* a, double by, int64_t width) noexcept {
    const typename V::Reg k = V::set(static_cast<Real>(by));
    each_vector<V>(0, width, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        V::store(sum + j, V::fma(k, V::load(a + j, mask), V::load(sum + j, mask)), mask);
    });
}

template <class V>
static void self_unit(const SelfStart& job, int64_t begin, int64_t end) noexcept {
    using Real = typename V::Real;
    const int64_t width = job.rows.width;
    for (int64_t k = begin; k < end; ++k) {
        const Real* x = static_cast<const Real*>(job.features) + job.rows.order[k] * job.stride;
        Real* a = static_cast<Real*>(job.rows.unit) + k * width;
        const double length = std::sqrt(static_cast<double>(dot_product<V>(x, x, width)));
        const double inverse = length < job.eps ? 1.0 / job.eps : 1.0 / length;
        job.rows.inverse[k] = length < job.eps ? -inverse : inverse;
        const typename V::Reg by = V::set(static_cast<Real>(inverse));
        each_vector<V>(0, width, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            V::store(a + j, V::mul(by, V::load(x + j, mask)), mask);
        });
    }
}

template <class V>
static void self_positives(const SelfStart& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    const int64_t width = job.rows.width;
    const Real* a = static_cast<const Real*>(job.rows.unit);
    Real* sum = static_cast<Real*>(scratch);
    for (int64_t first = begin; first < end; ++first) {
        if (job.rows.begin[first] != first) continue;
        const int64_t last = job.rows.end[first];
        std::memset(sum, 0, static_cast<size_t>(width) * sizeof(Real));
        for (int64_t k = first; k < last; ++k) add_times<V>(sum, a + k * width, 1.0, width);
        for (int64_t k = first; k < last; ++k) {
            const Real* own = a + k * width;
            job.positive[k] = static_cast<double>(dot_product<V>(own, sum, width)) -
                              static_cast<double>(dot_product<V>(own, own, width));
        }
    }
}

template <class V>
static void self_products(const SelfProducts& job, int64_t begin, int64_t end) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* factor = static_cast<const Real*>(job.factor);
    const Real* no_shift = nullptr;
    const Reg sigma = V::set(static_cast<Real>(job.scale)), minus = V::set(static_cast<Real>(-job.scale));
    for (int64_t i = begin; i < end; ++i) {
        Real* x = static_cast<Real*>(job.products) + i * job.stride;
        if (factor == nullptr) {
            job.total[i] =
                exponentials<V, false>(x, no_shift, sigma, static_cast<Real>(job.scale), 0, job.columns, i, true);
            x[i] = 0;
            continue;
        }
        const Reg own = V::set(factor[i]);
        each_vector<V>(0, job.columns, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            Reg y = V::load(x + j, mask);
            if (!job.kept) y = V::exp(V::fma(y, sigma, minus));
            V::store(x + j, V::mul(y, V::add(own, V::load(factor + j, mask))), mask);
        });
        x[i] = 0;
    }
}

// The mean of the positives is taken off the gradient, what of it lies along the row too, for the row has unit length.
template <class V>
static void self_gradient(const SelfGradient& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const int64_t width = job.rows.width;
    const Real* a = static_cast<const Real*>(job.rows.unit);
    Real* sum = static_cast<Real*>(scratch);  // of the label's rows, and of these times their slopes
    Real* sloped = sum + width;
    for (int64_t first = begin; first < end; ++first) {
        if (job.rows.begin[first] != first) continue;
        const int64_t last = job.rows.end[first];
        std::memset(sum, 0, static_cast<size_t>(2 * width) * sizeof(Real));
        for (int64_t k = first; k < last; ++k) {
            add_times<V>(sum, a + k * width, 1.0, width);
            add_times<V>(sloped, a + k * width, job.slope[k], width);
        }
        for (int64_t k = first; k < last; ++k) {
            const Real* own = a + k * width;
            Real* g = static_cast<Real*>(job.products) + k * width;
            Real* out = static_cast<Real*>(job.out) + job.rows.order[k] * width;
            const Reg slope = V::set(static_cast<Real>(job.slope[k])), two = V::set(2);
            each_vector<V>(0, width, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
                const Reg others = V::sub(V::load(sum + j, mask), V::mul(two, V::load(own + j, mask)));
                V::store(g + j, V::sub(V::load(g + j, mask), V::fma(slope, others, V::load(sloped + j, mask))), mask);
            });
            const Real along = dot_product<V>(g, own, width);
            job.along[k] = static_cast<double>(along);
            const double inverse = job.rows.inverse[k];
            const Reg by = V::set(static_cast<Real>(job.scale * std::fabs(inverse)));
            const Reg minus = V::set(inverse < 0.0 ? Real(0) : -along);  // a row of length 0 has no direction
            each_vector<V>(0, width, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
                V::store(out + j, V::mul(by, V::fma(minus, V::load(own + j, mask), V::load(g + j, mask))), mask);
            });
        }
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
