// Body of soft_targets.h, on the first pass of adjusted_ce.inl.

namespace ltk {
namespace LTK_NAMESPACE {

// The row's exponentials as probabilities: factors of the blocks of `e`, whose references are not all the row's.
template <class V>
static inline typename V::Real block_factor(const RowSums<V>& row, typename V::Real from, double over) noexcept {
    using Real = typename V::Real;
    // A block of masked classes alone has reference -inf, and zeros for exponentials.
    if (from == row.reference || from == static_cast<Real>(-INFINITY)) return static_cast<Real>(over);
    return static_cast<Real>(over * std::exp(static_cast<double>(from) - static_cast<double>(row.reference)));
}

// x where `of` is not 0, else 0: what has no share adds nothing, be it infinite.
template <class Reg>
LTK_INLINE Reg where_not_zero(Reg of, Reg x) noexcept {
    const Reg zero = {};
    return of == zero ? zero : x;
}

// Calls store(j, mask) for all vectors, the full ones past the caches where `stream` says so.
template <class V, class F>
LTK_INLINE void put_row(typename V::Real* out, int64_t begin, int64_t end, bool stream, F value) noexcept {
    int64_t j = begin;
    if (stream) {
        const int64_t head = V::unaligned(out + j);
        if (head > 0 && j < end) {
            const int64_t n = head < end - j ? head : end - j;
            V::store(out + j, value(j, V::first(n)), V::first(n));
            j += n;
        }
        for (; j + V::N <= end; j += V::N) V::stream(out + j, value(j, V::all()));
    } else {
        for (; j + V::N <= end; j += V::N) V::store(out + j, value(j, V::all()), V::all());
    }
    if (j < end) V::store(out + j, value(j, V::first(end - j)), V::first(end - j));
}

// The softmax of sigma y in place of its exponentials `q`. Returns sum_j q_j log q_j.
template <class V, class T>
static inline double teacher_row(const T* y, int64_t classes, double sigma, typename V::Real* q,
                                 typename V::Real* block_reference) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const Real* nothing = nullptr;
    const RowSums<V> row =
        row_sums<V, false, false>(y, classes, nothing, nothing, int64_t{-1}, sigma, false, nothing, q, block_reference);
    if (row.reference == static_cast<Real>(-INFINITY)) return NAN;
    const Reg by = V::set(static_cast<Real>(sigma)), minus_reference = V::set(-row.reference);
    double dot = 0.0;
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        const Reg k = V::set(block_factor<V>(row, block_reference[block], 1.0 / row.others));
        Reg sum = V::set(0);
        each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            const Reg p = V::mul(k, V::load(q + j, mask));
            V::store(q + j, p, mask);
            sum = V::add(sum, where_not_zero(p, V::mul(p, V::fma(V::load(y + j, mask), by, minus_reference))));
        });
        dot += static_cast<double>(V::horizontal_sum(sum));
    }
    return dot - std::log(row.others);
}

