// A gradient times the upstream factor, in place. The factor stays on the device; where it is 1, as nearly always,
// every block returns at once, so that no host has to look.
#pragma once
#include "row.cuh"

namespace ltk {
namespace cuda {

struct ScaleJob {
    void* x;
    int64_t n;
    const void* factor;  // one real
};

template <class T>
__global__ void __launch_bounds__(256) scale_elements(const ScaleJob job) {
    using Real = real_t<T>;
    const Real factor = *static_cast<const Real*>(job.factor);
    if (factor == Real(1)) return;
    const Row<T, int64_t> view(job.x, job.x, job.n, true);
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < view.vectors;
         v += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        Real x[kVec<T>];
        unpack(view.fetch(v), x, T());
#pragma unroll
        for (int k = 0; k < kVec<T>; ++k) x[k] *= factor;
        view.store(view.first(v), x);
    }
}

}  // namespace cuda
}  // namespace ltk
