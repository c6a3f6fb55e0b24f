// The words that differ between a GPU and the host emulation (tests/cuda_host/emulation.h), which runs the very same
// kernels under g++: 16-bit conversions, 16-byte accesses, thread-block clusters, launches. Everything else in this
// folder is plain CUDA C++ that both understand.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(LTK_CUDA_HOST)
#include "emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#endif

namespace ltk {
namespace cuda {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// 16 bytes: what one thread moves at a time.
struct alignas(16) Raw {
    uint32_t word[4];
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Where a launch goes. `stream` is a cudaStream_t.
struct Where {
    int device;
    void* stream;
};

#if defined(LTK_CUDA_HOST)

inline float to_float(bf16 x) {
    return emulation::bits_float(static_cast<uint32_t>(x.bits) << 16);
}
inline float to_float(f16 x) {
    return emulation::half_to_float(x.bits);
}
inline uint32_t pack(float low, float high, bf16) {
    return emulation::float_to_bf16(low) | static_cast<uint32_t>(emulation::float_to_bf16(high)) << 16;
}
inline uint32_t pack(float low, float high, f16) {
    return emulation::float_to_half(low) | static_cast<uint32_t>(emulation::float_to_half(high)) << 16;
}
inline Raw load16(const void* p) {
    return emulation::load16<Raw>(p);
}
inline Raw load16_table(const void* p) {
    return emulation::load16<Raw>(p);
}
inline void store16(void* p, Raw x) {
    emulation::store16(p, x);
}
inline float as_float(uint32_t bits) {
    return emulation::bits_float(bits);
}
inline uint32_t as_bits(float x) {
    return emulation::float_bits(x);
}
inline int cluster_rank() {
    return emulation::cluster_rank();
}
inline void cluster_sync() {
    emulation::cluster_sync();
}
template <class S>
S* cluster_peer(S* shared, int rank) {
    return emulation::cluster_peer(shared, rank);
}
template <class S>
S& block_shared() {
    return *reinterpret_cast<S*>(emulation::shared_memory(sizeof(S)));
}
template <class S>
S* dynamic_shared() {
    return reinterpret_cast<S*>(emulation::shared_memory(0));
}
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

__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 x) {
    return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ uint32_t pack(float low, float high, bf16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pack(float low, float high, f16) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
// Evict-first: a logit is read once, and the tables should stay in the first-level cache. Not the read-only path: the
// gradient may replace the logits.
__device__ __forceinline__ Raw load16(const void* p) {
    const uint4 x = __ldcs(static_cast<const uint4*>(p));
    return Raw{{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ Raw load16_table(const void* p) {
    const uint4 x = __ldg(static_cast<const uint4*>(p));
    return Raw{{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void store16(void* p, Raw x) {
    *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
__device__ __forceinline__ float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t as_bits(float x) {
    return __float_as_uint(x);
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
}
// The same shared variable in another block of the cluster.
template <class S>
__device__ __forceinline__ S* cluster_peer(S* shared, int rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
    return shared;
#endif
}
template <class S>
__device__ __forceinline__ S& block_shared() {
    __shared__ S shared;
    return shared;
}
template <class S>
__device__ __forceinline__ S* dynamic_shared() {
    extern __shared__ double ltk_dynamic_shared[];
    return reinterpret_cast<S*>(ltk_dynamic_shared);
}

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

// By element type: the arithmetic type; the vectors of 16 bytes that one thread holds; the registers that leaves for a
// thread of the main kernel: three blocks of 256 threads an SM for 16-bit logits, two for float32, whose loads are
// twice as many bytes a thread.
template <class T>
struct Traits {
    using Real = float;
    static constexpr int kHeld = 4, kRegisters = 80;
};
template <>
struct Traits<float> {
    using Real = float;
    static constexpr int kHeld = 8, kRegisters = 96;
};
template <>
struct Traits<double> {
    using Real = double;
    static constexpr int kHeld = 4, kRegisters = 128;
};
template <class T>
using real_t = typename Traits<T>::Real;
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ double as_double(uint32_t low, uint32_t high) {
    const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

__device__ __forceinline__ void unpack(const Raw& raw, float (&x)[4], float) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = as_float(raw.word[k]);
}
__device__ __forceinline__ void unpack(const Raw& raw, double (&x)[2], double) {
#pragma unroll
    for (int k = 0; k < 2; ++k) x[k] = as_double(raw.word[2 * k], raw.word[2 * k + 1]);
}
template <class T>
__device__ __forceinline__ void unpack(const Raw& raw, float (&x)[8], T) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        x[2 * k] = to_float(T{static_cast<uint16_t>(raw.word[k] & 0xffffu)});
        x[2 * k + 1] = to_float(T{static_cast<uint16_t>(raw.word[k] >> 16)});
    }
}
__device__ __forceinline__ Raw packed(const float (&x)[4], float) {
    return Raw{{as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}};
}
__device__ __forceinline__ Raw packed(const double (&x)[2], double) {
    Raw raw;
    memcpy(&raw, x, sizeof raw);
    return raw;
}
template <class T>
__device__ __forceinline__ Raw packed(const float (&x)[8], T type) {
    return Raw{{pack(x[0], x[1], type), pack(x[2], x[3], type), pack(x[4], x[5], type), pack(x[6], x[7], type)}};
}
// One element of a vector, for the ends of a row.
__device__ __forceinline__ void put_element(float* p, float x) {
    *p = x;
}
__device__ __forceinline__ void put_element(double* p, double x) {
    *p = x;
}
template <class T>
__device__ __forceinline__ void put_element(T* p, float x) {
    p->bits = static_cast<uint16_t>(pack(x, 0.0f, T{}) & 0xffffu);
}
__device__ __forceinline__ double get_element(const float* p) {
    return static_cast<double>(*p);
}
__device__ __forceinline__ double get_element(const double* p) {
    return *p;
}
template <class T>
__device__ __forceinline__ double get_element(const T* p) {
    return static_cast<double>(to_float(*p));
}

__device__ __forceinline__ float larger(float a, float b) {
    return fmaxf(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
    return fmax(a, b);
}
__device__ __forceinline__ float exp_real(float x) {
    return expf(x);
}
__device__ __forceinline__ double exp_real(double x) {
    return exp(x);
}
__device__ __forceinline__ float log_real(float x) {
    return logf(x);
}
__device__ __forceinline__ double log_real(double x) {
    return log(x);
}
__device__ __forceinline__ float log1p_real(float x) {
    return log1pf(x);
}
__device__ __forceinline__ double log1p_real(double x) {
    return log1p(x);
}
__device__ __forceinline__ float expm1_real(float x) {
    return expm1f(x);
}
__device__ __forceinline__ double expm1_real(double x) {
    return expm1(x);
}
__device__ __forceinline__ float pow_real(float x, float y) {
    return powf(x, y);
}
__device__ __forceinline__ double pow_real(double x, double y) {
    return pow(x, y);
}
__device__ __forceinline__ float abs_real(float x) {
    return fabsf(x);
}
__device__ __forceinline__ double abs_real(double x) {
    return fabs(x);
}

// exp of a difference that was formed in double. A float argument alone would lose |x| 2^-24 of relative accuracy, and
// double exponentials cost 64 times a float's on most devices.
__device__ __forceinline__ float exp_wide(double x, float) {
    const float high = static_cast<float>(x);
    const float e = expf(high);
    // At the infinite ends the remainder is NaN.
    return e == 0.0f || high == 0.0f ? e : e + e * static_cast<float>(x - static_cast<double>(high));
}
__device__ __forceinline__ double exp_wide(double x, double) {
    return exp(x);
}

}  // namespace cuda
}  // namespace ltk
