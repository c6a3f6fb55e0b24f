// Binary cross-entropy over the classes with one positive, the label: cpu/sigmoid_bce.inl is the twin. Nothing waits
// for a sum, so every vector is read, used and written at once.
#pragma once
#include "terms.cuh"

namespace ltk {
namespace cuda {

// phi(softplus(x)) and its derivative in x, beside logits of type T.
template <class T, class Real>
__device__ __forceinline__ void focal_softplus(Real gamma, Real x, Real* value, Real* slope) {
    const Real t = exp_for<T>(-std::fabs(x));
    const Real log1p_t = log1p_unit(t);
    const Real inverse = inverse_of(Real(1) + t);
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

    Index label[2] = {kNowhere, kNowhere};
    Real hard[2] = {Real(0), Real(0)};
    if (normal) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            label[t] = labels.label[t];
            hard[t] = labels.share[t] * at(ce.weight, label[t], Real(1));
        }
        if (ce.target_b == nullptr || label[1] == label[0]) {
            hard[0] += hard[1];
            hard[1] = Real(0);
            label[1] = kNowhere;
        }
    }
    const Real every = hard[0] + hard[1], scale = every * upstream;
    Real found[2] = {Real(0), Real(0)},
         own[2] = {Real(0), Real(0)};  // found: sum over the negatives; what the labels add
    bool owns[2] = {false, false};     // the label's column is this thread's
    const Index member = group.member(), members = group.members();
    if (normal) {
        view.template stream<kFlight>(member, members, [&](Index j, auto& z) {
            constexpr int kN = kExtent<decltype(z)>;
            Real y[kN];
            // A label is no negative of its own term: minus infinity adds nothing, and its gradient is written after.
#pragma unroll
            for (int t = 0; t < 2; ++t)
                if (label[t] >= j && label[t] < j + kN) {
                    owns[t] = true;
#pragma unroll
                    for (int k = 0; k < kN; ++k)
                        if (j + k == label[t]) {
                            own[t] = z[k];
                            z[k] = -Real(INFINITY);
                        }
                }
#pragma unroll
            for (int k = 0; k < kN; ++k) y[k] = Real(1);
            if (negative != nullptr) Row<T, Index>::read(negative, j, y);
#pragma unroll
            for (int k = 0; k < kN; ++k) {
                Real value, slope;
                focal_softplus<T>(gamma, z[k], &value, &slope);
                found[0] += y[k] * value;
                y[k] *= scale * slope;
            }
            if (ce.grad != nullptr) view.template store<true>(j, y);
        });
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            if (!owns[t]) continue;
            Real value[2], slope[2];  // as the positive of its term, as a negative of the other
            focal_softplus<T>(gamma, -own[t], &value[0], &slope[0]);
            focal_softplus<T>(gamma, own[t], &value[1], &slope[1]);
            const Real other = hard[1 - t] == Real(0) ? Real(0) : hard[1 - t] * at(job.shift.source, label[t], Real(1));
            found[1] += hard[t] * value[0];
            if (other != Real(0)) found[1] += other * value[1];
            const Real g = -hard[t] * slope[0] + (other != Real(0) ? other * slope[1] : Real(0));
            if (ce.grad != nullptr) put_element(view.grad + label[t], g * upstream);
        }
    } else if (ce.grad != nullptr) {
        view.fill(member, members, labels.state == RowState::bad ? Real(NAN) : Real(0));
    }
    group.template reduce<Sum>(found);
    Real loss = every * found[0] + found[1];
    if (labels.state == RowState::ignored) loss = Real(0);
    if (labels.state == RowState::bad) loss = Real(NAN);
    collect_losses(job, group, announce_loss(job, group, loss));
}

}  // namespace cuda
}  // namespace ltk
