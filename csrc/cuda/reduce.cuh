// Sums and maxima over the threads that share a row: lanes of a warp, warps of a block, blocks of a cluster. The order
// depends on the shape alone, and every thread gets the same bits.
#pragma once
#include "element.cuh"

namespace ltk {
namespace cuda {

constexpr int kMaxBlock = 512;  // threads
constexpr int kMaxWarps = kMaxBlock / 32;

template <class Real>
struct Shared {
    Real pair[2][kMaxWarps][2];
    Real across[2][2];
    double sum[kMaxWarps];
    unsigned ticket;
};

template <class Real>
__device__ __forceinline__ void warp_sum(Real& a, Real& b, int width) {
    for (int o = width / 2; o > 0; o /= 2) {
        a += __shfl_xor_sync(kAllLanes, a, o);
        b += __shfl_xor_sync(kAllLanes, b, o);
    }
}

// (a, b) stands for b e^a: a maximum, and a sum relative to it.
template <class Real>
__device__ __forceinline__ void warp_max_sum(Real& a, Real& b, int width) {
    Real top = a;
    for (int o = width / 2; o > 0; o /= 2) top = larger(top, __shfl_xor_sync(kAllLanes, top, o));
    // Nothing to rescale, where -inf - -inf would be NaN.
    if (b != Real(0)) b *= exp_real(a - top);
    for (int o = width / 2; o > 0; o /= 2) b += __shfl_xor_sync(kAllLanes, b, o);
    a = top;
}

// Sum over the block, for thread 0, in double.
template <class Real>
__device__ __forceinline__ double block_sum(double x, Shared<Real>& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
    __syncthreads();  // an earlier sum has been read
    if (lane == 0) shared.sum[warp] = x;
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0)
        for (int w = 0; w < warps; ++w) total += shared.sum[w];
    return total;
}

// The threads of one row: `threads` of a block (a power of two), in each of `cluster` blocks.
template <class Real>
struct Group {
    __device__ __forceinline__ Group(int row_threads, int cluster_blocks)
        : shared(block_shared<Shared<Real>>()), threads(row_threads), cluster(cluster_blocks) {}

    __device__ __forceinline__ int64_t row() const {
        if (cluster > 1) return blockIdx.x / static_cast<unsigned>(cluster);
        return static_cast<int64_t>(blockIdx.x) * (blockDim.x / static_cast<unsigned>(threads)) +
               threadIdx.x / static_cast<unsigned>(threads);
    }
    __device__ __forceinline__ int member() const {
        const int here = static_cast<int>(threadIdx.x) & (threads - 1);
        return cluster > 1 ? cluster_rank() * threads + here : here;
    }
    __device__ __forceinline__ int members() const { return threads * cluster; }

    // Reads of the logits by any thread of the row come before writes of the gradient by any other.
    __device__ __forceinline__ void fence() const {
        if (cluster > 1)
            cluster_sync();
        else if (threads > 32)
            __syncthreads();
        else
            __syncwarp();
    }

    // `combine(a, b, width)` over aligned groups of `width` lanes; (neutral, 0) changes nothing.
    template <class Combine>
    __device__ __forceinline__ void reduce(Real& a, Real& b, Real neutral, Combine combine) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        combine(a, b, threads < 32 ? threads : 32);
        if (threads <= 32) {
            __syncwarp();
            return;
        }
        // Two sets of slots, used in turn: who writes a set again has passed the barrier of the other set, which
        // nobody reaches before reading the first.
        Real(*pair)[2] = shared.pair[parity];
        if (lane == 0) {
            pair[warp][0] = a;
            pair[warp][1] = b;
        }
        __syncthreads();
        const int warps = threads / 32, first = warp & ~(warps - 1);
        a = lane < warps ? pair[first + lane][0] : neutral;
        b = lane < warps ? pair[first + lane][1] : Real(0);
        combine(a, b, 32);
        if (cluster > 1) {
            if (threadIdx.x == 0) {
                shared.across[parity][0] = a;
                shared.across[parity][1] = b;
            }
            cluster_sync();
            a = neutral;
            b = Real(0);
            if (lane < cluster) {
                const Real* peer = cluster_peer(&shared.across[parity][0], lane);
                a = peer[0];
                b = peer[1];
            }
            combine(a, b, 32);
        }
        parity ^= 1;
    }
    __device__ __forceinline__ void sum(Real& a, Real& b) {
        reduce(a, b, Real(0), [](Real& x, Real& y, int width) { warp_sum(x, y, width); });
    }
    __device__ __forceinline__ void max_sum(Real& a, Real& b) {
        reduce(a, b, -Real(INFINITY), [](Real& x, Real& y, int width) { warp_max_sum(x, y, width); });
    }
    // A block may not end while its shared memory is read by others of the cluster.
    __device__ __forceinline__ void leave() const {
        if (cluster > 1) cluster_sync();
    }

    Shared<Real>& shared;
    int threads, cluster;
    int parity = 0;
};

}  // namespace cuda
}  // namespace ltk
