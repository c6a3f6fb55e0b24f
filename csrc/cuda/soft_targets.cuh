// A row over the classes, or a teacher's logits, in place of a label: cpu/soft_targets.h has the contract. Both rows
// are read three times, the second and third out of a cache: maxima, sums, gradient. Row weights, `factor` and
// `grad_scale` are in `row_coef` and in what the caller makes of the row losses. What is not finite in a target makes
// its row NaN.
#pragma once
#include "../cpu/soft_targets.h"
#include "row_logsumexp.cuh"

namespace ltk {
namespace cuda {

struct SoftJob {
    SoftTargets soft;  // row_coef: (rows,) or null
    Plan plan;
};

// kN consecutive elements, as vectors of 16 bytes where they begin at one: rows beside the logits usually do where the
// logits' vectors do.
template <class Q, class Real, int kN>
__device__ __forceinline__ void read_beside(const Q* at, Real (&t)[kN]) {
    constexpr int kWidth = kVec<Q>;
    if (kN % kWidth == 0 && (reinterpret_cast<uintptr_t>(at) & 15u) == 0) {
#pragma unroll
        for (int q = 0; q < kN / kWidth; ++q) {
            Real part[kWidth];
            unpack(load16_table(at + q * kWidth), part, Q());
#pragma unroll
            for (int k = 0; k < kWidth; ++k) t[q * kWidth + k] = part[k];
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) t[k] = static_cast<Real>(get_element(at + k));
}
template <class Real, int kN>
__device__ __forceinline__ void put_beside(Real* at, const Real (&y)[kN]) {
    constexpr int kWidth = kVec<Real>;
    if (kN % kWidth == 0 && (reinterpret_cast<uintptr_t>(at) & 15u) == 0) {
#pragma unroll
        for (int q = 0; q < kN / kWidth; ++q) {
            Real part[kWidth];
#pragma unroll
            for (int k = 0; k < kWidth; ++k) part[k] = y[q * kWidth + k];
            store16(at + q * kWidth, packed(part, Real()));
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) at[k] = y[k];
}

// The target is a teacher's logits in the student's type, or real.
template <class T, bool kTeacher>
__global__ void __maxnreg__(kPartRegisters) soft_rows(const SoftJob job) {
    using Real = real_t<T>;
    using Target = std::conditional_t<kTeacher, T, Real>;
    constexpr int kFlight = sizeof(T) == 4 ? 2 : 1;
    const SoftTargets& soft = job.soft;
    Group<Real> group(job.plan);
    const bool inside = group.row() < soft.rows;
    const int64_t row = inside ? group.row() : 0;
    const Row<T, int> view(static_cast<const T*>(soft.logits) + row * soft.logits_stride, nullptr, soft.classes,
                           inside);
    const Target* const target = static_cast<const Target*>(soft.target) + row * soft.target_stride;
    const int member = group.member(), members = group.members();
    const Real sigma = static_cast<Real>(soft.sigma);
    const auto table = [&](const void* values, int j, auto& t) {
        if (values != nullptr) read_shifted(static_cast<const Real*>(values), soft.classes, j, t);
        return values != nullptr;
    };
    // f(first column, adjusted logits, shares or a teacher's logits over the temperature).
    const auto sweep = [&](auto f) {
        view.template stream<kFlight>(member, members, [&](int j, auto& a) {
            constexpr int kN = kExtent<decltype(a)>;
            Real t[kN], q[kN];
            if (table(soft.scale, j, t))
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] *= t[k];
            if (table(soft.shift, j, t))
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] += t[k];
            read_beside(target + j, q);
#pragma unroll
            for (int k = 0; k < kN; ++k) {
                a[k] *= sigma;
                q[k] = kTeacher ? q[k] * sigma : static_cast<Real>(soft.keep) * q[k] + static_cast<Real>(soft.floor);
            }
            if (!kTeacher && table(soft.weight, j, t))
#pragma unroll
                for (int k = 0; k < kN; ++k) q[k] *= t[k];
            f(j, a, q);
        });
    };

    Real top[2] = {-Real(INFINITY), -Real(INFINITY)};  // of the logits, of the teacher's
    sweep([&](int, const auto& a, const auto& q) {
#pragma unroll
        for (int k = 0; k < kExtent<decltype(a)>; ++k) {
            top[0] = larger(top[0], a[k]);
            if (kTeacher) top[1] = larger(top[1], q[k]);
        }
    });
    group.template reduce<Max>(top);
    group.answer(top);
    const Real origin[2] = {origin_of(top[0]), origin_of(top[1])};
    // A share relative to the teacher's maximum, or the share. What has none adds nothing, whatever its logit.
    const auto share = [&](Real q) { return kTeacher ? exp_for<T>(q - origin[1]) : q; };
    Real sum[4] = {};  // of exponentials, of shares, of shares times logits, times the teacher's logits
    sweep([&](int, const auto& a, const auto& q) {
#pragma unroll
        for (int k = 0; k < kExtent<decltype(a)>; ++k) {
            const Real t = share(q[k]);
            sum[0] += exp_for<T>(a[k] - origin[0]);
            sum[1] += t;
            if (t == Real(0)) continue;
            sum[2] += t * (a[k] - origin[0]);
            if (kTeacher) sum[3] += t * (q[k] - origin[1]);
        }
    });
    group.template reduce<Sum>(sum);
    Real told[2] = {};  // factors of the exponentials and of the shares
    if (group.leading()) {
        const double others = sum[0], total = sum[1];
        const double log_others = top[0] == -Real(INFINITY) ? static_cast<double>(NAN) : log(others);
        double loss = total * log_others - static_cast<double>(sum[2]);
        if (kTeacher)
            loss = (static_cast<double>(sum[3]) - static_cast<double>(sum[2])) / total - log(total) + log_others;
        if (group.here == 0 && inside) static_cast<Real*>(soft.row_loss)[row] = static_cast<Real>(loss);
        const Real outer = sigma * (soft.row_coef == nullptr ? Real(1) : static_cast<const Real*>(soft.row_coef)[row]);
        told[0] = top[0] == -Real(INFINITY) ? Real(NAN) : outer * (kTeacher ? Real(1) : sum[1]) / sum[0];
        told[1] = kTeacher ? outer / sum[1] : outer;
    }
    if (soft.grad == nullptr) return;
    group.answer(told);
    Real* const grad = static_cast<Real*>(soft.grad) + row * soft.classes;
    sweep([&](int j, auto& a, const auto& q) {
        constexpr int kN = kExtent<decltype(a)>;
#pragma unroll
        for (int k = 0; k < kN; ++k) a[k] = told[0] * exp_for<T>(a[k] - origin[0]) - told[1] * share(q[k]);
        Real t[kN];
        if (table(soft.scale, j, t))
#pragma unroll
            for (int k = 0; k < kN; ++k) a[k] *= t[k];
        put_beside(grad + j, a);
    });
}

}  // namespace cuda
}  // namespace ltk
