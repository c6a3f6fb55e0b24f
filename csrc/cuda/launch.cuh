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

struct Shape {
    int64_t grid;
    int block;
    int cluster = 1;        // blocks that run together and see each other's shared memory
    size_t shared = 0;      // bytes of dynamic shared memory
    bool overlaps = false;  // begins while the launch before it runs: begin_second_launch, wait_for_first_launch
};

#if defined(LTK_CUDA_HOST)

template <class Job>
const char* launch(void (*kernel)(Job), const Shape& shape, Where, const Job& job) {
    return emulation::launch(
        reinterpret_cast<const void*>(kernel), [&] { kernel(job); }, shape.grid, shape.block, shape.cluster,
        shape.shared);
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

// A shape in the runtime's words.
struct Config {
    explicit Config(const Shape& shape, Where where = {}) {
        config.gridDim = dim3(static_cast<unsigned>(shape.grid));
        config.blockDim = dim3(static_cast<unsigned>(shape.block));
        config.dynamicSmemBytes = shape.shared;
        config.stream = static_cast<cudaStream_t>(where.stream);
        config.attrs = attributes;
        if (shape.cluster > 1) {
            cudaLaunchAttribute& clusters = attributes[config.numAttrs++];
            clusters.id = cudaLaunchAttributeClusterDimension;
            clusters.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
            clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
        }
        if (shape.overlaps) {
            cudaLaunchAttribute& early = attributes[config.numAttrs++];
            early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            early.val.programmaticStreamSerializationAllowed = 1;
        }
    }
    Config(const Config&) = delete;
    Config& operator=(const Config&) = delete;
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attributes[2]{};
};

// Null, or what went wrong.
template <class Job>
const char* launch(void (*kernel)(Job), const Shape& shape, Where where, const Job& job) {
    if (shape.grid > INT32_MAX) return "the batch needs more than 2^31 - 1 thread blocks";
    const Config how(shape, where);
    const cudaError_t launched = cudaLaunchKernelEx(&how.config, kernel, job);
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
    const Config together(Shape{size, block, size});
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
