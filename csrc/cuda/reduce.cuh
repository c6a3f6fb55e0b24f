// Sums and maxima over the threads that share a row: lanes of a warp, warps of a block, blocks of a cluster. The order
// depends on the shape alone. The result is in the row's first warp of every block, which answers all others.
#pragma once
#include "element.cuh"
#include "job.h"

namespace ltk {
namespace cuda {

constexpr int kMaxBlock = 512;  // threads
constexpr int kMaxWarps = kMaxBlock / 32;

template <class Real>
struct Shared {
    Real part[kMaxWarps][4], answer[kMaxWarps][4];
    Real across[2][4];
    double sum[kMaxWarps];
};

struct Sum {
    template <class Real>
    static __device__ __forceinline__ Real neutral(int) {
        return Real(0);
    }
    template <class Real, int kN>
    static __device__ __forceinline__ void combine(Real (&x)[kN], int width) {
        for (int o = width / 2; o > 0; o /= 2)
#pragma unroll
            for (int i = 0; i < kN; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], o);
    }
};

// Minus infinity is the maximum of nothing; differences are then taken to 0.
template <class Real>
__device__ __forceinline__ Real origin_of(Real top) {
    return top == -Real(INFINITY) ? Real(0) : top;
}

// (a maximum, a sum of exponentials relative to it[, sum of w (a - maximum), sum of w]) beside logits of type T.
template <class T>
struct MaxSum {
    template <class Real>
    static __device__ __forceinline__ Real neutral(int i) {
        return i == 0 ? -Real(INFINITY) : Real(0);
    }
    template <class Real, int kN>
    static __device__ __forceinline__ void combine(Real (&x)[kN], int width) {
        Real top = x[0];
        for (int o = width / 2; o > 0; o /= 2) top = larger(top, __shfl_xor_sync(kAllLanes, top, o));
        // Nothing to rescale, where -inf - -inf would be NaN.
        if (x[1] != Real(0)) x[1] *= exp_for<T>(x[0] - top);
        if constexpr (kN == 4) x[2] += (origin_of(x[0]) - origin_of(top)) * x[3];
        x[0] = top;
        for (int o = width / 2; o > 0; o /= 2)
#pragma unroll
            for (int i = 1; i < kN; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], o);
    }
};

// The threads of one row: `threads` of a block (a power of two), in each of `cluster` blocks.
template <class Real>
struct Group {
    __device__ __forceinline__ explicit Group(const Plan& the_plan)
        : shared(block_shared<Shared<Real>>()),
          plan(the_plan),
          threads(the_plan.threads),
          cluster(the_plan.cluster),
          here(static_cast<int>(threadIdx.x) & (threads - 1)) {}

    __device__ __forceinline__ int64_t row() const {
        if (cluster > 1) return blockIdx.x >> plan.cluster_log2;
        return static_cast<int64_t>(blockIdx.x) * (blockDim.x >> plan.threads_log2) +
               (threadIdx.x >> plan.threads_log2);
    }
    __device__ __forceinline__ int member() const { return cluster > 1 ? cluster_rank() * threads + here : here; }
    __device__ __forceinline__ int members() const { return threads << plan.cluster_log2; }
    // The warp (all of it) that gets the results: what is done once a row is done here.
    __device__ __forceinline__ bool leading() const { return threads <= 32 || here < 32; }

    // One `answer` comes between two reductions. Of a warp that leads several, the lanes of the row have the result,
    // and else at least lane 0.
    template <class Op, int kN>
    __device__ __forceinline__ void reduce(Real (&x)[kN]) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Op::combine(x, threads < 32 ? threads : 32);
        if (threads <= 32) {
            __syncwarp();
            return;
        }
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < kN; ++i) shared.part[warp][i] = x[i];
        __syncthreads();
        const int warps = threads / 32;
        if (leading()) gather<Op>(x, &shared.part[warp + (lane < warps ? lane : 0)][0], warps);
        if (cluster == 1) return;
        // Two sets of slots, used in turn: who writes a set again has met all others after they read it.
        if (here == 0)
#pragma unroll
            for (int i = 0; i < kN; ++i) shared.across[parity][i] = x[i];
        cluster_arrive();
        cluster_wait();
        if (leading()) gather<Op>(x, cluster_peer(&shared.across[parity][0], lane < cluster ? lane : 0), cluster);
        parity ^= 1;
    }
    template <class Op, int kN>
    __device__ __forceinline__ void gather(Real (&x)[kN], const Real* from, int count) const {
        const bool takes = static_cast<int>(threadIdx.x % 32) < count;
#pragma unroll
        for (int i = 0; i < kN; ++i) x[i] = takes ? from[i] : Op::template neutral<Real>(i);
        Op::combine(x, count);
    }
    // What the leading warp knows, to all threads of the row.
    template <int kN>
    __device__ __forceinline__ void answer(Real (&x)[kN]) {
        if (threads <= 32) return;
        const int first = (threadIdx.x - here) / 32;
        if (here == 0)
#pragma unroll
            for (int i = 0; i < kN; ++i) shared.answer[first][i] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kN; ++i) x[i] = shared.answer[first][i];
    }
    // A block may not end while its shared memory is read by others of the cluster: it says when it has read theirs,
    // before the gradient is written, and waits for them when that is done.
    __device__ __forceinline__ void depart() const {
        if (cluster > 1) cluster_arrive();
    }
    __device__ __forceinline__ void leave() const {
        if (cluster > 1) cluster_wait();
    }

    Shared<Real>& shared;
    const Plan& plan;
    const int threads, cluster, here;
    int parity = 0;
};

// Sum over the block, for thread 0, in double. Lanes whose number is no multiple of `every` (a power of two) have 0.
// Once a kernel.
template <class Real>
__device__ __forceinline__ double block_sum(double x, Shared<Real>& shared, int every = 1) {
    const int warps = blockDim.x / 32;
    for (int o = 16; o >= every; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
    if (threadIdx.x % 32 == 0) shared.sum[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0)
        for (int w = 0; w < warps; ++w) total += shared.sum[w];
    return total;
}

}  // namespace cuda
}  // namespace ltk
