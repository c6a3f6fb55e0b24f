// From the host to the device: where a launch goes, what it needs, and what went wrong.
#pragma once
#if !defined(LTK_CUDA_HOST)
#include <atomic>
#endif

#include "portable.cuh"

namespace ltk {
namespace cuda {

// Where a launch goes. `stream` is a cudaStream_t.
struct Where {
    int device;
    void* stream;
};

#if defined(LTK_CUDA_HOST)

template <class Job>
const char* launch(void (*kernel)(Job), int64_t grid, int block, int cluster, size_t shared, Where, const Job& job) {
    emulation::launch([&] { kernel(job); }, grid, block, cluster, shared);
    return nullptr;
}
template <class Job>
int largest_cluster(void (*)(Job), int, int) {
    return 16;
}
struct DeviceGuard {
    explicit DeviceGuard(int) {}
    const char* error = nullptr;
};

#else

inline const char* message(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null, or what went wrong. `cluster` blocks run together and see each other's shared memory.
template <class Job>
const char* launch(void (*kernel)(Job), int64_t grid, int block, int cluster, size_t shared, Where where,
                   const Job& job) {
    if (grid > INT32_MAX) return "the batch needs more than 2^31 - 1 thread blocks";
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(where.stream);
    cudaLaunchAttribute attribute{};
    if (cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, job);
    const cudaError_t last = cudaGetLastError();
    return message(launched != cudaSuccess ? launched : last);
}

// The most blocks (1, 8 or 16) that can form a cluster of this kernel. 16 is beyond what every device promises and has
// to be asked for. Answered once for each kernel and device: the question takes longer than a launch.
template <class Job>
int largest_cluster(void (*kernel)(Job), int block, int device) {
    static std::atomic<int> known[64];
    if (device < 0 || device >= 64) return 1;
    int found = known[device].load(std::memory_order_relaxed);
    if (found != 0) return found;
    found = 1;
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9) {
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        for (int size = 16; size >= 8 && found == 1; size /= 2) {
            cudaLaunchConfig_t config{};
            config.gridDim = dim3(static_cast<unsigned>(size));
            config.blockDim = dim3(static_cast<unsigned>(block));
            cudaLaunchAttribute attribute{};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = static_cast<unsigned>(size);
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            config.attrs = &attribute;
            config.numAttrs = 1;
            int clusters = 0;
            if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) found = size;
        }
        cudaGetLastError();  // a size that does not fit is an answer and not a failure
    }
    known[device].store(found, std::memory_order_relaxed);
    return found;
}

// The launch goes to the tensors' device, whichever is current.
struct DeviceGuard {
    explicit DeviceGuard(int device) {
        error = message(cudaGetDevice(&before));
        if (error == nullptr && before != device) {
            error = message(cudaSetDevice(device));
            changed = error == nullptr;
        }
    }
    ~DeviceGuard() {
        if (changed) cudaSetDevice(before);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    const char* error = nullptr;

  private:
    int before = 0;
    bool changed = false;
};

#endif

}  // namespace cuda
}  // namespace ltk
