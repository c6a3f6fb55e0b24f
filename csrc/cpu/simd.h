// The vector types of one instruction set, inside the namespace that the including file names. A lane type has
//   Real, Reg, Mask, N             element, register, lane mask, lanes
//   all(), first(n), without(m, l) masks: every lane, the first n, m less lane l. all() is of a type of its own: a
//   masked
//                                  store costs some processors of AVX2 ten times a plain one, whatever the mask says
//   load<T>(p, m), store<T>(p, x, m)  T in memory, Real in the register; inactive lanes load 0 and are neither read nor
//                                     written
//   stream<T>(p, x)                   store of all lanes past the caches, where p has no unaligned<T>(p) elements to go
//   exp(x)                            see below
// F32 serves float32, bfloat16 and float16 logits; F64 (one lane, libm) serves float64, where any speed will do.
//
// F32::exp, for x <= 88: at most 1 ULP from the correctly rounded value for -86.5 <= x; exactly 0 below that
// (exp(-86.5) = 2.7e-38 is next to the smallest normal float, and denormals cost a hundred cycles each); NaN for NaN.
// tests/test_simd.py holds the number.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Forced, and so done before scalar replacement: left to GCC, the loops' lambdas kept their accumulators in memory, and
// a row took a third longer.
#define LTK_INLINE static inline __attribute__((always_inline))
#define LTK_INLINE_LAMBDA __attribute__((always_inline))

namespace ltk {
namespace LTK_NAMESPACE {

struct bf16 {
    uint16_t bits;
};
#if defined(__aarch64__)
using f16 = __fp16;  // GCC 12 has no _Float16 for C++ there
#else
using f16 = _Float16;
#endif

// Memory takes some hundred cycles to answer, a vector's exponentials ten: this far ahead of the loads, in bytes. Past
// the end of the logits it does nothing.
constexpr int64_t kPrefetch = 4096;
template <class T>
static inline void prefetch(const T* p) noexcept {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetch);
}

// Elements before the next multiple of `bytes`.
template <class T>
static inline int64_t to_multiple(const T* p, int64_t bytes) noexcept {
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) & static_cast<uintptr_t>(bytes - 1)) /
           static_cast<int64_t>(sizeof(T));
}

struct AllLanes {};

constexpr float kExpFlush = -86.5f;
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693145752f;  // 16 significant bits: a product with an integer exponent is exact
constexpr float kLn2Low = 1.42860677e-6f;
// (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, minimax for the relative error of e^r: 3.1e-9.
constexpr float kExp2 = 0.49999994f, kExp3 = 0.1666652f, kExp4 = 0.0416684f, kExp5 = 0.00836885162f,
                kExp6 = 0.00138143182f;
constexpr float kRoundMagic =
    12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits

