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
    constexpr int kN = kVec<T>;
    const AdjustedCe& ce = job.ce;
    Group<Real> group(job.plan.threads, 1);
    const int64_t row = group.row();
    const bool inside = row < ce.rows;
    const int64_t at_row = inside ? row : 0;
    const Row<T, Index> view(static_cast<const T*>(ce.logits) + at_row * ce.logits_stride,
                             ce.grad == nullptr ? nullptr : static_cast<T*>(ce.grad) + at_row * ce.grad_stride,
                             ce.classes, inside);
    const Labels<Real> labels = labels_of<Real>(job, at_row, inside);
    const bool normal = labels.state == RowState::normal;
    const Real gamma = static_cast<Real>(ce.focal_gamma);
    const Real* const negative = static_cast<const Real*>(ce.closed.table);
    Real upstream = Real(1) / static_cast<Real>(denominator_of(job));
    if (ce.row_coef != nullptr)
        upstream *= static_cast<const Real*>(ce.row_coef)[job.row_coef_stride == 0 ? 0 : at_row];

    const int terms = ce.target_b == nullptr ? 1 : 2;
    Index label[2] = {kNowhere, kNowhere};
    Real hard[2] = {Real(0), Real(0)}, own_loss[2] = {Real(0), Real(0)}, own_slope[2] = {Real(0), Real(0)};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= terms || !normal) break;
        label[t] = labels.label[t];
        hard[t] = labels.share[t] * at(ce.weight, labels.label[t], Real(1));
        focal_softplus(gamma, static_cast<Real>(-get_element(view.z + label[t])), &own_loss[t], &own_slope[t]);
    }
    group.fence();  // the labels' logits have been read

    Real others[2] = {Real(0), Real(0)};
    for (Index v = group.member(); v < view.vectors; v += group.members()) {
        const Index j = view.first(v);
        Real z[kN], y[kN], factor[kN];
        unpack(view.fetch(v), z, T());
#pragma unroll
        for (int k = 0; k < kN; ++k) factor[k] = Real(1);
        if (negative != nullptr) view.table(negative, j, [&](int k, Real t) { factor[k] = t; });
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            y[k] = labels.state == RowState::bad ? Real(NAN) : Real(0);
            if (!normal || !view.valid(j + k)) continue;
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
    }
    group.sum(others[0], others[1]);
    Real loss = hard[0] * (own_loss[0] + others[0]);
    if (terms == 2) loss += hard[1] * (own_loss[1] + others[1]);
    if (labels.state == RowState::ignored) loss = Real(0);
    if (labels.state == RowState::bad) loss = Real(NAN);
    write_loss(job, group, loss);
}

}  // namespace cuda
}  // namespace ltk
