// The words that differ between a GPU and the host emulation (tests/cuda_host/emulation.h), which runs the very same
// kernels under g++: 16-bit conversions, 16-byte accesses, thread-block clusters, shared memory; launch.cuh has what
// the host says. Everything else in this folder is plain CUDA C++ that both understand.
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
inline void store16_apart(void* p, Raw x) {
    emulation::store16(p, x);
}
inline float as_float(uint32_t bits) {
    return emulation::bits_float(bits);
}
inline uint32_t as_bits(float x) {
    return emulation::float_bits(x);
}
inline float exp2_flushed(float x) {
    return std::exp2(x);
}
inline float inverse_of(float x) {
    return 1.0f / x;
}
inline int cluster_rank() {
    return emulation::cluster_rank();
}
inline void cluster_arrive() {
    emulation::cluster_arrive();
}
inline void cluster_wait() {
    emulation::cluster_wait();
}
inline void wait_for_first_launch() {}
inline void begin_second_launch() {}
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
// store16 that stays one whatever is stored to the same place in another branch.
__device__ __forceinline__ void store16_apart(void* p, Raw x) {
    const uint32_t* w = x.word;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
}
__device__ __forceinline__ float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t as_bits(float x) {
    return __float_as_uint(x);
}
// 2^x; denormal results are 0.
__device__ __forceinline__ float exp2_flushed(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, off by one in the last place.
__device__ __forceinline__ float inverse_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().barrier_wait();
#endif
}
// The rows' launch begins while the launch before it runs, and waits here for what that one writes.
__device__ __forceinline__ void wait_for_first_launch() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}
__device__ __forceinline__ void begin_second_launch() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
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

#endif

}  // namespace cuda
}  // namespace ltk