static inline float to_float(bf16 x) noexcept {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
static inline float to_float(f16 x) noexcept {
    return static_cast<float>(x);
}

static inline void from_float(float x, bf16* y) noexcept {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void from_float(float x, f16* y) noexcept {
    *y = static_cast<f16>(x);
}

#if defined(__AVX512F__)

struct F32 {
    using Real = float;
    using Reg = __m512;
    using Mask = __mmask16;
    static constexpr int N = 16;

    static AllLanes all() noexcept { return {}; }
    static Mask first(int64_t n) noexcept { return static_cast<Mask>((1u << n) - 1u); }
    static Mask without(Mask m, int64_t lane) noexcept { return static_cast<Mask>(m & ~(1u << lane)); }
    static Mask without(AllLanes, int64_t lane) noexcept { return without(Mask{0xffff}, lane); }
    static Reg set(float x) noexcept { return _mm512_set1_ps(x); }
    static Reg add(Reg a, Reg b) noexcept { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) noexcept { return _mm512_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) noexcept { return _mm512_mul_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm512_fmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) noexcept { return _mm512_max_ps(a, b); }
    static Reg sqrt(Reg a) noexcept { return _mm512_sqrt_ps(a); }
    static Reg select(Mask m, Reg a, Reg b) noexcept { return _mm512_mask_blend_ps(m, b, a); }
    static Reg select(AllLanes, Reg a, Reg) noexcept { return a; }
    static float horizontal_max(Reg a) noexcept { return _mm512_reduce_max_ps(a); }
    static float horizontal_sum(Reg a) noexcept { return _mm512_reduce_add_ps(a); }

    static Reg load(const float* p, Mask m) noexcept { return _mm512_maskz_loadu_ps(m, p); }
    static Reg load(const bf16* p, Mask m) noexcept {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
    }
    static Reg load(const f16* p, Mask m) noexcept { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
    static Reg load(const uint8_t* p, Mask m) noexcept {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p)));
    }
    template <class T>
    static Reg load(const T* p, AllLanes) noexcept {
        return load(p, Mask{0xffff});
    }
    static Reg load(const float* p, AllLanes) noexcept { return _mm512_loadu_ps(p); }
    template <class T>
    static void store(T* p, Reg x, AllLanes) noexcept {
        store(p, x, Mask{0xffff});
    }
    static void store(float* p, Reg x, AllLanes) noexcept { _mm512_storeu_ps(p, x); }
    static void store(float* p, Reg x, Mask m) noexcept { _mm512_mask_storeu_ps(p, m, x); }
    static __m256i round_bf16(Reg x) noexcept {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded =
            _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
        rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc0));
        return _mm512_cvtepi32_epi16(rounded);
    }
    static void store(bf16* p, Reg x, Mask m) noexcept { _mm256_mask_storeu_epi16(p, m, round_bf16(x)); }
    static void store(f16* p, Reg x, Mask m) noexcept {
        _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    template <class T>
    static int64_t unaligned(const T* p) noexcept {
        return to_multiple(p, N * static_cast<int64_t>(sizeof(T)));
    }
    static void stream(float* p, Reg x) noexcept { _mm512_stream_ps(p, x); }
    static void stream(bf16* p, Reg x) noexcept { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
    static void stream(f16* p, Reg x) noexcept {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static Reg exp(Reg x) noexcept {
        const Mask keep = _mm512_cmp_ps_mask(x, set(kExpFlush), _CMP_NLT_UQ);  // true for NaN
        const Reg shifted = fma(x, set(kLog2e), set(kRoundMagic));
        const Reg n = sub(shifted, set(kRoundMagic));
        Reg r = _mm512_fnmadd_ps(n, set(kLn2High), x);
        r = _mm512_fnmadd_ps(n, set(kLn2Low), r);
        Reg q = fma(set(kExp6), r, set(kExp5));
        q = fma(q, r, set(kExp4));
        q = fma(q, r, set(kExp3));
        q = fma(q, r, set(kExp2));
        const Reg p = add(set(1.0f), fma(mul(r, r), q, r));
        return _mm512_maskz_scalef_ps(keep, p, n);
    }
};

#elif defined(__AVX2__)

struct F32 {
    using Real = float;
    using Reg = __m256;
    using Mask = __m256i;
    static constexpr int N = 8;

    static AllLanes all() noexcept { return {}; }
    static Mask first(int64_t n) noexcept {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Mask without(Mask m, int64_t lane) noexcept {
        return _mm256_andnot_si256(
            _mm256_cmpeq_epi32(_mm256_set1_epi32(static_cast<int>(lane)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            m);
    }
    static Mask without(AllLanes, int64_t lane) noexcept { return without(_mm256_set1_epi32(-1), lane); }
    static Reg set(float x) noexcept { return _mm256_set1_ps(x); }
    static Reg add(Reg a, Reg b) noexcept { return _mm256_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) noexcept { return _mm256_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) noexcept { return _mm256_mul_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm256_fmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) noexcept { return _mm256_max_ps(a, b); }
    static Reg sqrt(Reg a) noexcept { return _mm256_sqrt_ps(a); }
    static Reg select(Mask m, Reg a, Reg b) noexcept { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
    static Reg select(AllLanes, Reg a, Reg) noexcept { return a; }
    static float horizontal_max(Reg a) noexcept {
        __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
    }
    static float horizontal_sum(Reg a) noexcept {
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
    }

    // AVX2 has no masked access to 16-bit lanes: a partial vector goes through the stack, element by element.
    template <class T>
    static __m128i gather16(const T* p, Mask m) noexcept {
        alignas(16) uint16_t lanes[N] = {};
        const int active = _mm256_movemask_ps(_mm256_castsi256_ps(m));
        for (int i = 0; i < N; ++i)
            if (active >> i & 1) std::memcpy(&lanes[i], p + i, 2);
        return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
    }
    template <class T>
    static __m128i gather16(const T* p, AllLanes) noexcept {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
    template <class T>
    static void scatter16(T* p, __m128i x, AllLanes) noexcept {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    }
    template <class T>
    static void scatter16(T* p, __m128i x, Mask m) noexcept {
        const int active = _mm256_movemask_ps(_mm256_castsi256_ps(m));
        alignas(16) uint16_t lanes[N];
        _mm_store_si128(reinterpret_cast<__m128i*>(lanes), x);
        for (int i = 0; i < N; ++i)
            if (active >> i & 1) std::memcpy(p + i, &lanes[i], 2);
    }
    static Reg load(const float* p, Mask m) noexcept { return _mm256_maskload_ps(p, m); }
    static Reg load(const float* p, AllLanes) noexcept { return _mm256_loadu_ps(p); }
    template <class M>
    static Reg load(const bf16* p, M m) noexcept {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(gather16(p, m)), 16));
    }
    template <class M>
    static Reg load(const f16* p, M m) noexcept {
        return _mm256_cvtph_ps(gather16(p, m));
    }
    static Reg load(const uint8_t* p, AllLanes) noexcept {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static Reg load(const uint8_t* p, Mask m) noexcept {
        alignas(16) uint8_t lanes[16] = {};
        const int active = _mm256_movemask_ps(_mm256_castsi256_ps(m));
        for (int i = 0; i < N; ++i)
            if (active >> i & 1) lanes[i] = p[i];
        return load(lanes, all());
    }
    static void store(float* p, Reg x, Mask m) noexcept { _mm256_maskstore_ps(p, m, x); }
    static void store(float* p, Reg x, AllLanes) noexcept { _mm256_storeu_ps(p, x); }
    static __m128i round_bf16(Reg x) noexcept {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0),
                                     _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
        return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    template <class M>
    static void store(bf16* p, Reg x, M m) noexcept {
        scatter16(p, round_bf16(x), m);
    }
    template <class M>
    static void store(f16* p, Reg x, M m) noexcept {
        scatter16(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), m);
    }
    template <class T>
    static int64_t unaligned(const T* p) noexcept {
        return to_multiple(p, N * static_cast<int64_t>(sizeof(T)));
    }
    static void stream(float* p, Reg x) noexcept { _mm256_stream_ps(p, x); }
    static void stream(bf16* p, Reg x) noexcept { _mm_stream_si128(reinterpret_cast<__m128i*>(p), round_bf16(x)); }
    static void stream(f16* p, Reg x) noexcept {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static Reg exp(Reg x) noexcept {
        const Reg keep = _mm256_cmp_ps(x, set(kExpFlush), _CMP_NLT_UQ);  // true for NaN
        const Reg shifted = fma(x, set(kLog2e), set(kRoundMagic));
        const Reg n = sub(shifted, set(kRoundMagic));
        Reg r = _mm256_fnmadd_ps(n, set(kLn2High), x);
        r = _mm256_fnmadd_ps(n, set(kLn2Low), r);
        Reg q = fma(set(kExp6), r, set(kExp5));
        q = fma(q, r, set(kExp4));
        q = fma(q, r, set(kExp3));
        q = fma(q, r, set(kExp2));
        const Reg p = add(set(1.0f), fma(mul(r, r), q, r));
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        const Reg y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
        return _mm256_blendv_ps(_mm256_and_ps(y, keep), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
};

#else

// Any processor: four lanes of the compiler's own vector types (SSE2, NEON).
struct F32 {
    using Real = float;
    typedef float Reg __attribute__((vector_size(16)));
    typedef int32_t Mask __attribute__((vector_size(16)));
    static constexpr int N = 4;

    static AllLanes all() noexcept { return {}; }
    static Mask first(int64_t n) noexcept {
        const int32_t k = static_cast<int32_t>(n);
        return Mask{k, k, k, k} > Mask{0, 1, 2, 3};
    }
    static Mask without(Mask m, int64_t lane) noexcept {
        const int32_t k = static_cast<int32_t>(lane);
        return m & (Mask{k, k, k, k} != Mask{0, 1, 2, 3});
    }
    static Mask without(AllLanes, int64_t lane) noexcept { return without(Mask{-1, -1, -1, -1}, lane); }
    static Reg set(float x) noexcept { return Reg{x, x, x, x}; }
    static Reg add(Reg a, Reg b) noexcept { return a + b; }
    static Reg sub(Reg a, Reg b) noexcept { return a - b; }
    static Reg mul(Reg a, Reg b) noexcept { return a * b; }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return a * b + c; }
    static Reg max(Reg a, Reg b) noexcept { return a > b ? a : b; }
    static Reg sqrt(Reg a) noexcept { return Reg{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
    static Reg select(Mask m, Reg a, Reg b) noexcept { return m ? a : b; }
    static Reg select(AllLanes, Reg a, Reg) noexcept { return a; }
    static float horizontal_max(Reg a) noexcept {
        const float x = a[0] > a[1] ? a[0] : a[1];
        const float y = a[2] > a[3] ? a[2] : a[3];
        return x > y ? x : y;
    }
    static float horizontal_sum(Reg a) noexcept { return (a[0] + a[2]) + (a[1] + a[3]); }

    static float widen(float x) noexcept { return x; }
    static float widen(uint8_t x) noexcept { return static_cast<float>(x); }
    template <class T>
    static float widen(T x) noexcept {
        return to_float(x);
    }
    static void narrow(float x, float* y) noexcept { *y = x; }
    template <class T>
    static void narrow(float x, T* y) noexcept {
        from_float(x, y);
    }
    template <class T>
    static Reg load(const T* p, Mask m) noexcept {
        Reg x = {};
        for (int i = 0; i < N; ++i)
            if (m[i]) x[i] = widen(p[i]);
        return x;
    }
    template <class T>
    static void store(T* p, Reg x, Mask m) noexcept {
        for (int i = 0; i < N; ++i)
            if (m[i]) narrow(x[i], p + i);
    }
    template <class T>
    static Reg load(const T* p, AllLanes) noexcept {
        Reg x = {};
        for (int i = 0; i < N; ++i) x[i] = widen(p[i]);
        return x;
    }
    template <class T>
    static void store(T* p, Reg x, AllLanes) noexcept {
        for (int i = 0; i < N; ++i) narrow(x[i], p + i);
    }
    // No store past the caches here.
    template <class T>
    static int64_t unaligned(const T*) noexcept {
        return 0;
    }
    template <class T>
    static void stream(T* p, Reg x) noexcept {
        store(p, x, all());
    }

    static Reg exp(Reg x) noexcept {
        const Mask keep = !(x < kExpFlush);  // true for NaN
        const Reg shifted = x * kLog2e + kRoundMagic;
        const Reg n = shifted - kRoundMagic;
        const Reg r = (x - n * kLn2High) - n * kLn2Low;
        const Reg q = (((kExp6 * r + kExp5) * r + kExp4) * r + kExp3) * r + kExp2;
        const Reg p = 1.0f + (r * r * q + r);
        Mask bits, exponent;
        std::memcpy(&bits, &p, sizeof bits);
        std::memcpy(&exponent, &shifted, sizeof exponent);
        bits += exponent << 23;
        Reg y;
        std::memcpy(&y, &bits, sizeof y);
        return x != x ? x : (keep ? y : Reg{});
    }
};

#endif

struct F64 {
    using Real = double;
    using Reg = double;
    using Mask = bool;
    static constexpr int N = 1;

    static AllLanes all() noexcept { return {}; }
    static Mask first(int64_t n) noexcept { return n > 0; }
    static Mask without(Mask, int64_t) noexcept { return false; }
    static Mask without(AllLanes, int64_t) noexcept { return false; }
    static Reg set(double x) noexcept { return x; }
    static Reg add(Reg a, Reg b) noexcept { return a + b; }
    static Reg sub(Reg a, Reg b) noexcept { return a - b; }
    static Reg mul(Reg a, Reg b) noexcept { return a * b; }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return a * b + c; }
    static Reg max(Reg a, Reg b) noexcept { return a > b ? a : b; }
    static Reg sqrt(Reg a) noexcept { return std::sqrt(a); }
    static Reg select(Mask m, Reg a, Reg b) noexcept { return m ? a : b; }
    static Reg select(AllLanes, Reg a, Reg) noexcept { return a; }
    static double horizontal_max(Reg a) noexcept { return a; }
    static double horizontal_sum(Reg a) noexcept { return a; }
    static Reg load(const double* p, Mask m) noexcept { return m ? *p : 0.0; }
    static void store(double* p, Reg x, Mask m) noexcept {
        if (m) *p = x;
    }
    static Reg load(const double* p, AllLanes) noexcept { return *p; }
    template <class T>
    static Reg load(const T* p, Mask m) noexcept {
        return m ? static_cast<double>(*p) : 0.0;
    }
    template <class T>
    static Reg load(const T* p, AllLanes) noexcept {
        return static_cast<double>(*p);
    }
    static void store(double* p, Reg x, AllLanes) noexcept { *p = x; }
    // No store past the caches here.
    template <class T>
    static int64_t unaligned(const T*) noexcept {
        return 0;
    }
    template <class T>
    static void stream(T* p, Reg x) noexcept {
        store(p, x, all());
    }
    static Reg exp(Reg x) noexcept { return std::exp(x); }
};

// Calls f(j, mask) for the vectors of [begin, end).
template <class V, class F>
LTK_INLINE void each_vector(int64_t begin, int64_t end, F f) noexcept {
    int64_t j = begin;
    for (; j + V::N <= end; j += V::N) f(j, V::all());
    if (j < end) f(j, V::first(end - j));
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
