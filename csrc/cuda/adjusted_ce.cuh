// Body of the loss kernels: one row by a group of threads. A row is read once and waits in registers for its sum
// (kRegisters), or is read again from memory. With one label and no closed form, what waits is the exponentials, one
// exp a logit (kKeep); otherwise the logits, and the exponentials are computed again for the gradient.
#pragma once
#include "terms.cuh"

namespace ltk {
namespace cuda {

__device__ __forceinline__ uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// The term D_j of Seesaw and softmax equalization for one label; cpu/closed_forms.inl says what it is.
template <class Real>
struct ClosedTerm {
    Form form;
    const Real* table;
    Real label_count, reference, p, q;  // Seesaw
    uint32_t row_key;                   // equalization
    int32_t limit;

    // `floor`: log sum exp of the row's logits, plus log eps of Seesaw.
    __device__ __forceinline__ ClosedTerm(const RowsJob& job, int64_t row, int64_t label, Real own, Real floor)
        : form(job.ce.closed.form), table(static_cast<const Real*>(job.ce.closed.table)) {
        const ClosedForm& closed = job.ce.closed;
        if (form == Form::seesaw) {
            p = static_cast<Real>(closed.options[0]);
            q = static_cast<Real>(closed.options[1]);
            reference = own > floor ? own : floor;
            label_count = table[label];
        } else if (form == Form::equalization) {
            const uint64_t seed = static_cast<uint64_t>(*closed.seed);
            row_key = mix32(mix32(mix32(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32)) ^
                            static_cast<uint32_t>(row));
            limit = static_cast<int32_t>(rint(closed.options[0] * 16777216.0));
        }
    }
    __device__ __forceinline__ Real operator()(Real z, int64_t j) const {
        if (form == Form::seesaw) {
            const Real rarer = larger(label_count - table[j], Real(0));
            return q * larger(z - reference, Real(0)) - p * rarer;
        }
        if (form == Form::equalization) {
            const uint32_t draw = mix32(mix32(static_cast<uint32_t>(j) + 0x9e3779b9u) ^ row_key);
            if (table[j] != Real(0) && static_cast<int32_t>(draw >> 8) < limit) return -Real(INFINITY);
        }
        return Real(0);
    }
};

template <class T, bool kRegisters, bool kKeep>
__device__ __forceinline__ void adjusted_ce_row(const RowsJob& job) {
    static_assert(kRegisters || !kKeep, "exponentials are kept in registers only");
    using Real = real_t<T>;
    using Index = std::conditional_t<kRegisters, int, int64_t>;
    constexpr int kN = kVec<T>;
    // From memory: two loads in flight a thread, as many as 128 registers leave room for.
    constexpr int kHeld = kRegisters ? Traits<T>::kHeld : sizeof(T) == 8 ? 1 : 2;
    constexpr int kTerms = kKeep ? 1 : 2;

    const AdjustedCe& ce = job.ce;
    Group<Real> group(job.plan.threads, job.plan.cluster);
    const int64_t row = group.row();
    const bool inside = row < ce.rows;
    const int64_t at_row = inside ? row : 0;
    const Row<T, Index> view(static_cast<const T*>(ce.logits) + at_row * ce.logits_stride,
                             ce.grad == nullptr ? nullptr : static_cast<T*>(ce.grad) + at_row * ce.grad_stride,
                             ce.classes, inside);
    const Index member = group.member(), members = group.members();
    const Real* const scale = static_cast<const Real*>(ce.scale);
    const Real* const shift = static_cast<const Real*>(ce.shift);
    const Real* const weight = static_cast<const Real*>(ce.weight);
    const bool smooth = ce.label_smoothing != 0.0;
    const Real minus_infinity = -Real(INFINITY);

    // The loads come first, before anything is known of the label: they take longest.
    Raw raw[kHeld];
    if constexpr (kRegisters) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (member + k * members < view.vectors) raw[k] = view.fetch(member + k * members);
    }
    const Labels<Real> labels = labels_of<Real>(job, at_row, inside);
    const bool normal = labels.state == RowState::normal;
    const int terms = kKeep || ce.target_b == nullptr ? 1 : 2;
    Term<Real, Index> term[kTerms];
#pragma unroll
    for (int t = 0; t < kTerms; ++t)
        if (t < terms) term[t] = make_term(job, view, labels.label[t], labels.share[t], normal);

