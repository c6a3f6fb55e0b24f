// From the host to the device: where a launch goes, what it needs, and what went wrong.
#pragma once
#include <map>
#include <mutex>
#include <utility>

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
    return emulation::launch(reinterpret_cast<const void*>(kernel), [&] { kernel(job); }, grid, block, cluster, shared);
}
inline int code_version(const void* kernel) {
    return emulation::code_version(kernel);
}
inline void allow_large_clusters(const void* kernel) {
    emulation::allow_large_clusters(kernel);
}
inline bool clusters_fit(const void* kernel, int block, int size) {
    return emulation::clusters_fit(kernel, block, size);
}
struct DeviceGuard {
    explicit DeviceGuard(int) {}
    const char* error = nullptr;
};

#else

inline const char* message(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A launch of `size` blocks that run together and see each other's shared memory.
struct ClusterLaunch {
    ClusterLaunch(int64_t grid, int block, int size) {
        config.gridDim = dim3(static_cast<unsigned>(grid));
        config.blockDim = dim3(static_cast<unsigned>(block));
        if (size == 1) return;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(size);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
};

// Null, or what went wrong.
template <class Job>
const char* launch(void (*kernel)(Job), int64_t grid, int block, int cluster, size_t shared, Where where,
                   const Job& job) {
    if (grid > INT32_MAX) return "the batch needs more than 2^31 - 1 thread blocks";
    ClusterLaunch together(grid, block, cluster);
    together.config.dynamicSmemBytes = shared;
    together.config.stream = static_cast<cudaStream_t>(where.stream);
    const cudaError_t launched = cudaLaunchKernelEx(&together.config, kernel, job);
    const cudaError_t last = cudaGetLastError();
    return message(launched != cudaSuccess ? launched : last);
}

// The architecture that the code of a kernel was compiled for, as 10 major + minor; 0 where it does not load. It may be
// older than the device, which then compiled it from PTX: what newer devices have is not in it.
inline int code_version(const void* kernel) {
    cudaFuncAttributes found{};
    if (cudaFuncGetAttributes(&found, kernel) == cudaSuccess)
        return found.ptxVersion < found.binaryVersion ? found.ptxVersion : found.binaryVersion;
    cudaGetLastError();
    return 0;
}
// More than 8 blocks a cluster is beyond what every device promises, and has to be asked for, kernel by kernel.
inline void allow_large_clusters(const void* kernel) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}
inline bool clusters_fit(const void* kernel, int block, int size) {
    const ClusterLaunch together(size, block, size);
    int clusters = 0;
    const bool fit = cudaOccupancyMaxActiveClusters(&clusters, kernel, &together.config) == cudaSuccess && clusters > 0;
    cudaGetLastError();  // a size that does not fit is an answer and not a failure
    return fit;
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

// What the code of a kernel can do on the current device. Asked once for each: the questions take longer than a launch.
struct Abilities {
    int code;             // see code_version
    int largest_cluster;  // 1, 8 or 16 blocks of `block` threads
};
inline Abilities abilities(const void* kernel, int block, int device) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, Abilities> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_pair(kernel, device);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    Abilities answer{code_version(kernel), 1};
    if (answer.code >= 90) {
        allow_large_clusters(kernel);
        for (int size = 16; size >= 8 && answer.largest_cluster == 1; size /= 2)
            if (clusters_fit(kernel, block, size)) answer.largest_cluster = size;
    }
    known[key] = answer;
    return answer;
}

}  // namespace cuda
}  // namespace ltk
