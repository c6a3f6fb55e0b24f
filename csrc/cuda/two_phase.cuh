// The loss in two phases on a part of the classes of every row: cpu/row_statistics.h has the contract, and
// cpu/row_statistics.inl is the twin. The logits are read once in each phase.
#pragma once
#include "../cpu/row_statistics.h"
#include "job.h"
#include "reduce.cuh"
#include "row.cuh"

namespace ltk {
namespace cuda {

struct PartJob {
    ClassPart part;
    int threads;          // of one row
    bool smooth;          // statistics: also the smoothing sum
    double* out;          // statistics (rows, kStatistics)
    const double* terms;  // gradient (rows, kGradientTerms)
    void* grad;           // (rows, classes), may be the logits
    int64_t grad_stride;
};

constexpr int kPartRegisters = 80;  // three blocks of 256 threads an SM

// A thread's share of one row.
template <class T>
struct PartRow {
    using Real = real_t<T>;
    static constexpr int kN = kVec<T>, kFlight = sizeof(T) == 8 ? 1 : 2;

    __device__ __forceinline__ PartRow(const PartJob& job, const Group<double>& group)
        : part(job.part),
          inside(group.row() < part.rows),
          row(inside ? group.row() : 0),
          view(static_cast<const T*>(part.logits) + row * part.logits_stride,
               job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + row * job.grad_stride, part.classes, inside),
          member(group.member()),
          members(group.members()) {
        const int64_t label = part.target[row];
        ignored = label == kIgnoredRow;
        column = label >= 0 && label < part.classes ? static_cast<int>(label) : -kN;  // -kN: in no vector
        sigma = static_cast<Real>(part.row_scale[row]);
    }

    // f(first column, sigma (scale z + shift)); columns outside the row hold anything.
    template <class F>
    __device__ __forceinline__ void sweep(F f) const {
        const Real* const scale = static_cast<const Real*>(part.scale);
        const Real* const shift = static_cast<const Real*>(part.shift);
        for (int base = member; base < view.vectors; base += kFlight * members) {
            Raw raw[kFlight];
#pragma unroll
            for (int k = 0; k < kFlight; ++k)
                if (base + k * members < view.vectors) raw[k] = view.fetch(base + k * members);
#pragma unroll
            for (int k = 0; k < kFlight; ++k) {
                if (base + k * members >= view.vectors) break;
                const int j = view.first(base + k * members);
                Real a[kN];
                unpack(raw[k], a, T());
                if (scale != nullptr) view.table(scale, j, [&](int i, Real t) { a[i] *= t; });
                if (shift != nullptr) view.table(shift, j, [&](int i, Real t) { a[i] += t; });
#pragma unroll
                for (int i = 0; i < kN; ++i) a[i] *= sigma;
                f(j, a);
            }
        }
    }

    const ClassPart& part;
    const bool inside;
    const int64_t row;
    const Row<T, int> view;
    const int member, members;
    int column;
    Real sigma;
    bool ignored;
};

template <class T>
__global__ void __maxnreg__(kPartRegisters) part_statistics(const PartJob job) {
    using Real = real_t<T>;
    constexpr int kN = kVec<T>;
    Group<double> group(job.threads, 1);
    const PartRow<T> mine(job, group);
    const ClassPart& part = job.part;
    const Real* const weight = static_cast<const Real*>(part.weight);

    Real top = -Real(INFINITY), sum = Real(0), weighted = Real(0);
    mine.sweep([&](int j, Real(&a)[kN]) {
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            const bool other = mine.view.valid(j + k) && j + k != mine.column;
            if (other && job.smooth) weighted += weight == nullptr ? a[k] : __ldg(weight + j + k) * a[k];
            if (!other) a[k] = -Real(INFINITY);
        }
        Real highest = top;
#pragma unroll
        for (int k = 0; k < kN; ++k) highest = larger(highest, a[k]);
        const Real reference = highest == -Real(INFINITY) ? Real(0) : highest;
        if (sum != Real(0)) sum *= exp_real(top - reference);
#pragma unroll
        for (int k = 0; k < kN; ++k) sum += exp_real(a[k] - reference);
        top = highest;
    });
    double whole_top = static_cast<double>(top), whole_sum = static_cast<double>(sum);
    group.max_sum(whole_top, whole_sum);
    double smooth_a = static_cast<double>(weighted), nothing = 0.0;
    if (job.smooth) group.sum(smooth_a, nothing);
    if (!mine.inside || mine.member != 0) return;
    double label_a = -static_cast<double>(INFINITY);
    if (mine.column >= 0) {
        label_a = get_element(mine.view.z + mine.column);
        if (part.scale != nullptr) label_a *= static_cast<double>(static_cast<const Real*>(part.scale)[mine.column]);
        if (part.shift != nullptr) label_a += static_cast<double>(static_cast<const Real*>(part.shift)[mine.column]);
        label_a *= part.row_scale[mine.row];
    }
    double* const out = job.out + mine.row * kStatistics;
    out[0] = mine.ignored ? 0.0 : whole_top;
    out[1] = mine.ignored ? 0.0 : whole_sum;
    out[2] = mine.ignored ? 0.0 : label_a;
    out[3] = mine.ignored ? 0.0 : smooth_a;
}

template <class T>
__global__ void __maxnreg__(kPartRegisters) part_gradient(const PartJob job) {
    using Real = real_t<T>;
    constexpr int kN = kVec<T>;
    const Group<double> group(job.threads, 1);
    const PartRow<T> mine(job, group);
    const ClassPart& part = job.part;
    const Real* const weight = static_cast<const Real*>(part.weight);
    const Real* const scale = static_cast<const Real*>(part.scale);
    const double* const terms = job.terms + mine.row * kGradientTerms;
    const Real reference = terms[0] == -static_cast<double>(INFINITY) ? Real(0) : static_cast<Real>(terms[0]);
    const Real factor = static_cast<Real>(terms[1]), soft = static_cast<Real>(terms[2]);
    const Real own = static_cast<Real>(terms[3]);
    mine.sweep([&](int j, Real(&a)[kN]) {
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            a[k] = factor * exp_real(a[k] - reference);
            if (soft != Real(0) && mine.view.valid(j + k))
                a[k] += weight == nullptr ? soft : soft * __ldg(weight + j + k);
        }
        if (scale != nullptr) mine.view.table(scale, j, [&](int k, Real t) { a[k] *= t; });
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            if (j + k == mine.column) a[k] = own;
            if (mine.ignored) a[k] = Real(0);
        }
        mine.view.store(j, a);
    });
}

}  // namespace cuda
}  // namespace ltk