// -sum_j t_j log softmax(a)_j, and `upstream` times its gradient where `grad` is not null. `total` is the sum of t, or
// NaN where it is to be found. `*lowest` becomes the smallest entry of q.
template <class V, bool Scale, bool Shift, class T, class Q>
LTK_INLINE double soft_row(const SoftTargets& job, const T* z, const Q* q, double total, double upstream,
                           typename V::Real* e, typename V::Real* block_reference, typename V::Real* grad,
                           double* sum_of_targets, double* lowest) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const int64_t classes = job.classes;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real* weight = static_cast<const Real*>(job.weight);
    const bool plain = job.keep == 1.0 && job.floor == 0.0;
    const Reg keep = V::set(static_cast<Real>(job.keep)), floor = V::set(static_cast<Real>(job.floor));
    const auto share = [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        Reg t = V::load(q + j, mask);
        if (!plain) t = V::select(mask, V::fma(keep, t, floor), V::set(0));
        return weight == nullptr ? t : V::mul(t, V::load(weight + j, mask));
    };
    const Real infinity = static_cast<Real>(INFINITY);
    const Reg sigma = V::set(static_cast<Real>(job.sigma));
    const Reg zero = V::set(0), minus_infinity = V::set(-infinity);
    const int64_t nobody = -1;  // no label to leave out
    const auto highest_of = [&](int64_t begin, int64_t end) {
        Reg top = minus_infinity;
        for_vectors<V>(begin, end, nobody, [&](int64_t j, auto mask, int) LTK_INLINE_LAMBDA {
            const Reg a = V::mul(sigma, adjusted<V, Scale, Shift>(z, scale, shift, j, mask));
            top = V::max(top, V::select(mask, a, minus_infinity));
        });
        return V::horizontal_max(top);
    };
    // The row's first pass as in row_sums, and the target's share beside it. The dot product of target and logits is
    // relative to the same reference.
    RowSums<V> row;
    row.reference = highest_of(0, classes < 2 * V::N ? classes : 2 * V::N);
    double dot = 0.0, found = 0.0;
    Reg below = zero;
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        double here, here_dot, here_found;
        for (bool again = false;; again = true) {
            const Real usable = row.reference == -infinity ? Real(0) : row.reference;
            const Reg minus_reference = V::set(-usable);
            Reg sum[4] = {zero, zero, zero, zero}, dots[4] = {zero, zero, zero, zero};
            Reg sums[4] = {zero, zero, zero, zero}, top = minus_infinity;
            for_vectors<V>(begin, end, nobody, [&](int64_t j, auto mask, int slot) LTK_INLINE_LAMBDA {
                prefetch(z + j);
                prefetch(q + j);
                const Reg x = V::fma(adjusted<V, Scale, Shift>(z, scale, shift, j, mask), sigma, minus_reference);
                const Reg masked = V::select(mask, x, minus_infinity);
                top = V::max(top, masked);
                const Reg y = V::exp(masked);
                sum[slot] = V::add(sum[slot], y);
                if (grad != nullptr) V::store(e + j, y, V::all());  // past the row: padding of the scratch
                const Reg t = share(j, mask);
                below = V::max(below, V::sub(zero, V::load(q + j, mask)));
                sums[slot] = V::add(sums[slot], t);
                dots[slot] = V::add(dots[slot], where_not_zero(t, V::mul(t, x)));
            });
            const auto total_of = [](const Reg* r) LTK_INLINE_LAMBDA {
                return static_cast<double>(V::horizontal_sum(V::add(V::add(r[0], r[1]), V::add(r[2], r[3]))));
            };
            here = total_of(sum), here_dot = total_of(dots), here_found = total_of(sums);
            const Real above = V::horizontal_max(top);
            if (again || !(above > kHeadroom || (row.reference == -infinity && above > -infinity))) break;
            const Real moved = highest_of(begin, end);
            const double by = static_cast<double>(usable) - static_cast<double>(moved);
            if (row.others != 0.0) row.others *= std::exp(by);
            if (found != 0.0) dot += found * by;
            row.reference = moved;
        }
        row.others += here;
        dot += here_dot;
        found += here_found;
        block_reference[block] = row.reference;
    }
    *sum_of_targets = found;
    *lowest = -static_cast<double>(V::horizontal_max(below));
    if (total != total) total = found;
    const bool masked = row.reference == static_cast<Real>(-INFINITY);
    const double loss = masked ? NAN : total * std::log(row.others) - dot;
    if (grad == nullptr) return loss;
    const double outer = upstream * job.sigma;
    const double over = masked ? NAN : total / row.others;
    const Reg factor = V::set(static_cast<Real>(outer));
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        const Reg k = V::set(block_factor<V>(row, block_reference[block], over));
        put_row<V>(grad, begin, end, job.stream, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            const Reg y = V::mul(factor, V::sub(V::mul(k, V::load(e + j, mask)), share(j, mask)));
            return Scale ? V::mul(y, V::load(scale + j, mask)) : y;
        });
    }
    return loss;
}

template <class V, bool Scale, bool Shift, class T, class Q>
static int64_t soft_rows(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    Real* e = static_cast<Real*>(scratch);
    Real* probabilities = e + adjusted_ce_row(job.classes);
    Real* block_reference = e + 3 * adjusted_ce_row(job.classes);
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        const Q* target = static_cast<const Q*>(job.target) + i * job.target_stride;
        Real* grad = job.grad == nullptr ? nullptr : static_cast<Real*>(job.grad) + i * job.classes;
        const double own =
            job.row_weight == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.row_weight)[i]);
        double upstream = own * job.factor * job.grad_scale;
        if (job.row_coef != nullptr) upstream *= static_cast<double>(static_cast<const Real*>(job.row_coef)[i]);
        double loss, sum, lowest;
        if (job.teacher) {
            loss = teacher_row<V>(target, job.classes, job.sigma, probabilities, block_reference);
            const Real* q = probabilities;
            loss += soft_row<V, Scale, Shift>(job, z, q, 1.0, upstream, e, block_reference, grad, &sum, &lowest);
        } else {
            loss = soft_row<V, Scale, Shift>(job, z, target, NAN, upstream, e, block_reference, grad, &sum, &lowest);
            if (lowest < 0.0 || !std::isfinite(sum)) {
                for (int64_t j = 0; j < job.classes; ++j) {
                    const double q = get(target + j);
                    if (!(q >= 0.0) || q > std::numeric_limits<double>::max()) return i;
                }
            }
        }
        static_cast<Real*>(job.row_loss)[i] = static_cast<Real>(own * job.factor * loss);
    }
    return -1;
}

template <class V, class T, class Q>
static int64_t soft_rows_of(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept {
    if (job.scale != nullptr) return soft_rows<V, true, true, T, Q>(job, begin, end, scratch);
    if (job.shift != nullptr) return soft_rows<V, false, true, T, Q>(job, begin, end, scratch);
    return soft_rows<V, false, false, T, Q>(job, begin, end, scratch);
}

// Named by type, and by ISA through the namespace: a profile reads without the source.
static int64_t soft_targets_f32(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept {
    return soft_rows_of<F32, float, float>(job, begin, end, scratch);
}
static int64_t soft_targets_f64(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept {
    return soft_rows_of<F64, double, double>(job, begin, end, scratch);
}
static int64_t soft_targets_bf16(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept {
    if (job.real_target) return soft_rows_of<F32, bf16, float>(job, begin, end, scratch);
    return soft_rows_of<F32, bf16, bf16>(job, begin, end, scratch);
}
static int64_t soft_targets_f16(const SoftTargets& job, int64_t begin, int64_t end, void* scratch) noexcept {
    if (job.real_target) return soft_rows_of<F32, f16, float>(job, begin, end, scratch);
    return soft_rows_of<F32, f16, f16>(job, begin, end, scratch);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
