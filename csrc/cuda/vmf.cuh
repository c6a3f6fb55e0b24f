// ProCo's von Mises-Fisher form: cpu/closed_forms.inl says what it is, and why nothing large cancels. A look at a
// cosine costs hundreds of instructions, three logarithms and seven divisions among them, so that reading a row twice
// does not count: no registers hold it, and the logits are computed again for the gradient.
#pragma once
#include "terms.cuh"

namespace ltk {
namespace cuda {

template <class Real>
struct VonMisesFisher {
    __device__ __forceinline__ explicit VonMisesFisher(const AdjustedCe& ce)
        : kappa(static_cast<const Real*>(ce.closed.table)), root(kappa + ce.classes), log_series(root + ce.classes) {
        const double order = ce.closed.options[0] / 2.0 - 1.0;
        nu = static_cast<Real>(order);
        inverse = static_cast<Real>(1.0 / order);
        per_kappa = static_cast<Real>(1.0 / (ce.closed.options[1] * order));
    }

    // The logit of class j's cosine, and its slope in that.
    __device__ __forceinline__ Real operator()(Real cosine, int64_t j, Real* slope) const {
        constexpr auto of = [](double x) { return static_cast<Real>(x); };
        const Real k = __ldg(kappa + j), s = __ldg(root + j), one = Real(1);
        const Real d2 = per_kappa * (per_kappa + Real(2) * inverse * k * cosine);
        const Real st = std::sqrt(larger(s * s + d2, one));  // not NaN where d2 is, but ds is
        const Real ds = d2 / (st + s);
        const Real t = one / st, x = t * t;
        // Debye's S - 1, and its derivative in t
        const Real u1 = of(3.0 / 24) - of(5.0 / 24) * x;
        const Real u2 = of(81.0 / 1152) + x * (of(-462.0 / 1152) + x * of(385.0 / 1152));
        const Real u3 = of(30375.0 / 414720) +
                        x * (of(-369603.0 / 414720) + x * (of(765765.0 / 414720) - x * of(425425.0 / 414720)));
        const Real v = t * inverse * (u1 + t * inverse * (u2 + t * inverse * u3));
        const Real du1 = of(3.0 / 24) - of(15.0 / 24) * x;
        const Real du2 = of(162.0 / 1152) + x * (of(-1848.0 / 1152) + x * of(2310.0 / 1152));
        const Real du3 = of(91125.0 / 414720) +
                         x * (of(-1848015.0 / 414720) + x * (of(5360355.0 / 414720) - x * of(3828825.0 / 414720)));
        const Real dv = inverse * (du1 + t * inverse * (du2 + t * inverse * du3));
        *slope = per_kappa * k * (one / (one + st) - x * inverse * (of(0.5) + t * dv / (one + v)));
        return nu * (ds - log1p_real(ds / (one + s))) - of(0.5) * log1p_real(ds / s) +
               (log1p_real(v) - __ldg(log_series + j));
    }

    const Real *const kappa, *const root, *const log_series;
    Real nu, inverse, per_kappa;
};

template <class T>
__global__ void __launch_bounds__(kMemoryBlock, 2) vmf_rows(const RowsJob job) {
    using Real = real_t<T>;
    using Index = int64_t;
    constexpr int kFlight = sizeof(T) == 4 ? 2 : 1;
    const AdjustedCe& ce = job.ce;
    Group<Real> group(job.plan);
    const int64_t row = group.row();
    const bool inside = row < ce.rows;
    const int64_t at_row = inside ? row : 0;
    const Row<T, Index> view = row_of<T, Index>(ce, at_row, inside);
    const Index member = group.member(), members = group.members();
    const Labels<Real> labels = labels_of<Real>(job, at_row, inside);
    const bool normal = labels.state == RowState::normal, smooth = smooths(ce);
    const Index label = normal ? labels.label[0] : kNowhere;
    const VonMisesFisher<Real> logit(ce);
    const Real* const shift = view.copy(job.shift);
    const Smoothing<T, Index> smoothing{view.copy(job.weight)};
    // f(first column, adjusted logits, their slopes) for each of the thread's vectors and ends.
    const auto sweep = [&](auto f) {
        view.template stream<kFlight>(member, members, [&](Index j, auto& x) {
            constexpr int kN = kExtent<decltype(x)>;
            Real slope[kN], t[kN];
#pragma unroll
            for (int k = 0; k < kN; ++k) x[k] = logit(x[k], j + k, &slope[k]);
            if (shift != nullptr) {
                Row<T, Index>::read(shift, j, t);
#pragma unroll
                for (int k = 0; k < kN; ++k) x[k] += t[k];
            }
            f(j, x, slope);
        });
    };

    wait_for_first_launch();
    Real found[4] = {-Real(INFINITY), Real(0), Real(0), Real(0)};
    if (normal)
        sweep([&](Index j, auto& a, const auto&) {
            const Real rise = accumulate<T>(a, j, label, found[0], found[1]);
            if (!smooth) return;
            found[2] += rise * found[3];
            smoothing.add(j, label, a, found[2], found[3]);
        });
    // Before the threads meet: another's gradient may replace the cosine.
    Term<Real, Index> term{label, 0.0, Real(1), Real(1), Real(1), Real(1)};
    if (normal && group.leading()) {
        term.weight = at(ce.weight, label, Real(1));
        term.target = static_cast<double>(logit(view.element(label), label, &term.slope)) +
                      static_cast<double>(at(ce.shift, label, Real(0)));
    }
    group.template reduce<MaxSum<T>>(found);
    Real told[4] = {}, loss = Real(0);
    if (group.leading()) {
        const Real epsilon = smoothing_of<Real>(ce, labels.label[0]);
        const Outcome<Real> out =
            finish(ce, term, epsilon, found[0], found[1], found[2], found[3], upstream_of<Real>(job, at_row));
        loss = labels.state == RowState::ignored ? Real(0) : labels.state == RowState::bad ? Real(NAN) : out.loss;
        out.tell(told, found[0]);
    }
    group.answer(told);
    const unsigned ticket = announce_loss(job, group, loss);

    if (ce.grad != nullptr && normal) {
        sweep([&](Index j, auto& a, const auto& slope) {
            constexpr int kN = kExtent<decltype(a)>;
            Real w[kN];
            if (smooth) smoothing.weights(j, w);
#pragma unroll
            for (int k = 0; k < kN; ++k) {
                a[k] = told[0] * exp_for<T>(a[k] - told[1]);
                if (smooth) a[k] -= told[2] * w[k];
                a[k] = j + k == label ? told[3] : a[k] * slope[k];
            }
            view.store(j, a);
        });
    } else if (ce.grad != nullptr) {
        view.fill(member, members, labels.state == RowState::bad ? Real(NAN) : Real(0));
    }
    collect_losses(job, group, ticket);
}

}  // namespace cuda
}  // namespace ltk
