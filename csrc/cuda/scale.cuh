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

constexpr int kScaleBlock = 512;

template <class T>
__global__ void __launch_bounds__(kScaleBlock) scale_elements(const ScaleJob job) {
    using Real = real_t<T>;
    const Real expected = job.expected == nullptr ? Real(1) : *static_cast<const Real*>(job.expected);
    Real factor = *static_cast<const Real*>(job.factor);
    if (factor == expected) return;
    factor /= expected;
    const Row<T, int64_t> view(job.x, job.x, job.n, true);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    view.template stream<4>(static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, threads,
                            [&](int64_t j, auto& x) {
#pragma unroll
                                for (int k = 0; k < kExtent<decltype(x)>; ++k) x[k] *= factor;
                                view.store(j, x);
                            });
}

}  // namespace cuda
}  // namespace ltk
