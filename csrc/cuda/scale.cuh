// A gradient times its upstream factor over the one that it was formed for, in place. Both stay on the device; where
// they are equal, as nearly always, every block returns at once, so that no host has to look.
#pragma once
#include "row.cuh"

namespace ltk {
namespace cuda {

struct ScaleJob {
    void* x;
    int64_t n;
    const void* factor;    // one real
    const void* expected;  // one real, or null: 1
};

template <class T>
__global__ void __launch_bounds__(256) scale_elements(const ScaleJob job) {
    using Real = real_t<T>;
    const Real expected = job.expected == nullptr ? Real(1) : *static_cast<const Real*>(job.expected);
    Real factor = *static_cast<const Real*>(job.factor);
    if (factor == expected) return;
    factor /= expected;
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
