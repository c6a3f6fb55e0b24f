// Body of row_statistics.h, on the first pass of adjusted_ce.inl.

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, bool Scale, bool Shift, class T>
static void statistics_rows(const ClassPart& job, bool smooth, int64_t begin, int64_t end, double* out) noexcept {
    using Real = typename V::Real;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    Real* nothing = nullptr;
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        double* statistics = out + i * kStatistics;
        const int64_t label = job.target[i];
        if (label == kIgnoredRow) {
            for (int k = 0; k < kStatistics; ++k) statistics[k] = 0.0;
            continue;
        }
        const RowSums<V> row = row_sums<V, Scale, Shift>(z, job.classes, scale, shift, label, job.row_scale[i], smooth,
                                                         static_cast<const Real*>(job.weight), nothing, nothing);
        statistics[0] = static_cast<double>(row.reference);
        statistics[1] = row.others;
        statistics[2] = -INFINITY;
        if (label >= 0 && label < job.classes) {
            const double a = (Scale ? static_cast<double>(scale[label]) : 1.0) * get(z + label) +
                             (Shift ? static_cast<double>(shift[label]) : 0.0);
            statistics[2] = job.row_scale[i] * a;
        }
        statistics[3] = row.smooth_a;
    }
}

// Block by block, which is in the first cache when its exponentials are taken: its maximum, and where that is, only
// where it is above all before.
template <class V, bool Scale, bool Shift, class T>
static void maxima_rows(const ClassPart& job, int64_t begin, int64_t end, double* out, int64_t* index) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real lowest = -static_cast<Real>(INFINITY);
    const Reg minus_infinity = V::set(lowest);
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        double* statistics = out + i * kStatistics;
        const int64_t label = job.target[i];
        index[i] = -1;
        if (label == kIgnoredRow) {
            for (int k = 0; k < kStatistics; ++k) statistics[k] = 0.0;
            continue;
        }
        const Reg sigma = V::set(static_cast<Real>(job.row_scale[i]));
        const auto adjusted_at = [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            return V::select(mask, V::mul(sigma, adjusted<V, Scale, Shift>(z, scale, shift, j, mask)), minus_infinity);
        };
        Real top = lowest;
        double others = 0.0;
        for (int64_t from = 0; from < job.classes; from += kBlock) {
            const int64_t to = from + kBlock < job.classes ? from + kBlock : job.classes;
            Reg high[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
            for_vectors<V>(from, to, label, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
                prefetch(z + j);
                high[slot] = V::max(high[slot], adjusted_at(j, mask));
            });
            const Real here = V::horizontal_max(V::max(V::max(high[0], high[1]), V::max(high[2], high[3])));
            if (here > top) {
                bool found = false;
                for_vectors<V>(from, to, label, [&](int64_t j, auto mask, int) {
                    if (found) return;
                    Real lanes[V::N];
                    V::store(lanes, adjusted_at(j, mask), V::all());
                    for (int64_t lane = 0; lane < V::N && !found; ++lane) {
                        if (lanes[lane] != here) continue;
                        index[i] = j + lane;
                        found = true;
                    }
                });
                if (others != 0.0) others *= std::exp(static_cast<double>(top) - static_cast<double>(here));
                top = here;
            }
            const Reg minus = V::set(top == lowest ? Real(0) : -top);
            Reg sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
            for_vectors<V>(from, to, label, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
                sum[slot] = V::add(sum[slot], V::exp(V::add(adjusted_at(j, mask), minus)));
            });
            others += static_cast<double>(V::horizontal_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))));
        }
        if (others != others && top != static_cast<Real>(INFINITY)) {  // a NaN that the maximum passed by
            top = static_cast<Real>(others);
            index[i] = -1;
        }
        statistics[0] = static_cast<double>(top);
        statistics[1] = others;
        statistics[2] = -INFINITY;
        if (label >= 0 && label < job.classes) {
            const double a = (Scale ? static_cast<double>(scale[label]) : 1.0) * get(z + label) +
                             (Shift ? static_cast<double>(shift[label]) : 0.0);
            statistics[2] = job.row_scale[i] * a;
        }
        statistics[3] = 0.0;
    }
}

