// The loss in two phases on a part of the classes of every row: cpu/row_statistics.h has the contract, and
// cpu/row_statistics.inl is the twin. The logits are read once in each phase.
#pragma once
#include "../cpu/row_statistics.h"
#include "terms.cuh"

namespace ltk {
namespace cuda {

struct PartJob {
    ClassPart part;
    Plan plan;
    bool smooth;          // statistics: also the smoothing sum
    double* out;          // statistics (rows, kStatistics)
    const double* terms;  // gradient (rows, kGradientTerms)
    void* grad;           // (rows, classes), may be the logits
    int64_t grad_stride;
};

constexpr int kPartRegisters = 80;  // three blocks of 256 threads an SM

// Entries of a table at any distance to a 16-byte boundary, for a vector's columns and for one column. One vector more
// is read and shifted: single reads would cost more first-level cache cycles than a row of 16-bit logits has.
template <class Real, int kN>
__device__ __forceinline__ void read_shifted(const Real* values, int64_t classes, int j, Real (&t)[kN]) {
    constexpr int kWidth = 16 / static_cast<int>(sizeof(Real));
    const Real* at = values + j;
    const int shift = static_cast<int>((reinterpret_cast<uintptr_t>(at) & 15u) / sizeof(Real));
    if (kN == 1 || (shift != 0 && (j < shift || j + kN + kWidth > classes))) {
#pragma unroll
        for (int k = 0; k < kN; ++k) t[k] = __ldg(at + k);
        return;
    }
    at -= shift;
    Real line[2][kWidth];
    unpack(load16_table(at), line[0], Real());
#pragma unroll
    for (int q = 0; q < kN / kWidth; ++q) {
        if (q + 1 < kN / kWidth || shift != 0) unpack(load16_table(at + (q + 1) * kWidth), line[1], Real());
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            t[q * kWidth + k] = line[0][k];
#pragma unroll
            for (int s = 1; s < kWidth; ++s)
                if (shift == s) t[q * kWidth + k] = line[(k + s) / kWidth][(k + s) % kWidth];
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) line[0][k] = line[1][k];
    }
}

// A thread's share of one row.
template <class T>
struct PartRow {
    using Real = real_t<T>;
    static constexpr int kFlight = sizeof(T) == 4 ? 4 : sizeof(T) == 2 ? 3 : 1;

    __device__ __forceinline__ PartRow(const PartJob& job, const Group<Real>& group)
        : part(job.part),
          inside(group.row() < part.rows),
          row(inside ? group.row() : 0),
          view(static_cast<const T*>(part.logits) + row * part.logits_stride,
               job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + row * job.grad_stride, part.classes, inside),
          member(group.member()),
          members(group.members()) {
        const int64_t label = part.target[row];
        ignored = label == kIgnoredRow;
        column = label >= 0 && label < part.classes ? static_cast<int>(label) : kNowhere;
        sigma = static_cast<Real>(part.row_scale[row]);
    }

    template <class Array>
    __device__ __forceinline__ bool read(const void* table, int j, Array& t) const {
        if (table != nullptr) read_shifted(static_cast<const Real*>(table), part.classes, j, t);
        return table != nullptr;
    }
    // f(first column, sigma (scale z + shift)).
    template <class F>
    __device__ __forceinline__ void sweep(F f) const {
        view.template stream<kFlight>(member, members, [&](int j, auto& a) {
            constexpr int kN = kExtent<decltype(a)>;
            Real t[kN];
            if (read(part.scale, j, t))
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] *= t[k];
            if (read(part.shift, j, t))
#pragma unroll
                for (int k = 0; k < kN; ++k) a[k] += t[k];
#pragma unroll
            for (int k = 0; k < kN; ++k) a[k] *= sigma;
            f(j, a);
        });
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
    Group<Real> group(job.plan);
    const PartRow<T> mine(job, group);
    const ClassPart& part = job.part;

    Real found[4] = {-Real(INFINITY), Real(0), Real(0), Real(0)};  // maximum, sum; smoothing sum
    mine.sweep([&](int j, auto& a) {
        constexpr int kN = kExtent<decltype(a)>;
        Real w[kN];
        const bool weighted = job.smooth && mine.read(part.weight, j, w);
        Real highest = found[0];
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            if (j + k == mine.column) {
                a[k] = -Real(INFINITY);
                continue;
            }
            if (job.smooth) found[2] += weighted ? w[k] * a[k] : a[k];
            highest = larger(highest, a[k]);
        }
        const Real reference = origin_of(highest);
        if (found[1] != Real(0)) found[1] *= exp_for<T>(found[0] - reference);
#pragma unroll
        for (int k = 0; k < kN; ++k) a[k] = exp_for<T>(a[k] - reference);
        found[1] += total_of(a);
        found[0] = highest;
    });
    group.template reduce<MaxSum<T>>(found);  // without weights the third is a plain sum
    if (!mine.inside || mine.member != 0) return;
    double label_a = -static_cast<double>(INFINITY);
    if (mine.column >= 0) {
        label_a = get_element(mine.view.z + mine.column);
        if (part.scale != nullptr) label_a *= static_cast<double>(static_cast<const Real*>(part.scale)[mine.column]);
        if (part.shift != nullptr) label_a += static_cast<double>(static_cast<const Real*>(part.shift)[mine.column]);
        label_a *= part.row_scale[mine.row];
    }
    double* const out = job.out + mine.row * kStatistics;
    const double values[] = {static_cast<double>(found[0]), static_cast<double>(found[1]), label_a,
                             static_cast<double>(found[2])};
    for (int k = 0; k < kStatistics; ++k) out[k] = mine.ignored ? 0.0 : values[k];
}

template <class T>
__global__ void __maxnreg__(kPartRegisters) part_gradient(const PartJob job) {
    using Real = real_t<T>;
    const Group<Real> group(job.plan);
    const PartRow<T> mine(job, group);
    const ClassPart& part = job.part;
    const double* const terms = job.terms + mine.row * kGradientTerms;
    const Real reference = terms[0] == -static_cast<double>(INFINITY) ? Real(0) : static_cast<Real>(terms[0]);
    const Real factor = static_cast<Real>(terms[1]), soft = static_cast<Real>(terms[2]);
    const Real own = static_cast<Real>(terms[3]);
    mine.sweep([&](int j, auto& a) {
        constexpr int kN = kExtent<decltype(a)>;
        Real t[kN];
#pragma unroll
        for (int k = 0; k < kN; ++k) a[k] = factor * exp_for<T>(a[k] - reference);
        if (soft != Real(0)) {
            const bool weighted = mine.read(part.weight, j, t);
#pragma unroll
            for (int k = 0; k < kN; ++k) a[k] += weighted ? soft * t[k] : soft;
        }
        if (mine.read(part.scale, j, t))
#pragma unroll
            for (int k = 0; k < kN; ++k) a[k] *= t[k];
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
