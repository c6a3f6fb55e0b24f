// Body of experts.h: the coupling's share of every expert's gradient waits in scratch while the expert's own row
// (adjusted_ce.inl) is formed, which adds it. Everything of a row stays in the caches. Where the coupling compares the
// logits that the losses see, it takes its probabilities from their exponentials.

namespace ltk {
namespace LTK_NAMESPACE {

// What one thread works in: a part of its scratch each.
template <class Real>
struct ExpertScratch {
    Real* e;  // of row_term, as block_reference
    Real* block_reference;
    Real* middle;                 // mean of the experts' u, or sum of their logits
    Real* add[kExperts];          // u of an expert; then what the coupling adds to its gradient
    Real* softmax[kExperts + 1];  // of an expert, and of the mean
    Real* own[kExperts];          // as e and block_reference, of an expert whose sums its coupling shares
    Real* own_reference[kExperts];
};

template <class Real>
static inline ExpertScratch<Real> expert_scratch(const Experts& job, void* memory) noexcept {
    const int64_t row = adjusted_ce_row(job.joint.classes);
    const int64_t references = adjusted_ce_row((job.joint.classes + kBlock - 1) / kBlock);
    Real* next = static_cast<Real*>(memory);
    const auto take = [&next](int64_t n) {
        Real* found = next;
        next += n;
        return found;
    };
    ExpertScratch<Real> out;
    out.e = take(row);
    out.middle = take(row);
    for (int e = 0; e < job.experts; ++e) out.add[e] = take(row);
    for (int e = 0; e <= job.experts; ++e) out.softmax[e] = take(row);
    for (int e = 0; e < job.experts; ++e) out.own[e] = take(row);
    out.block_reference = take(references);
    for (int e = 0; e < job.experts; ++e) out.own_reference[e] = take(references);
    return out;
}

// u_ej of one vector. Its tables: `multiply` and `plus`, null for neutral.
template <class V, class T, class Mask>
LTK_INLINE typename V::Reg coupled(const T* z, const typename V::Real* multiply, const typename V::Real* plus,
                                   typename V::Reg sigma, int64_t j, Mask mask) noexcept {
    typename V::Reg x = V::load(z + j, mask);
    if (multiply != nullptr) x = V::mul(x, V::load(multiply + j, mask));
    if (plus != nullptr) x = V::add(x, V::load(plus + j, mask));
    return V::mul(x, sigma);
}

// All of a row, in `out`; or the logits themselves where these are what is wanted.
template <class V, class T>
static inline const typename V::Real* coupled_row(const T* z, int64_t classes, const typename V::Real* multiply,
                                                  const typename V::Real* plus, double by,
                                                  typename V::Real* out) noexcept {
    using Real = typename V::Real;
    if constexpr (std::is_same<T, Real>::value)
        if (multiply == nullptr && plus == nullptr && by == 1.0) return z;
    const typename V::Reg sigma = V::set(static_cast<Real>(by));
    each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
        V::store(out + j, coupled<V>(z, multiply, plus, sigma, j, mask), mask);
    });
    return out;
}

// log of the sum of exp(u - reference), the reference in `*reference`, and probabilities in place of the exponentials.
template <class V, class T>
static inline double probabilities_row(const T* u, int64_t classes, typename V::Real* p,
                                       typename V::Real* block_reference, double* reference) noexcept {
    using Real = typename V::Real;
    const Real* nothing = nullptr;
    const RowSums<V> row =
        row_sums<V, false, false>(u, classes, nothing, nothing, int64_t{-1}, 1.0, false, nothing, p, block_reference);
    const bool masked = row.reference == static_cast<Real>(-INFINITY);
    *reference = masked ? 0.0 : static_cast<double>(row.reference);
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        const typename V::Reg k =
            V::set(masked ? static_cast<Real>(NAN) : block_factor<V>(row, block_reference[block], 1.0 / row.others));
        each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            V::store(p + j, V::mul(k, V::load(p + j, mask)), mask);
        });
    }
    return std::log(row.others);
}

// The same from the sums of an expert's loss, which leave its label out, with `label_u` the label's u.
template <class V>
static inline double probabilities_of(const RowSums<V>& row, const typename V::Real* e,
                                      const typename V::Real* block_reference, int64_t classes, int64_t label,
                                      double label_u, typename V::Real* p, double* reference) noexcept {
    using Real = typename V::Real;
    const double others = static_cast<double>(row.reference);
    const bool towers = label_u - others > 500.0;  // as in row_term
    const double base = towers ? label_u : others, shrink = towers ? std::exp(others - base) : 1.0;
    const double label_e = std::exp(label_u - base), total = row.others * shrink + label_e;
    *reference = base == -INFINITY ? 0.0 : base;
    for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        const typename V::Reg k = V::set(block_factor<V>(row, block_reference[block], shrink / total));
        each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            V::store(p + j, V::mul(k, V::load(e + j, mask)), mask);
        });
    }
    p[label] = static_cast<Real>(label_e / total);
    return std::log(total);
}

