// What one label of one row needs, and what follows from a row's statistics: csrc/README.md has the formula,
// cpu/adjusted_ce.inl is the twin.
#pragma once
#include "job.h"
#include "reduce.cuh"
#include "row.cuh"

#define LTK_NAMESPACE cuda
#define LTK_FORMULA __device__ __forceinline__
#include "../formulas.inl"

namespace ltk {
namespace cuda {

enum class RowState : int { normal, ignored, bad };

// The tables that are read along with the logits, as template argument: what is not there costs nothing.
enum class Tables : int { none, shift, any };

template <class Real>
__device__ __forceinline__ Real at(const void* table, int64_t i, Real neutral) {
    return table == nullptr ? neutral : __ldg(static_cast<const Real*>(table) + i);
}

template <class Real>
struct Labels {
    int64_t label[2];
    Real share[2];
    RowState state;
};

template <class Real>
__device__ __forceinline__ Labels<Real> labels_of(const RowsJob& job, int64_t row, bool inside) {
    const AdjustedCe& ce = job.ce;
    Labels<Real> out{{0, 0}, {Real(1), Real(0)}, RowState::ignored};
    if (!inside) return out;
    const int64_t a = ce.target[row];
    if (a == ce.ignore_index) return out;
    bool good = a >= 0 && a < ce.classes;
    out.label[0] = a;
    if (ce.target_b != nullptr) {
        const int64_t b = ce.target_b[row];
        good = good && b >= 0 && b < ce.classes;
        out.label[1] = b;
        out.share[0] = static_cast<const Real*>(ce.lam)[row];
        out.share[1] = Real(1) - out.share[0];
    }
    out.state = good ? RowState::normal : RowState::bad;
    if (!good) out.label[0] = out.label[1] = 0;  // nothing is read at a bad label
    return out;
}

// A row of logits that one call is about, and its gradient.
template <class T, class Index>
__device__ __forceinline__ Row<T, Index> row_of(const AdjustedCe& ce, int64_t row, bool inside) {
    return Row<T, Index>(static_cast<const T*>(ce.logits) + row * ce.logits_stride,
                         ce.grad == nullptr ? nullptr : static_cast<T*>(ce.grad) + row * ce.grad_stride, ce.classes,
                         inside);
}

template <class Real, class Index>
struct Term {
    Index column;   // of the label; kNowhere where the row has no loss
    double target;  // its adjusted logit, margin included
    Real sigma, weight, share;
    Real slope;  // of the adjusted logit in the logit, without sigma
};
constexpr int kNowhere = -64;

// Whether labels are smoothed, by one number or each by its own; and a label's smoothing, which is read where it is
// used: a register that held it from the start would be spilled.
__host__ __device__ __forceinline__ bool smooths(const AdjustedCe& ce) {
    return ce.smoothing != nullptr || ce.label_smoothing != 0.0;
}
template <class Real>
__device__ __forceinline__ Real smoothing_of(const AdjustedCe& ce, int64_t label) {
    return at(ce.smoothing, label, static_cast<Real>(ce.label_smoothing));
}

// Without Tables::any there is no label scale.
template <Tables kTables, class T, class Index>
__device__ __forceinline__ Term<real_t<T>, Index> make_term(const RowsJob& job, const Row<T, Index>& row, int64_t label,
                                                            real_t<T> share, bool normal) {
    using Real = real_t<T>;
    const AdjustedCe& ce = job.ce;
    Term<Real, Index> term{kNowhere, 0.0, Real(1), Real(1), share, Real(1)};
    if (!normal) return term;
    term.sigma = at(ce.row_scale, label, Real(1));
    term.weight = at(ce.weight, label, Real(1));
    term.column = static_cast<Index>(label);
    double own = get_element(row.z + label);
    if constexpr (kTables == Tables::any) {
        term.slope = at(ce.label_scale, label, Real(1));
        own *= static_cast<double>(term.slope);
    }
    double value = own, slope = 1.0;
    if (ce.closed.form == Form::arcface) {
        arcface<Real>(ce.closed, own, &value, &slope);
        term.slope = static_cast<Real>(slope);
    } else {
        const Real scale = at(ce.scale, label, Real(1));
        value = static_cast<double>(scale) * own + static_cast<double>(at(ce.shift, label, Real(0))) -
                static_cast<double>(at(ce.margin, label, Real(0)));
        term.slope *= scale;
    }
    term.target = static_cast<double>(term.sigma) * value;
    return term;
}

// Loss and gradient of one label:  dL/dz_j = beta_j (factor exp(a_j - top) - soft weight_j)  but at the label.
template <class Real>
struct Outcome {
    Real loss, factor, soft, label_grad;

