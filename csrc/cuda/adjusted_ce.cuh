// Bodies of the loss kernels: one row by a group of threads. With one label and no closed form but ArcFace, a row is
// read once, and its exponentials wait in registers for their sum (adjusted_ce_held). Otherwise the logits wait, or are
// read again from memory, and the exponentials are computed again for the gradient (adjusted_ce_swept).
#pragma once
#include "terms.cuh"

namespace ltk {
namespace cuda {

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
            row_key = equalization_key(*closed.seed, row);
            limit = equalization_limit(closed);
        }
    }
    __device__ __forceinline__ Real operator()(Real z, int64_t j) const {
        if (form == Form::seesaw) {
            const Real rarer = larger(label_count - table[j], Real(0));
            return q * larger(z - reference, Real(0)) - p * rarer;
        }
        const bool masks = form == Form::equalization && table[j] != Real(0) && equalization_draws(row_key, j, limit);
        return masks ? -Real(INFINITY) : Real(0);
    }
};

// a_j = sigma (beta_j z_j + delta_j), for a vector of columns or a single one.
template <class T, class Index, Tables kTables>
struct Adjust {
    using Real = real_t<T>;

    __device__ __forceinline__ Adjust(const RowsJob& job, const Row<T, Index>& view, Real row_scale)
        : scale(view.copy(job.scale)),
          shift(view.copy(job.shift)),
          scaled(kTables == Tables::any && job.scale.source != nullptr),
          shifted(kTables == Tables::shift || (kTables == Tables::any && job.shift.source != nullptr)),
          sigma(row_scale) {}

    template <class Array>
    __device__ __forceinline__ void operator()(Index j, Array& x) const {
        constexpr int kN = kExtent<Array>;
        Real t[kN];
        if (scaled) {
            Row<T, Index>::read(scale, j, t);
#pragma unroll
            for (int k = 0; k < kN; ++k) x[k] *= t[k];
        }
        if (shifted) {
            Row<T, Index>::read(shift, j, t);
#pragma unroll
            for (int k = 0; k < kN; ++k) x[k] += t[k];
        }
        if constexpr (kTables == Tables::any)
#pragma unroll
            for (int k = 0; k < kN; ++k) x[k] *= sigma;
    }
    // The chain rule's part of beta; sigma is in the factors.
    template <class Array>
    __device__ __forceinline__ void chain(Index j, Array& g) const {
        constexpr int kN = kExtent<Array>;
        if (!scaled) return;
        Real t[kN];
        Row<T, Index>::read(scale, j, t);
#pragma unroll
        for (int k = 0; k < kN; ++k) g[k] *= t[k];
    }

    const Real *const scale, *const shift;
    const bool scaled, shifted;
    const Real sigma;
};

