// Batched log-determinants of small symmetric positive definite matrices by LDL^T: cpu/logdet.inl is the twin. A warp a
// matrix, the lower triangle in shared memory, a row a lane (two above n = 32).
#pragma once
#include "element.cuh"

namespace ltk {
namespace cuda {

struct LogdetJob {
    const void* matrices;  // (batch, n, n)
    int64_t batch;
    int n;
    void* out;  // (batch,)
};

// An odd stride keeps the lanes, which walk down a column together, in different banks.
template <class T>
constexpr size_t logdet_bytes(int n) {
    return static_cast<size_t>(n) * static_cast<size_t>(n | 1) * sizeof(T);
}

template <class T>
__global__ void __launch_bounds__(256) logdet_warps(const LogdetJob job) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = job.n, stride = n | 1;
    T* const a = dynamic_shared<T>() + warp * n * stride;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
    if (index >= job.batch) return;  // a whole warp; nothing below joins warps
    const T* const matrix = static_cast<const T*>(job.matrices) + index * n * n;
    for (int i = 0; i < n; ++i)
        for (int k = lane; k <= i; k += 32) a[i * stride + k] = matrix[i * n + k];
    __syncwarp();
    for (int j = 0; j < n; ++j) {
        const T inverse = T(1) / a[j * stride + j];
        for (int i = j + 1 + lane; i < n; i += 32) {
            const T factor = a[i * stride + j] * inverse;
            // Column j itself stays as it is: other lanes read it.
            for (int k = j + 1; k <= i; ++k) a[i * stride + k] -= factor * a[k * stride + j];
        }
        __syncwarp();
    }
    double total = 0.0;
    for (int j = lane; j < n; j += 32) {
        const T pivot = a[j * stride + j];
        total += pivot > T(0) ? log(static_cast<double>(pivot)) : static_cast<double>(NAN);
    }
    for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(kAllLanes, total, o);
    if (lane == 0) static_cast<T*>(job.out)[index] = static_cast<T>(total);
}

}  // namespace cuda
}  // namespace ltk
