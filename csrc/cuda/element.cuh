// By element type: arithmetic, vectors of 16 bytes, and the functions of one name for float and double.
#pragma once
#include "portable.cuh"

namespace ltk {
namespace cuda {

// By element type: the arithmetic type; how many vectors of 16 bytes of a row, and of the logits beside them (row.cuh),
// one thread holds, with several terms a row fewer; the registers that leaves for a thread of the main kernel; the
// threads of a block in a cluster. 16-bit logits cost more instructions a byte, so a thread does 64 of them for what a
// row costs it once: four blocks of 128 threads an SM. float32: three blocks of 256 threads.
template <class T>
struct Traits {
    using Real = float;
    static constexpr int kHeld = 8, kHeldTerms = 4, kEnds = 2, kRegisters = 128, kClusterBlock = 128;
};
template <>
struct Traits<float> {
    using Real = float;
    static constexpr int kHeld = 8, kHeldTerms = 8, kEnds = 2, kRegisters = 80, kClusterBlock = 256;
};
template <>
struct Traits<double> {
    using Real = double;
    static constexpr int kHeld = 4, kHeldTerms = 4, kEnds = 1, kRegisters = 128, kClusterBlock = 256;
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
template <class T>
__device__ __forceinline__ void put_element(T* p, real_t<T> x) {
    if constexpr (sizeof(T) == 2)
        p->bits = static_cast<uint16_t>(pack(x, 0.0f, T{}) & 0xffffu);
    else
        *p = x;
}
template <class T>
__device__ __forceinline__ double get_element(const T* p) {
    if constexpr (sizeof(T) == 2)
        return static_cast<double>(to_float(*p));
    else
        return static_cast<double>(*p);
}

template <class Real>
__device__ __forceinline__ Real larger(Real x, Real y) {
    return std::fmax(x, y);
}
template <class Real>
__device__ __forceinline__ Real exp_real(Real x) {
    return std::exp(x);
}
template <class Real>
__device__ __forceinline__ Real log_real(Real x) {
    return std::log(x);
}
template <class Real>
__device__ __forceinline__ Real log1p_real(Real x) {
    return std::log1p(x);
}
// log(1 + t) for t in [0, 1]; float: t times a polynomial with a relative error of 3e-8, in its evaluation 1.8e-7.
__device__ __forceinline__ float log1p_unit(float t) {
    constexpr float c[] = {0.99999994f,  -0.49999493f, 0.33319098f,   -0.24842982f, 0.19106007f,
                           -0.13663246f, 0.078225955f, -0.029505238f, 0.005232694f};
    float p = c[8];
#pragma unroll
    for (int k = 7; k >= 0; --k) p = std::fma(p, t, c[k]);
    return p * t;
}
__device__ __forceinline__ double log1p_unit(double t) {
    return std::log1p(t);
}
__device__ __forceinline__ double inverse_of(double x) {
    return 1.0 / x;
}
// exp beside logits of type T: what is rounded to 16 bits in the end takes the two instructions of the base-2 unit.
template <class T>
__device__ __forceinline__ real_t<T> exp_for(real_t<T> x) {
    if constexpr (sizeof(T) == 2)
        return exp2_flushed(x * 1.4426950408889634f);
    else
        return exp_real(x);
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