// The sweeps have no test in them: what a thread holds beyond the row, and the label, is minus infinity from the start,
// and the label's owner overwrites its gradient after the vector is stored.
template <class T, Tables kTables>
__device__ __forceinline__ void adjusted_ce_held(const RowsJob& job) {
    using Real = real_t<T>;
    constexpr int kN = kVec<T>, kHeld = Traits<T>::kHeld, kEnds = Traits<T>::kEnds;
    const AdjustedCe& ce = job.ce;
    Group<Real> group(job.plan);
    const int64_t row = group.row();
    const bool inside = row < ce.rows;
    const Row<T, int> view = row_of<T, int>(ce, inside ? row : 0, inside);
    const int member = group.member(), members = group.members();
    const Real minus_infinity = -Real(INFINITY);

    // The loads come first, before anything is known of the label: they take longest.
    Raw raw[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
        if (member + k * members < view.vectors) raw[k] = view.load(member + k * members);
    Real x[kHeld][kN], ends[kEnds][1] = {};
    // f(k) for the vectors that threads hold: rows in less than a warp may need half of them.
    const auto vectors = [&](auto f) {
#pragma unroll
        for (int k = 0; k < kHeld / 2; ++k) f(k);
        if (view.vectors <= kHeld / 2 * members) return;
#pragma unroll
        for (int k = kHeld / 2; k < kHeld; ++k) f(k);
    };
    // The ends are those of the last threads: the first warp has the label to look after.
    const int from_last = members - 1 - member;
    const auto each_end = [&](auto f) {
        if (from_last >= view.ends) return;
#pragma unroll
        for (int e = 0; e < kEnds; ++e)
            if (e == 0 || from_last + e * members < view.ends) f(view.end(from_last + e * members), ends[e], e);
    };
    T raw_ends[kEnds] = {};  // not converted here, where that would wait for the load
    each_end([&](int j, Real(&)[1], int e) { raw_ends[e] = view.z[j]; });

    const Labels<Real> labels = labels_of<Real>(job, inside ? row : 0, inside);
    const bool normal = labels.state == RowState::normal;
    const int label = static_cast<int>(labels.label[0]);
    Term<Real, int> term{};
    if (group.leading()) term = make_term<kTables>(job, view, labels.label[0], Real(1), normal);
    if (job.copied != 0) wait_for_first_launch();

    const Adjust<T, int, kTables> adjust(job, view,
                                         kTables == Tables::any && normal ? at(ce.row_scale, label, Real(1)) : Real(1));
    vectors([&](int k) {
        const int v = member + k * members;
        if (v < view.vectors) {
            unpack(raw[k], x[k], T());
            adjust(view.column(v), x[k]);
        } else {
#pragma unroll
            for (int i = 0; i < kN; ++i) x[k][i] = minus_infinity;
        }
    });
    each_end([&](int j, Real(&a)[1], int e) {
        a[0] = static_cast<Real>(get_element(&raw_ends[e]));
        adjust(j, a);
    });

    // The label's place: element `lane` of vector `at_vector`, or an end.
    const int behind = label - view.head, at_vector = behind >= 0 && behind < view.behind ? behind / kN : -1;
    const int at_end = label < view.head ? label : label - view.behind;
    const bool owner =
        normal && (at_vector >= 0 ? (at_vector & (members - 1)) == member : (at_end & (members - 1)) == from_last);
    if (owner) {
        const int lane = at_vector < 0 ? kN : behind % kN;
        // Selections: of conditional stores the compiler would make one with an address, and arrays in local memory.
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (at_vector == member + k * members) {
#pragma unroll
                for (int i = 0; i < kN; ++i) x[k][i] = i == lane ? minus_infinity : x[k][i];
            }
#pragma unroll
        for (int e = 0; e < kEnds; ++e)
            ends[e][0] = at_vector < 0 && at_end == from_last + e * members ? minus_infinity : ends[e][0];
    }

    Real top = minus_infinity;
    vectors([&](int k) {
#pragma unroll
        for (int i = 0; i < kN; ++i) top = larger(top, x[k][i]);
    });
    each_end([&](int, const Real(&a)[1], int) { top = larger(top, a[0]); });
    const bool smooth = kTables == Tables::any && smooths(ce);
    const Smoothing<T, int> smoothing{view.copy(job.weight)};
    const Real origin = origin_of(top);
    constexpr int kSums = kTables == Tables::any ? 4 : 2;  // the last two are of smoothing
    Real found[kSums] = {top};
    const auto exponentials = [&](int j, bool there, auto& a) {
        constexpr int kCount = kExtent<decltype(a)>;
#pragma unroll
        for (int i = 0; i < kCount; ++i) a[i] -= origin;
        if (smooth && there) smoothing.add(j, normal ? label : kNowhere, a, found[kSums - 2], found[kSums - 1]);
#pragma unroll
        for (int i = 0; i < kCount; ++i) a[i] = exp_for<T>(a[i]);
        found[1] += total_of(a);
    };
    vectors([&](int k) {
        const int v = member + k * members;
        exponentials(view.column(v), v < view.vectors, x[k]);
    });
    each_end([&](int j, Real(&a)[1], int) { exponentials(j, true, a); });

    group.template reduce<MaxSum<T>>(found);
    group.depart();
    Real told[4] = {}, loss = Real(0);  // factor of exponentials relative to the top, which that is, soft, the label's
    if (group.leading()) {
        const Real upstream = upstream_of<Real>(job, inside ? row : 0);
        // Without Tables::any there is no smoothing by label.
        const Real epsilon =
            kTables == Tables::any ? smoothing_of<Real>(ce, label) : static_cast<Real>(ce.label_smoothing);
        const Outcome<Real> out =
            finish(ce, term, epsilon, found[0], found[1], found[kSums - 2], found[kSums - 1], upstream);
        loss = labels.state == RowState::ignored ? Real(0) : labels.state == RowState::bad ? Real(NAN) : out.loss;
        out.tell(told, found[0]);
    }
    group.answer(told);
    const unsigned ticket = announce_loss(job, group, loss);

    if (ce.grad != nullptr) {
        if (normal) {
            // Formed again: pointers that waited for the sum would be spilled.
            const Adjust<T, int, kTables> scaled(job, view, Real(1));
            const Smoothing<T, int> smoothed{view.copy(job.weight)};
            const Real factor = told[0] * exp_for<T>(origin - told[1]);
            const auto gradient = [&](int j, auto& g) {
                constexpr int kCount = kExtent<decltype(g)>;
#pragma unroll
                for (int i = 0; i < kCount; ++i) g[i] *= factor;
                if (smooth) {
                    Real w[kCount];
                    smoothed.weights(j, w);
#pragma unroll
                    for (int i = 0; i < kCount; ++i) g[i] -= told[2] * w[i];
                }
                scaled.chain(j, g);
                view.store(j, g);
            };
            vectors([&](int k) {
                const int v = member + k * members;
                if (v < view.vectors) gradient(view.column(v), x[k]);
            });
            each_end([&](int j, Real(&g)[1], int) { gradient(j, g); });
            if (owner) put_element(view.grad + label, told[3]);
        } else {
            const Real fill = labels.state == RowState::bad ? Real(NAN) : Real(0);
            view.fill(member, members, fill);
        }
    }
    group.leave();
    collect_losses(job, group, ticket);
}

// Mixed labels, Seesaw, softmax equalization; from memory also the others.
template <class T, bool kRegisters>
__device__ __forceinline__ void adjusted_ce_swept(const RowsJob& job) {
    using Real = real_t<T>;
    using Index = std::conditional_t<kRegisters, int, int64_t>;
    constexpr int kN = kVec<T>, kHeld = Traits<T>::kHeldTerms, kEnds = Traits<T>::kEnds;
    const AdjustedCe& ce = job.ce;
    Group<Real> group(job.plan);
    const int64_t row = group.row();
    const bool inside = row < ce.rows;
    const int64_t at_row = inside ? row : 0;
    const Row<T, Index> view = row_of<T, Index>(ce, at_row, inside);
    const Index member = group.member(), members = group.members();
    const Real minus_infinity = -Real(INFINITY);

    Raw raw[kRegisters ? kHeld : 1];
    if constexpr (kRegisters) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (member + k * members < view.vectors) raw[k] = view.load(member + k * members);
    }
    const Labels<Real> labels = labels_of<Real>(job, at_row, inside);
    const bool normal = labels.state == RowState::normal;
    const int terms = ce.target_b == nullptr ? 1 : 2;
    Term<Real, Index> term[2];
    Real own[2] = {};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= terms || !normal) break;
        own[t] = view.element(labels.label[t]);
        if (group.leading()) term[t] = make_term<Tables::any>(job, view, labels.label[t], labels.share[t], normal);
    }
    wait_for_first_launch();

    // beta z + delta
    const Adjust<T, Index, Tables::any> adjust(job, view, Real(1));
    Real x[kRegisters ? kHeld : 1][kN], ends[kRegisters ? kEnds : 1][1] = {};
    if constexpr (kRegisters) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (member + k * members < view.vectors) {
                unpack(raw[k], x[k], T());
                adjust(view.column(member + k * members), x[k]);
            }