// Of u of the experts and of their mean.
template <class Real>
struct RowLogs {
    double reference[kExperts + 1];
    double log_sum[kExperts + 1];  // of exp(u - reference)
    const Real* u[kExperts];       // of an expert: in ExpertScratch::add, or its logits
};

// The sum over the experts of KL(p || p_e); `weight` times its gradient goes to s.add.
template <class V>
static inline double mean_kl_row(const Experts& job, const RowLogs<typename V::Real>& row,
                                 const typename V::Real* const* multiply, double weight, bool want,
                                 const ExpertScratch<typename V::Real>& s) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const int64_t classes = job.joint.classes;
    const Real* p = s.softmax[job.experts];
    const double middle = row.reference[job.experts];
    double sum = 0.0;
    for (int e = 0; e < job.experts; ++e) {
        // (u_j - its reference) of the mean and of the expert: their difference cancels nothing that large logits
        // share.
        const Reg minus_mean = V::set(static_cast<Real>(-middle)), own = V::set(static_cast<Real>(row.reference[e]));
        const Reg k = V::set(static_cast<Real>(weight * job.sigma));
        double dot = 0.0;
        for (int64_t begin = 0; begin < classes; begin += kBlock) {
            const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
            Reg dots = V::set(0);
            each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
                const Reg u = V::load(row.u[e] + j, mask);
                const Reg apart = V::sub(V::add(V::load(s.middle + j, mask), minus_mean), V::sub(u, own));
                const Reg mean = V::load(p + j, mask);
                dots = V::add(dots, where_not_zero(mean, V::mul(mean, apart)));
                if (!want) return;
                Reg h = V::mul(k, V::sub(V::load(s.softmax[e] + j, mask), mean));
                if (multiply[e] != nullptr) h = V::mul(h, V::load(multiply[e] + j, mask));
                V::store(s.add[e] + j, h, mask);
            });
            dot += static_cast<double>(V::horizontal_sum(dots));
        }
        sum += dot - row.log_sum[job.experts] + row.log_sum[e];
    }
    return sum;
}

// The sum over e != f of KL(p_f || p_e), over E - 1; `weight` times its gradient goes to s.add. With l_e = log p_e and
// the sums P and L over the experts: sum_f sum_j p_fj (E l_fj - L_j), whose summands of f are A_f; and the derivative
// in u_e is E p_e - P + p_e (E l_e - L - A_e), all over E - 1. Known: the number of experts, whose loops are unrolled
// then; 0 for any.
template <class V, int Known>
static inline double mutual_kl_row(const Experts& job, const RowLogs<typename V::Real>& row,
                                   const typename V::Real* const* multiply, double weight, bool want,
                                   const ExpertScratch<typename V::Real>& s) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const int64_t classes = job.joint.classes;
    const int experts = Known != 0 ? Known : job.experts;
    if (experts == 1) {
        if (want) std::memset(static_cast<void*>(s.add[0]), 0, static_cast<size_t>(classes) * sizeof(Real));
        return 0.0;
    }
    const Reg zero = V::set(0), many = V::set(static_cast<Real>(experts));
    double of[kExperts] = {}, sum = 0.0;
    Reg own[kExperts], log_sum[kExperts];
    for (int e = 0; e < experts; ++e) {
        own[e] = V::set(static_cast<Real>(row.reference[e]));
        log_sum[e] = V::set(static_cast<Real>(row.log_sum[e]));
    }
    const auto log_p = [&](int e, int64_t j, auto mask) LTK_INLINE_LAMBDA {
        return V::sub(V::sub(V::load(row.u[e] + j, mask), own[e]), log_sum[e]);
    };
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
        const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
        Reg dots[kExperts];
        for (int e = 0; e < experts; ++e) dots[e] = zero;
        each_vector<V>(begin, end, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            Reg logs = zero, l[kExperts];
            for (int e = 0; e < experts; ++e) {
                l[e] = log_p(e, j, mask);
                logs = V::add(logs, l[e]);
            }
            for (int e = 0; e < experts; ++e) {
                const Reg p = V::load(s.softmax[e] + j, mask);
                const Reg apart = V::sub(V::mul(many, l[e]), logs);
                const Reg h = where_not_zero(p, V::mul(p, apart));
                V::store(s.add[e] + j, h, mask);
                dots[e] = V::add(dots[e], h);
            }
        });
        for (int e = 0; e < experts; ++e) of[e] += static_cast<double>(V::horizontal_sum(dots[e]));
    }
    for (int e = 0; e < experts; ++e) sum += of[e];
    const double per_pair = 1.0 / (experts - 1);
    if (want) {
        const Reg k = V::set(static_cast<Real>(weight * job.sigma * per_pair));
        Reg a[kExperts];
        for (int e = 0; e < experts; ++e) a[e] = V::set(static_cast<Real>(of[e]));
        each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
            Reg all = zero;
            for (int e = 0; e < experts; ++e) all = V::add(all, V::load(s.softmax[e] + j, mask));
            for (int e = 0; e < experts; ++e) {
                const Reg p = V::load(s.softmax[e] + j, mask);
                Reg h = V::add(V::load(s.add[e] + j, mask), V::sub(V::mul(V::sub(many, a[e]), p), all));
                h = V::mul(h, k);
                if (multiply[e] != nullptr) h = V::mul(h, V::load(multiply[e] + j, mask));
                V::store(s.add[e] + j, h, mask);
            }
        });
    }
    return sum * per_pair;
}

