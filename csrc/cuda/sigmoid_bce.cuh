// Binary cross-entropy over the classes with one positive, the label: cpu/sigmoid_bce.inl is the twin. Nothing waits
// for a sum, so every vector is read, used and written at once.
#pragma once
#include "terms.cuh"

namespace ltk {
namespace cuda {

// phi(softplus(x)) and its derivative in x.
template <class Real>
__device__ __forceinline__ void focal_softplus(Real gamma, Real x, Real* value, Real* slope) {
    const Real t = exp_real(-abs_real(x));
    const Real log1p_t = log1p_real(t);
    const Real inverse = Real(1) / (Real(1) + t);
    const Real l = larger(x, Real(0)) + log1p_t, p = (x < Real(0) ? t : Real(1)) * inverse;
    *value = l;
    *slope = p;
    if (gamma == Real(0)) return;
    const Real q = (x < Real(0) ? Real(1) : t) * inverse;  // 1 - p without cancellation
    const Real power = exp_real(-gamma * (larger(-x, Real(0)) + log1p_t));
    *value = power * l;
    *slope = power * (p + gamma * q * l);
}

template <class T>
__global__ void __launch_bounds__(kMemoryBlock) sigmoid_bce_rows(const RowsJob job) {
    using Real = real_t<T>;
    using Index = int64_t;
    constexpr int kFlight = sizeof(T) == 4 ? 4 : 2;  // loads in flight a thread: 32 to 48 KiB an SM
    const AdjustedCe& ce = job.ce;
    Group<Real> group(job.plan);
    const int64_t row = group.row();
    const bool inside = row < ce.rows;
    const int64_t at_row = inside ? row : 0;
    const Row<T, Index> view = row_of<T, Index>(ce, at_row, inside);
    const Labels<Real> labels = labels_of<Real>(job, at_row, inside);
    const bool normal = labels.state == RowState::normal;
    const Real gamma = static_cast<Real>(ce.focal_gamma);
    const Real* const negative = view.copy(job.shift);
    const Real upstream = upstream_of<Real>(job, at_row);

    const int terms = ce.target_b == nullptr ? 1 : 2;
    Index label[2] = {kNowhere, kNowhere};
    Real hard[2] = {Real(0), Real(0)}, own_loss[2] = {Real(0), Real(0)}, own_slope[2] = {Real(0), Real(0)};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= terms || !normal) break;
        label[t] = labels.label[t];
        hard[t] = labels.share[t] * at(ce.weight, labels.label[t], Real(1));
        focal_softplus(gamma, -view.element(label[t]), &own_loss[t], &own_slope[t]);
    }
    group.fence();  // the labels' logits have been read

    Real others[2] = {Real(0), Real(0)};
    const Index member = group.member(), members = group.members();
    if (normal) {
        view.template stream<kFlight>(member, members, [&](Index j, auto& z) {
            constexpr int kN = kExtent<decltype(z)>;
            Real y[kN], factor[kN];
#pragma unroll
            for (int k = 0; k < kN; ++k) factor[k] = Real(1);
            if (negative != nullptr) Row<T, Index>::read(negative, j, factor);
#pragma unroll
            for (int k = 0; k < kN; ++k) {
                y[k] = Real(0);
                Real value, slope;
                focal_softplus(gamma, z[k], &value, &slope);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    const bool own = j + k == label[t];
                    others[t] += own ? Real(0) : factor[k] * value;
                    if (t < terms) y[k] += hard[t] * upstream * (own ? -own_slope[t] : factor[k] * slope);
                }
            }
            if (ce.grad != nullptr) view.store(j, y);
        });
    } else if (ce.grad != nullptr) {
        view.fill(member, members, labels.state == RowState::bad ? Real(NAN) : Real(0));
    }
    group.template reduce<Sum>(others);
    Real loss = hard[0] * (own_loss[0] + others[0]);
    if (terms == 2) loss += hard[1] * (own_loss[1] + others[1]);
    if (labels.state == RowState::ignored) loss = Real(0);
    if (labels.state == RowState::bad) loss = Real(NAN);
    collect_losses(job, group, announce_loss(job, group, loss));
}

}  // namespace cuda
}  // namespace ltk