#pragma unroll
        for (int e = 0; e < kEnds; ++e)
            if (member + e * members < view.ends) {
                ends[e][0] = view.element(view.end(member + e * members));
                adjust(view.end(member + e * members), ends[e]);
            }
    }
    // f(first column, adjusted logits) for each of the thread's vectors and ends.
    const auto sweep = [&](auto f) {
        if constexpr (kRegisters) {
#pragma unroll
            for (int k = 0; k < kHeld; ++k)
                if (member + k * members < view.vectors) f(view.column(member + k * members), x[k]);
#pragma unroll
            for (int e = 0; e < kEnds; ++e)
                if (member + e * members < view.ends) f(view.end(member + e * members), ends[e]);
        } else {
            view.template stream<sizeof(T) == 4   ? 3
                                 : sizeof(T) == 2 ? 2
                                                  : 1>(member, members, [&](Index j, auto& z) {
                adjust(j, z);
                f(j, z);
            });
        }
    };
    Real floor[1] = {Real(0)};
    if (ce.closed.form == Form::seesaw) {  // looks at the row's softmax first
        Real found[2] = {minus_infinity, Real(0)};
        sweep([&](Index j, auto& z) {
            Real a[kExtent<decltype(z)>];
#pragma unroll
            for (int k = 0; k < kExtent<decltype(z)>; ++k) a[k] = z[k];
            accumulate<T>(a, j, Index(kNowhere), found[0], found[1]);
        });
        group.template reduce<MaxSum<T>>(found);
        floor[0] = static_cast<Real>(static_cast<double>(found[0]) + static_cast<double>(log_real(found[1])) +
                                     ce.closed.options[2]);
        group.answer(floor);
    }
    const bool closed = ce.closed.form == Form::seesaw || ce.closed.form == Form::equalization;
    const bool smooth = smooths(ce);
    const Smoothing<T, Index> smoothing{view.copy(job.weight)};

    Real told[2][4], sigma[2];  // factor of exponentials, what they are relative to, soft, the label's
    Index column[2];
    Real loss = Real(0);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= terms) break;
        column[t] = normal ? static_cast<Index>(labels.label[t]) : kNowhere;
        sigma[t] = normal ? at(ce.row_scale, labels.label[t], Real(1)) : Real(1);
        Real found[4] = {minus_infinity, Real(0), Real(0), Real(0)};
        if (normal) {  // other rows need no sum, and without the branch ptxas spills
            const ClosedTerm<Real> d(job, at_row, column[t], sigma[t] * own[t], floor[0]);
            sweep([&](Index j, auto& b) {
                constexpr int kCount = kExtent<decltype(b)>;
                Real a[kCount];
#pragma unroll
                for (int k = 0; k < kCount; ++k) a[k] = sigma[t] * (closed ? b[k] + d(b[k], j + k) : b[k]);
                const Real rise = accumulate<T>(a, j, column[t], found[0], found[1]);
                if (smooth) {
                    found[2] += rise * found[3];
                    smoothing.add(j, column[t], a, found[2], found[3]);
                }
            });
        }
        group.template reduce<MaxSum<T>>(found);