// `known`: the row's sums where they have been found already, with `e` and `block_reference`; or null.
template <class V, class T>
static inline double expert_term(const AdjustedCe& job, const T* z, int64_t label, double upstream, typename V::Real* e,
                                 typename V::Real* block_reference, const typename V::Real* add, typename V::Real* grad,
                                 const RowSums<V>* known) noexcept {
    const Term<typename V::Real> term = make_term<V>(job, get(z + label), label, 1.0);
    if (job.scale != nullptr) {
        if (known == nullptr) return row_term<V, true, true>(job, z, term, upstream, e, block_reference, add, grad);
        return term_of_sums<V, true, true>(job, z, term, *known, upstream, e, block_reference, add, grad);
    }
    if (known == nullptr) return row_term<V, false, false>(job, z, term, upstream, e, block_reference, add, grad);
    return term_of_sums<V, false, false>(job, z, term, *known, upstream, e, block_reference, add, grad);
}

// The sums that expert_term begins with.
template <class V, class T>
static inline RowSums<V> expert_sums(const AdjustedCe& job, const T* z, int64_t label, typename V::Real* e,
                                     typename V::Real* block_reference) noexcept {
    using Real = typename V::Real;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real* weight = static_cast<const Real*>(job.weight);
    const bool smooth = job.label_smoothing != 0.0;
    if (scale != nullptr)
        return row_sums<V, true, true>(z, job.classes, scale, shift, label, 1.0, smooth, weight, e, block_reference);
    return row_sums<V, false, false>(z, job.classes, scale, shift, label, 1.0, smooth, weight, e, block_reference);
}