    // beta z + delta; columns outside the row are masked later.
    const auto adjust = [&](Index j, const Raw& from, Real(&x)[kN]) {
        unpack(from, x, T());
        if (scale != nullptr) view.table(scale, j, [&](int k, Real t) { x[k] *= t; });
        if (shift != nullptr) view.table(shift, j, [&](int k, Real t) { x[k] += t; });
    };
    Real x[kRegisters ? kHeld : 1][kN];
    if constexpr (kRegisters) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (member + k * members < view.vectors) adjust(view.first(member + k * members), raw[k], x[k]);
    }
    // f(first column, adjusted logits) for each of the thread's vectors.
    const auto sweep = [&](auto f) {
        if constexpr (kRegisters) {
#pragma unroll
            for (int k = 0; k < kHeld; ++k)
                if (member + k * members < view.vectors) f(view.first(member + k * members), x[k]);
        } else {
            for (Index base = member; base < view.vectors; base += kHeld * members) {
#pragma unroll
                for (int k = 0; k < kHeld; ++k)
                    if (base + k * members < view.vectors) raw[k] = view.fetch(base + k * members);
#pragma unroll
                for (int k = 0; k < kHeld; ++k)
                    if (base + k * members < view.vectors) {
                        adjust(view.first(base + k * members), raw[k], x[0]);
                        f(view.first(base + k * members), x[0]);
                    }
            }
        }
    };
    // Minus infinity outside the row and at the label.
    const auto mask = [&](Index j, Index label, Real(&a)[kN]) {
        if (view.full(j) && (label < j || label >= j + kN)) return;
#pragma unroll
        for (int k = 0; k < kN; ++k)
            if (!view.valid(j + k) || j + k == label) a[k] = minus_infinity;
    };
    const auto smoothing = [&](Index j, Index label, const Real(&gap)[kN], Real& below, Real& weights) {
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            if (!view.valid(j + k) || j + k == label) continue;
            const Real w = weight == nullptr ? Real(1) : __ldg(weight + j + k);
            below += w * gap[k];
            weights += w;
        }
    };
    const auto total_of = [](const Real(&e)[kN]) {
        Real sum = e[0] + e[1];
        if constexpr (kN > 2) sum += e[2] + e[3];
        if constexpr (kN > 4) sum += (e[4] + e[5]) + (e[6] + e[7]);
        return sum;
    };

    // Adds a vector to a running maximum and sum; the reference of an empty maximum is 0, and not -inf - -inf.
    const auto accumulate = [&](const Real(&a)[kN], Real(&gap)[kN], Real& top, Real& sum) {
        Real highest = top;
#pragma unroll
        for (int k = 0; k < kN; ++k) highest = larger(highest, a[k]);
        const Real before = top == minus_infinity ? Real(0) : top;
        const Real reference = highest == minus_infinity ? Real(0) : highest;
        if (sum != Real(0)) sum *= exp_real(top - reference);
        Real e[kN];
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            gap[k] = a[k] - reference;
            e[k] = exp_real(gap[k]);
        }
        sum += total_of(e);
        top = highest;
        return before - reference;
    };
    Real floor = Real(0);
    if constexpr (!kKeep) {
        if (ce.closed.form == Form::seesaw) {  // looks at the row's softmax first
            Real top = minus_infinity, sum = Real(0);
            sweep([&](Index j, Real(&z)[kN]) {
                Real a[kN], gap[kN];
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] = z[k];
                mask(j, kNowhere, a);
                accumulate(a, gap, top, sum);
            });
            group.max_sum(top, sum);
            floor =
                static_cast<Real>(static_cast<double>(top) + static_cast<double>(log_real(sum)) + ce.closed.options[2]);
        }
    }
    const auto closed_term = [&](const Term<Real, Index>& each) {
        // No table and no margin: the target is the logit itself.
        return ClosedTerm<Real>(job, at_row, each.column < 0 ? 0 : each.column, static_cast<Real>(each.target), floor);
    };
    const bool closed = !kKeep && (ce.closed.form == Form::seesaw || ce.closed.form == Form::equalization);

    Real upstream = Real(1) / static_cast<Real>(denominator_of(job));
    if (ce.row_coef != nullptr)
        upstream *= static_cast<const Real*>(ce.row_coef)[job.row_coef_stride == 0 ? 0 : at_row];

    Outcome<Real> outcome[kTerms];
    Real references[kTerms];  // what the exponentials of the gradient are relative to
    Real loss = Real(0);
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
        if (t >= terms) break;
        const Term<Real, Index>& my = term[t];
        Real top = minus_infinity, sum = Real(0), below = Real(0), weights = Real(0);
        if constexpr (kKeep) {
            sweep([&](Index j, Real(&a)[kN]) {
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] *= my.sigma;
                mask(j, my.column, a);
#pragma unroll
                for (int k = 0; k < kN; ++k) top = larger(top, a[k]);
            });
            const Real reference = top == minus_infinity ? Real(0) : top;
            sweep([&](Index j, Real(&a)[kN]) {
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] -= reference;
                if (smooth) smoothing(j, my.column, a, below, weights);
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] = exp_real(a[k]);
                sum += total_of(a);
            });
        } else if (normal) {  // other rows need no sum, and without the branch ptxas spills
            const ClosedTerm<Real> d = closed_term(my);
            sweep([&](Index j, Real(&b)[kN]) {
                Real a[kN], gap[kN];
#pragma unroll
                for (int k = 0; k < kN; ++k)
                    a[k] = my.sigma * (closed && view.valid(j + k) ? b[k] + d(b[k], j + k) : b[k]);
                mask(j, my.column, a);
                const Real rise = accumulate(a, gap, top, sum);
                if (smooth) {
                    below += rise * weights;
                    smoothing(j, my.column, gap, below, weights);
                }
            });
        }
        const Real mine = top;
        group.max_sum(top, sum);
        if (smooth) {
            // From the thread's own reference to the row's.
            below += ((mine == minus_infinity ? Real(0) : mine) - (top == minus_infinity ? Real(0) : top)) * weights;
            group.sum(below, weights);
        }
        const Real relative = kKeep ? mine : top;
        outcome[t] = finish(ce, my, top, sum, below, weights, upstream);
        outcome[t].factor *= exp_wide(static_cast<double>(relative) - outcome[t].highest, Real());
        references[t] = relative == minus_infinity ? Real(0) : relative;
        loss += outcome[t].loss;
    }
    if (labels.state == RowState::ignored) loss = Real(0);
    if (labels.state == RowState::bad) loss = Real(NAN);

    if (ce.grad != nullptr) {
        const Real fill = labels.state == RowState::bad ? Real(NAN) : Real(0);
        sweep([&](Index j, Real(&held)[kN]) {
            Real y[kN];
            if (!normal) {
#pragma unroll
                for (int k = 0; k < kN; ++k) y[k] = fill;
                view.store(j, y);
                return;
            }
#pragma unroll
            for (int k = 0; k < kN; ++k) y[k] = Real(0);
#pragma unroll
            for (int t = 0; t < kTerms; ++t) {
                if (t >= terms) break;
                const Term<Real, Index>& my = term[t];
                Real g[kN];
                if constexpr (kKeep) {
#pragma unroll
                    for (int k = 0; k < kN; ++k) g[k] = outcome[t].factor * held[k];
                } else {
                    const ClosedTerm<Real> d = closed_term(my);
#pragma unroll
                    for (int k = 0; k < kN; ++k) {
                        const Real a = my.sigma * (closed && view.valid(j + k) ? held[k] + d(held[k], j + k) : held[k]);
                        g[k] = outcome[t].factor * exp_real(a - references[t]);
                    }
                }
                if (smooth) {
#pragma unroll
                    for (int k = 0; k < kN; ++k)
                        if (view.valid(j + k))
                            g[k] -= outcome[t].soft * (weight == nullptr ? Real(1) : __ldg(weight + j + k));
                }
                if (scale != nullptr) view.table(scale, j, [&](int k, Real t) { g[k] *= t; });
                if (my.column >= j && my.column < j + kN) {
#pragma unroll
                    for (int k = 0; k < kN; ++k)
                        if (j + k == my.column) g[k] = outcome[t].label_grad;
                }
#pragma unroll
                for (int k = 0; k < kN; ++k) y[k] += g[k];
            }
            view.store(j, y);
        });
    }
    group.leave();
    write_loss(job, group, loss);
}

template <class T>
__global__ void __maxnreg__(Traits<T>::kRegisters) adjusted_ce_rows(const RowsJob job) {
    adjusted_ce_row<T, true, true>(job);
}
// Mixed labels, Seesaw and softmax equalization.
template <class T>
__global__ void __launch_bounds__(kMaxBlock) adjusted_ce_rows_terms(const RowsJob job) {
    adjusted_ce_row<T, true, false>(job);
}
// Rows of any length.
template <class T>
__global__ void __maxnreg__(sizeof(T) == 8 ? 160 : 128) adjusted_ce_rows_memory(const RowsJob job) {
    adjusted_ce_row<T, false, false>(job);
}

}  // namespace cuda
}  // namespace ltk