#pragma unroll
        for (int i = 0; i < 4; ++i) told[t][i] = Real(0);
        if (group.leading()) {
            const Real epsilon = smoothing_of<Real>(ce, labels.label[t]);
            const Outcome<Real> out =
                finish(ce, term[t], epsilon, found[0], found[1], found[2], found[3], upstream_of<Real>(job, at_row));
            out.tell(told[t], found[0]);
            loss += out.loss;
        }
        group.answer(told[t]);
    }
    group.depart();
    if (labels.state == RowState::ignored) loss = Real(0);
    if (labels.state == RowState::bad) loss = Real(NAN);
    const unsigned ticket = announce_loss(job, group, loss);

    if (ce.grad != nullptr && normal) {
        const Smoothing<T, Index> smoothed{view.copy(job.weight)};  // formed again, as above
        sweep([&](Index j, auto& held) {
            constexpr int kCount = kExtent<decltype(held)>;
            Real y[kCount], w[kCount];
#pragma unroll
            for (int k = 0; k < kCount; ++k) y[k] = Real(0);
            if (smooth) smoothed.weights(j, w);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                if (t >= terms) break;
                const ClosedTerm<Real> d(job, at_row, column[t], sigma[t] * own[t], floor[0]);
                Real g[kCount];
#pragma unroll
                for (int k = 0; k < kCount; ++k) {
                    const Real a = sigma[t] * (closed ? held[k] + d(held[k], j + k) : held[k]);
                    g[k] = told[t][0] * exp_for<T>(a - told[t][1]);
                    if (smooth) g[k] -= told[t][2] * w[k];
                }
                adjust.chain(j, g);
                if (column[t] >= j && column[t] < j + kCount) {
#pragma unroll
                    for (int k = 0; k < kCount; ++k)
                        if (j + k == column[t]) g[k] = told[t][3];
                }
#pragma unroll
                for (int k = 0; k < kCount; ++k) y[k] += g[k];
            }
            view.store(j, y);
        });
    } else if (ce.grad != nullptr) {
        view.fill(member, members, labels.state == RowState::bad ? Real(NAN) : Real(0));
    }
    group.leave();
    collect_losses(job, group, ticket);
}

template <class T, Tables kTables>
__global__ void __maxnreg__(Traits<T>::kRegisters) adjusted_ce_rows(const RowsJob job) {
    adjusted_ce_held<T, kTables>(job);
}
template <class T>
__global__ void __launch_bounds__(kMaxBlock) adjusted_ce_rows_terms(const RowsJob job) {
    adjusted_ce_swept<T, true>(job);
}
// Rows of any length.
template <class T>
__global__ void __launch_bounds__(kMemoryBlock, 2) adjusted_ce_rows_memory(const RowsJob job) {
    adjusted_ce_swept<T, false>(job);
}

}  // namespace cuda
}  // namespace ltk