    __device__ __forceinline__ void tell(Real (&told)[4], Real top) const {
        told[0] = factor;
        told[1] = origin_of(top);
        told[2] = soft;
        told[3] = label_grad;
    }
};

// `top` and `sum`: maximum of the adjusted logits but the label's, and the sum of their exponentials relative to it.
// `below` and `weights`: with smoothing, sum of weight_j (a_j - top), and of weight_j, but the label's. The factor is
// that of exponentials relative to `top`. `epsilon`: the label's smoothing.
template <class Real, class Index>
__device__ __forceinline__ Outcome<Real> finish(const AdjustedCe& ce, const Term<Real, Index>& term, Real epsilon,
                                                Real top, Real sum, Real below, Real weights, Real upstream) {
    Outcome<Real> out;
    const double gap = static_cast<double>(top) - term.target;
    double highest = static_cast<double>(top);
    Real others = sum, label_e, others_e = Real(1);  // of the label, of what is as high as the highest of the others
    if (gap > 0.0) {
        label_e = exp_wide(-gap, Real());
    } else {
        others_e = exp_wide(gap, Real());
        if (others != Real(0)) others *= others_e;
        // An infinite label, and a row of -inf, have no probabilities.
        label_e = gap <= 0.0 && term.target < static_cast<double>(INFINITY) ? Real(1) : Real(NAN);
        highest = term.target;
    }
    const Real total = others + label_e;
    // Next to the maximum log(total) would round a small loss away; log1p keeps its relative accuracy.
    const Real label_below = gap > 0.0 ? static_cast<Real>(-gap) : Real(0);
    const Real nll = label_below > Real(-1) ? log1p_real(others / label_e) : log_real(total) - label_below;
    Real phi, slope;
    focal(static_cast<Real>(ce.focal_gamma), nll, &phi, &slope);
    const bool smooth = epsilon != Real(0);
    const Real hard = (Real(1) - epsilon) * term.weight * term.share;
    const Real soft = smooth ? epsilon / static_cast<Real>(ce.classes) * term.share : Real(0);
    out.loss = hard * phi;
    const Real every = smooth ? weights + term.weight : Real(0);
    if (smooth) {
        const double origin = top == -Real(INFINITY) ? 0.0 : static_cast<double>(top);
        const Real lift = static_cast<Real>(highest - origin), own = static_cast<Real>(term.target - origin);
        out.loss += soft * ((log_real(total) + lift) * every - (below + term.weight * own));
    }
    const Real outer = upstream * term.sigma, soft_total = soft * every;
    out.factor = outer * (hard * slope + soft_total) / total * others_e;
    out.soft = outer * soft;
    // Minus the sum of the others and not P_y - 1, which cancels to 0 on confident rows.
    out.label_grad = soft_total * (label_e / total) - hard * slope * (others / total);
    if (smooth) out.label_grad -= soft * term.weight;
    out.label_grad *= outer * term.slope;
    return out;
}

// Label smoothing's weights along a row.
template <class T, class Index>
struct Smoothing {
    using Real = real_t<T>;
    template <class Array>
    __device__ __forceinline__ void weights(Index j, Array& w) const {
#pragma unroll
        for (int k = 0; k < kExtent<Array>; ++k) w[k] = Real(1);
        if (weight != nullptr) Row<T, Index>::read(weight, j, w);
    }
    // Sums of w gap and of w, but the label's.
    template <class Array>
    __device__ __forceinline__ void add(Index j, Index label, const Array& gap, Real& below, Real& sum) const {
        constexpr int kN = kExtent<Array>;
        Real w[kN];
        weights(j, w);
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            if (j + k == label) continue;
            below += w[k] * gap[k];
            sum += w[k];
        }
    }
    const Real* const weight;  // null: 1
};

// Adds to a running maximum and sum beside logits of type T, without the label's column; leaves the differences to the
// reference, and returns by how much that rose.
template <class T, class Index, class Array>
__device__ __forceinline__ real_t<T> accumulate(Array& a, Index j, Index label, real_t<T>& top, real_t<T>& sum) {
    using Real = real_t<T>;
    constexpr int kCount = kExtent<Array>;
    if (label >= j && label < j + kCount) {
#pragma unroll
        for (int k = 0; k < kCount; ++k)
            if (j + k == label) a[k] = -Real(INFINITY);
    }
    Real highest = top;
#pragma unroll
    for (int k = 0; k < kCount; ++k) highest = larger(highest, a[k]);
    const Real before = origin_of(top), reference = origin_of(highest);
    if (sum != Real(0)) sum *= exp_for<T>(top - reference);
    Real e[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        a[k] -= reference;
        e[k] = exp_for<T>(a[k]);
    }
    sum += total_of(e);
    top = highest;
    return before - reference;
}

// The denominator of the reduction, for a whole warp. The partial sums lie in a fixed order.
__device__ __forceinline__ double denominator_of(const RowsJob& job) {
    if (job.partials == 0) return 1.0;
    if (job.partials == 1) return job.denominators[0];
    double x = static_cast<int>(threadIdx.x % 32) < job.partials ? job.denominators[threadIdx.x % 32] : 0.0;
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
    return x;
}

// The factor on a row's gradient, for a whole warp.
template <class Real>
__device__ __forceinline__ Real upstream_of(const RowsJob& job, int64_t row) {
    wait_for_first_launch();
    const Real upstream = Real(1) / static_cast<Real>(denominator_of(job));
    if (job.ce.row_coef == nullptr) return upstream;
    return upstream * static_cast<const Real*>(job.ce.row_coef)[job.row_coef_stride == 0 ? 0 : row];
}

template <class Real>
__device__ __forceinline__ void copy_table(const Table& table, int64_t classes) {
    if (table.copies == nullptr) return;
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; j < classes;
         j += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        const Real t = __ldg(static_cast<const Real*>(table.source) + j);
        for (int p = 0; p < 16 / static_cast<int>(sizeof(Real)); ++p)
            static_cast<Real*>(table.copies)[p * table.step + j] = t;
    }
}