template <class V, class T>
static void expert_rows(const Experts& job, int64_t begin, int64_t end, void* scratch) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    const int64_t classes = job.joint.classes, rows = job.joint.rows;
    const int experts = job.experts;
    const ExpertScratch<Real> s = expert_scratch<Real>(job, scratch);
    const Real* inverse = static_cast<const Real*>(job.inverse_temperature);
    bool want = false;
    for (int e = 0; e < experts; ++e) want |= job.expert[e].grad != nullptr;
    Real* row_loss = static_cast<Real*>(job.row_loss);
    Real* nowhere = nullptr;
    RowLogs<Real> row;
    const T* z[kExperts];
    const Real* multiply[kExperts];
    const Real* plus[kExperts];
    for (int e = 0; e < experts; ++e) {
        multiply[e] = job.adjusted ? static_cast<const Real*>(job.expert[e].scale) : inverse;
        plus[e] = job.adjusted ? static_cast<const Real*>(job.expert[e].shift) : nullptr;
    }
    // Where the coupling compares the logits as the experts' losses see them, both have one set of exponentials.
    bool shared = job.coupling != Coupling::sum && job.sigma == 1.0 && inverse == nullptr;
    for (int e = 0; e < experts; ++e)
        shared &= job.expert[e].row_scale == nullptr && (job.adjusted || job.expert[e].scale == nullptr);
    RowSums<V> known[kExperts];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t label = job.joint.target[i];
        if (label == job.joint.ignore_index) {
            for (int e = 0; e <= experts; ++e) row_loss[e * rows + i] = 0;
            for (int e = 0; e < experts; ++e) {
                Real* grad = static_cast<Real*>(job.expert[e].grad);
                if (grad != nullptr)
                    std::memset(static_cast<void*>(grad + i * classes), 0, static_cast<size_t>(classes) * sizeof(Real));
            }
            continue;
        }
        for (int e = 0; e < experts; ++e)
            z[e] = static_cast<const T*>(job.expert[e].logits) + i * job.expert[e].logits_stride;
        const double weight = upstream_of<Real>(job.joint, i);
        double together;
        if (job.coupling == Coupling::sum) {
            each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
                Reg sum = V::load(z[0] + j, mask);
                for (int e = 1; e < experts; ++e) sum = V::add(sum, V::load(z[e] + j, mask));
                V::store(s.middle + j, sum, mask);
            });
            const Real* sum = s.middle;
            together = expert_term<V>(job.joint, sum, label, weight, s.e, s.block_reference, nowhere,
                                      want ? s.add[0] : nullptr, nullptr);
        } else {
            for (int e = 0; e < experts; ++e) {
                row.u[e] = coupled_row<V>(z[e], classes, multiply[e], plus[e], job.sigma, s.add[e]);
                if (shared) {
                    known[e] = expert_sums<V>(job.expert[e], z[e], label, s.own[e], s.own_reference[e]);
                    row.log_sum[e] =
                        probabilities_of<V>(known[e], s.own[e], s.own_reference[e], classes, label,
                                            static_cast<double>(row.u[e][label]), s.softmax[e], &row.reference[e]);
                    continue;
                }
                row.log_sum[e] =
                    probabilities_row<V>(row.u[e], classes, s.softmax[e], s.block_reference, &row.reference[e]);
            }
            if (job.coupling == Coupling::mutual_kl) {
                together = experts == 3 ? mutual_kl_row<V, 3>(job, row, multiply, weight, want, s)
                                        : mutual_kl_row<V, 0>(job, row, multiply, weight, want, s);
            } else {
                // Of u less its expert's reference: what all classes share would round the mean.
                const Reg share = V::set(static_cast<Real>(1.0 / experts));
                each_vector<V>(0, classes, [&](int64_t j, auto mask) LTK_INLINE_LAMBDA {
                    Reg sum = V::set(0);
                    for (int e = 0; e < experts; ++e) {
                        const Reg reference = V::set(static_cast<Real>(row.reference[e]));
                        sum = V::add(sum, V::sub(V::load(row.u[e] + j, mask), reference));
                    }
                    V::store(s.middle + j, V::mul(share, sum), mask);
                });
                row.log_sum[experts] = probabilities_row<V>(s.middle, classes, s.softmax[experts], s.block_reference,
                                                            &row.reference[experts]);
                together = mean_kl_row<V>(job, row, multiply, weight, want, s);
            }
        }
        const double own = job.joint.sample_weight == nullptr
                               ? 1.0
                               : static_cast<double>(static_cast<const Real*>(job.joint.sample_weight)[i]);
        row_loss[experts * rows + i] = static_cast<Real>(together * job.factor[experts] * own);
        for (int e = 0; e < experts; ++e) {
            const AdjustedCe& each = job.expert[e];
            Real* grad = each.grad == nullptr ? nullptr : static_cast<Real*>(each.grad) + i * classes;
            const Real* add = job.coupling == Coupling::sum ? s.add[0] : s.add[e];
            const double loss =
                job.factor[e] * expert_term<V>(each, z[e], label, upstream_of<Real>(each, i), shared ? s.own[e] : s.e,
                                               shared ? s.own_reference[e] : s.block_reference, add, grad,
                                               shared ? &known[e] : nullptr);
            row_loss[e * rows + i] = static_cast<Real>(loss * own);
        }
    }
}

// Named by type, and by ISA through the namespace: a profile reads without the source.
static void experts_f32(const Experts& job, int64_t begin, int64_t end, void* scratch) noexcept {
    expert_rows<F32, float>(job, begin, end, scratch);
}
static void experts_f64(const Experts& job, int64_t begin, int64_t end, void* scratch) noexcept {
    expert_rows<F64, double>(job, begin, end, scratch);
}
static void experts_bf16(const Experts& job, int64_t begin, int64_t end, void* scratch) noexcept {
    expert_rows<F32, bf16>(job, begin, end, scratch);
}
static void experts_f16(const Experts& job, int64_t begin, int64_t end, void* scratch) noexcept {
    expert_rows<F32, f16>(job, begin, end, scratch);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