template <class V, class T>
static void maxima_of(const ClassPart& job, int64_t begin, int64_t end, double* out, int64_t* index) noexcept {
    if (job.scale != nullptr && job.shift != nullptr) return maxima_rows<V, true, true, T>(job, begin, end, out, index);
    if (job.scale != nullptr) return maxima_rows<V, true, false, T>(job, begin, end, out, index);
    if (job.shift != nullptr) return maxima_rows<V, false, true, T>(job, begin, end, out, index);
    maxima_rows<V, false, false, T>(job, begin, end, out, index);
}

template <class V, bool Scale, bool Shift, class T>
static void gradient_rows(const ClassPart& job, const double* rows, int64_t begin, int64_t end, T* grads,
                          int64_t grad_stride) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real* weight = static_cast<const Real*>(job.weight);
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        T* grad = grads + i * grad_stride;
        const int64_t label = job.target[i];
        if (label == kIgnoredRow) {
            std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.classes) * sizeof(T));
            continue;
        }
        const double* row = rows + i * kGradientTerms;
        const double reference = row[0] == -INFINITY ? 0.0 : row[0];
        const Reg minus_reference = V::set(static_cast<Real>(-reference));
        const Reg sigma = V::set(static_cast<Real>(job.row_scale[i]));
        const Reg k = V::set(static_cast<Real>(row[1]));
        const Reg c = V::set(static_cast<Real>(row[2]));
        const bool smooth = row[2] != 0.0;
        each_vector<V>(0, job.classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            prefetch(z + j);
            const Reg x = V::fma(adjusted<V, Scale, Shift>(z, scale, shift, j, mask), sigma, minus_reference);
            Reg y = V::mul(k, V::exp(x));
            if (smooth) y = V::add(y, weight == nullptr ? c : V::mul(c, V::load(weight + j, mask)));
            if (Scale) y = V::mul(y, V::load(scale + j, mask));
            V::store(grad + j, y, mask);
        });
        if (label >= 0 && label < job.classes) put(row[3], grad + label);
    }
}

template <class V, class T>
static void statistics_of(const ClassPart& job, bool smooth, int64_t begin, int64_t end, double* out) noexcept {
    if (job.scale != nullptr && job.shift != nullptr)
        return statistics_rows<V, true, true, T>(job, smooth, begin, end, out);
    if (job.scale != nullptr) return statistics_rows<V, true, false, T>(job, smooth, begin, end, out);
    if (job.shift != nullptr) return statistics_rows<V, false, true, T>(job, smooth, begin, end, out);
    statistics_rows<V, false, false, T>(job, smooth, begin, end, out);
}

template <class V, class T>
static void gradient_of(const ClassPart& job, const double* row, int64_t begin, int64_t end, void* out,
                        int64_t stride) noexcept {
    T* grad = static_cast<T*>(out);
    if (job.scale != nullptr && job.shift != nullptr)
        return gradient_rows<V, true, true, T>(job, row, begin, end, grad, stride);
    if (job.scale != nullptr) return gradient_rows<V, true, false, T>(job, row, begin, end, grad, stride);
    if (job.shift != nullptr) return gradient_rows<V, false, true, T>(job, row, begin, end, grad, stride);
    gradient_rows<V, false, false, T>(job, row, begin, end, grad, stride);
}

// Named by type, and by ISA through the namespace: a profile reads without the source.
#define LTK_TWO_PHASES(name, V, T)                                                                               \
    static void row_statistics_##name(const ClassPart& job, bool smooth, int64_t begin, int64_t end,             \
                                      double* out) noexcept {                                                    \
        statistics_of<V, T>(job, smooth, begin, end, out);                                                       \
    }                                                                                                            \
    static void row_maxima_##name(const ClassPart& job, int64_t begin, int64_t end, double* out,                 \
                                  int64_t* index) noexcept {                                                     \
        maxima_of<V, T>(job, begin, end, out, index);                                                            \
    }                                                                                                            \
    static void gradient_##name(const ClassPart& job, const double* row, int64_t begin, int64_t end, void* grad, \
                                int64_t stride) noexcept {                                                       \
        gradient_of<V, T>(job, row, begin, end, grad, stride);                                                   \
    }
LTK_TWO_PHASES(f32, F32, float)
LTK_TWO_PHASES(f64, F64, double)
LTK_TWO_PHASES(bf16, F32, bf16)
LTK_TWO_PHASES(f16, F32, f16)
#undef LTK_TWO_PHASES

}  // namespace LTK_NAMESPACE
}  // namespace ltk
