// Contrast between its matrix products: cpu/row_logsumexp.h has the contract, and cpu/row_logsumexp.inl is the twin. A
// row of products is read two or three times, out of the second-level cache: maxima, sums, and the coefficients in its
// place. A row whose reference is +inf has none; the CPU's has one for all rows or for none.
#pragma once
#include "../cpu/row_logsumexp.h"
#include "two_phase.cuh"

namespace ltk {
namespace cuda {

struct ContrastJob {
    RowLogsumexp rows;
    Plan plan;
};

struct Max {
    template <class Real>
    static __device__ __forceinline__ Real neutral(int) {
        return -Real(INFINITY);
    }
    template <class Real, int kN>
    static __device__ __forceinline__ void combine(Real (&x)[kN], int width) {
        for (int o = width / 2; o > 0; o /= 2)
#pragma unroll
            for (int i = 0; i < kN; ++i) x[i] = larger(x[i], __shfl_xor_sync(kAllLanes, x[i], o));
    }
};

// A thread's share of one row.
template <class T>
struct ContrastRow {
    static constexpr int kFlight = sizeof(T) == 4 ? 4 : 1;

    __device__ __forceinline__ ContrastRow(const RowLogsumexp& the_job, const Group<T>& group)
        : job(the_job),
          inside(group.row() < job.rows),
          row(inside ? group.row() : 0),
          view(static_cast<T*>(job.dots) + row * job.stride, static_cast<T*>(job.dots) + row * job.stride, job.columns,
               inside),
          member(group.member()),
          members(group.members()),
          begin(static_cast<int>(job.own_begin == nullptr ? job.columns : job.own_begin[row])),
          many(static_cast<unsigned>(job.own_begin == nullptr ? 0 : job.own_end[row] - job.own_begin[row])),
          absent(job.absent == nullptr ? -1 : static_cast<int>(job.absent[row])),
          sigma(static_cast<T>(job.row_scale[row])) {}

    // Whether a column is of the row's own group.
    __device__ __forceinline__ bool own(int j) const { return static_cast<unsigned>(j - begin) < many; }

    // f(first column, similarities).
    template <class F>
    __device__ __forceinline__ void sweep(F f) const {
        view.template stream<kFlight>(member, members, [&](int j, auto& s) {
            constexpr int kN = kExtent<decltype(s)>;
            T shift[kN] = {};
            if (job.shift != nullptr) read_shifted(static_cast<const T*>(job.shift), job.columns, j, shift);
#pragma unroll
            for (int k = 0; k < kN; ++k) s[k] = std::fma(s[k], sigma, shift[k]);
            f(j, s);
        });
    }

    // What is done once a row, from the references and sums {other, own}: results out, {factors of the exponentials}.
    __device__ __forceinline__ void finish(bool writes, const T (&top)[2], const T (&sum)[2], T (&factor)[2]) const {
        constexpr double nothing = -static_cast<double>(INFINITY);
        double lse[2];
        for (int side = 0; side < 2; ++side)
            lse[side] = top[side] == T(INFINITY) ? static_cast<double>(INFINITY)
                                                 : static_cast<double>(top[side]) + log(static_cast<double>(sum[side]));
        const double other = lse[0], mine = lse[1];
        double of[2] = {0.0, 0.0};  // factors of e^(s - lse)
        if (job.loss == nullptr) {
            if (writes) {
                job.other[row] = other;
                job.own[row] = mine;
            }
            if (job.coefficients) {
                of[0] = job.grad_other[row];
                of[1] = job.grad_own[row];
            }
        } else {
            // What cancels is left out instead of subtracted: the loss less `own` is log1p of the others' share, and
            // the own columns' factor is minus that share.
            const double weight = job.weight[row];
            const double base = job.base == nullptr ? nothing : job.base[row];
            const double bonus = job.bonus == nullptr ? 0.0 : job.bonus[row];
            const double raised = mine == nothing ? mine : mine + bonus;
            const double highest = fmax(base, fmax(other, raised)), reference = highest == nothing ? 0.0 : highest;
            const double of_base = exp(base - reference), of_own = exp(raised - reference);
            const double besides = of_base + exp(other - reference), total = besides + of_own;
            double loss = reference + log(total);
            if (job.minus_own) loss = raised == reference ? bonus + log1p(besides / of_own) : loss - mine;
            if (writes) {
                job.loss[row] = weight == 0.0 ? 0.0 : weight * loss;
                if (job.grad_base != nullptr) job.grad_base[row] = weight == 0.0 ? 0.0 : weight * (of_base / total);
            }
            of[0] = weight * (exp(other - reference) / total);
            of[1] = weight * (job.minus_own ? -besides / total : of_own / total);
        }
        for (int side = 0; side < 2; ++side)
            factor[side] =
                static_cast<T>(lse[side] == nothing ? 0.0 : of[side] * exp(static_cast<double>(top[side]) - lse[side]));
    }

    const RowLogsumexp& job;
    const bool inside;
    const int64_t row;
    const Row<T, int> view;
    const int member, members;
    const int begin;
    const unsigned many;
    const int absent;
    const T sigma;
};

template <class T>
__global__ void __maxnreg__(kPartRegisters) contrast_rows(const ContrastJob job) {
    Group<T> group(job.plan);
    const ContrastRow<T> mine(job.rows, group);

    // Each side has a reference of its own: with one, a side far below the other would be lost. Rows of a block may
    // differ in whether they look for it, and meet all the same.
    const T fixed = job.rows.reference == nullptr ? T(INFINITY) : static_cast<T>(job.rows.reference[mine.row]);
    T top[2] = {fixed, fixed};
    if (fixed == T(INFINITY)) {
        top[0] = top[1] = -T(INFINITY);
        mine.sweep([&](int j, auto& s) {
#pragma unroll
            for (int k = 0; k < kExtent<decltype(s)>; ++k) {
                const bool own = mine.own(j + k), counts = j + k != mine.absent;
                top[0] = larger(top[0], counts && !own ? s[k] : -T(INFINITY));
                top[1] = larger(top[1], counts && own ? s[k] : -T(INFINITY));
            }
        });
    }
    group.template reduce<Max>(top);
    group.answer(top);
    top[0] = origin_of(top[0]);
    top[1] = origin_of(top[1]);

    T sum[2] = {T(0), T(0)};
    mine.sweep([&](int j, auto& s) {
#pragma unroll
        for (int k = 0; k < kExtent<decltype(s)>; ++k) {
            if (j + k == mine.absent) continue;
            const bool own = mine.own(j + k);
            const T e = exp_real(s[k] - (own ? top[1] : top[0]));
            sum[0] += own ? T(0) : e;
            sum[1] += own ? e : T(0);
        }
    });
    group.template reduce<Sum>(sum);
    T factor[2] = {T(0), T(0)};
    if (group.leading() && mine.inside) mine.finish(group.here == 0, top, sum, factor);
    if (!job.rows.coefficients) return;
    group.answer(factor);
    const bool counted = job.rows.loss == nullptr || job.rows.weight[mine.row] != 0.0;
    mine.sweep([&](int j, auto& s) {
#pragma unroll
        for (int k = 0; k < kExtent<decltype(s)>; ++k) {
            const bool own = mine.own(j + k);
            const T e = exp_real(s[k] - (own ? top[1] : top[0]));
            s[k] = counted && j + k != mine.absent ? (own ? factor[1] : factor[0]) * e : T(0);
        }
        mine.view.store(j, s);
    });
}

}  // namespace cuda
}  // namespace ltk