// First launch: partial denominators over the labels, the ticket of the second launch, copies of the tables.
template <class Real>
__global__ void __launch_bounds__(kMaxBlock) loss_prologue(const RowsJob job) {
    begin_second_launch();
    const AdjustedCe& ce = job.ce;
    copy_table<Real>(job.scale, ce.classes);
    copy_table<Real>(job.shift, ce.classes);
    copy_table<Real>(job.weight, ce.classes);
    const bool weighted = job.reduction == Reduction::mean;
    double sum = 0.0;
    if (static_cast<int>(blockIdx.x) < job.partials)
        for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < ce.rows;
             row += static_cast<int64_t>(job.partials) * blockDim.x) {
            const Labels<Real> labels = labels_of<Real>(job, row, true);
            if (labels.state != RowState::normal) continue;
            if (!weighted || ce.weight == nullptr) {
                sum += 1.0;
            } else {
                const double share = static_cast<double>(labels.share[0]);
                double weight = static_cast<double>(at(ce.weight, labels.label[0], Real(1)));
                if (ce.target_b != nullptr)
                    weight =
                        share * weight + (1.0 - share) * static_cast<double>(at(ce.weight, labels.label[1], Real(1)));
                sum += weight;
            }
        }
    sum = block_sum(sum, block_shared<Shared<Real>>());
    if (threadIdx.x != 0) return;
    if (static_cast<int>(blockIdx.x) < job.partials) job.denominators[blockIdx.x] = sum;
    if (blockIdx.x == 0 && job.ticket != nullptr) *job.ticket = 0;
}

// The row's loss (of its leading warp) goes out, or into the block's partial loss with a ticket for thread 0: before
// the gradient, whose stores cover the time that takes.
template <class Real>
__device__ __forceinline__ unsigned announce_loss(const RowsJob& job, const Group<Real>& group, Real loss) {
    const int64_t row = group.row();
    const bool leader = row < job.ce.rows && group.member() == 0;
    if (job.reduction == Reduction::none) {
        if (leader) static_cast<Real*>(job.loss)[row] = loss;
        return 0;
    }
    double partial = leader ? static_cast<double>(loss) : 0.0;
    if (group.threads < static_cast<int>(blockDim.x)) partial = block_sum(partial, group.shared, group.threads);
    if (threadIdx.x != 0 || group.member() != 0) return 0;  // the row's first block speaks for it
    job.group_loss[group.cluster > 1 ? row : static_cast<int64_t>(blockIdx.x)] = partial;
    __threadfence();  // the partial loss is visible before the ticket says so
    return atomicAdd(job.ticket, 1u);
}
// The first warp of the last block adds the partial losses up in their order; no other warp waits for anything.
template <class Real>
__device__ __forceinline__ void collect_losses(const RowsJob& job, const Group<Real>& group, unsigned ticket) {
    if (job.reduction == Reduction::none || threadIdx.x >= 32) return;
    ticket = __shfl_sync(kAllLanes, ticket, 0);
    if (ticket != static_cast<unsigned>(job.groups) - 1u) return;
    if (group.cluster > 1 && group.member() >= group.threads) return;
    __threadfence();
    double total = 0.0;
#pragma unroll 16
    for (int64_t g = threadIdx.x; g < job.groups; g += 32) total += __ldcg(job.group_loss + g);
    for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(kAllLanes, total, o);
    const double denominator = denominator_of(job);
    if (threadIdx.x == 0) *static_cast<Real*>(job.loss) = static_cast<Real>(total / denominator);
}

}  // namespace cuda
}  // namespace ltk
