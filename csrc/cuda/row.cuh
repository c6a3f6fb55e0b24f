// One row of logits as 16-byte vectors. Vector v holds the columns [v kVec - phase, (v + 1) kVec - phase), where phase
// is the row's offset from a 16-byte boundary: every vector but the two ends is one aligned access, whatever the number
// of classes. The ends are read and written element by element, so that nothing outside the row is touched.
#pragma once
#include "element.cuh"

namespace ltk {
namespace cuda {

template <class T, class Index>
struct Row {
    using Real = real_t<T>;
    static constexpr int kN = kVec<T>;

    __device__ __forceinline__ Row(const void* logits, void* gradient, int64_t columns, bool inside)
        : z(static_cast<const T*>(logits)), grad(static_cast<T*>(gradient)), classes(static_cast<Index>(columns)) {
        const unsigned offset = static_cast<unsigned>(reinterpret_cast<uintptr_t>(z)) & 15u;
        phase = static_cast<int>(offset / sizeof(T));
        vectors = inside ? (classes + phase + kN - 1) / kN : 0;
        same_phase = (static_cast<unsigned>(reinterpret_cast<uintptr_t>(grad)) & 15u) == offset;
    }
    __device__ __forceinline__ Index first(Index v) const { return v * kN - phase; }
    __device__ __forceinline__ bool full(Index j) const { return j >= 0 && j + kN <= classes; }
    __device__ __forceinline__ bool valid(Index j) const { return j >= 0 && j < classes; }

    // Columns outside the row are 0.
    __device__ __forceinline__ Raw fetch(Index v) const {
        const Index j = first(v);
        if (full(j)) return load16(z + j);
        Raw raw{{0u, 0u, 0u, 0u}};
#pragma unroll
        for (int k = 0; k < kN; ++k) {
            if (!valid(j + k)) continue;
            if constexpr (sizeof(T) == 2) {
                raw.word[k / 2] |= static_cast<uint32_t>(z[j + k].bits) << (16 * (k & 1));
            } else if constexpr (sizeof(T) == 4) {
                raw.word[k] = as_bits(z[j + k]);
            } else {
                uint64_t bits;
                const T element = z[j + k];
                memcpy(&bits, &element, sizeof bits);
                raw.word[2 * k] = static_cast<uint32_t>(bits);
                raw.word[2 * k + 1] = static_cast<uint32_t>(bits >> 32);
            }
        }
        return raw;
    }

    // f(k, entry of the table for column j + k). A row of odd phase finds the table at any offset: it reads one vector
    // more and shifts, because single reads would cost more first-level cache cycles than the row has.
    template <class F>
    __device__ __forceinline__ void table(const Real* values, Index j, F f) const {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(Real));
        if (j < kWidth || j + kN + kWidth > classes) {
#pragma unroll
            for (int k = 0; k < kN; ++k)
                if (valid(j + k)) f(k, __ldg(values + j + k));
            return;
        }
        const Real* at = values + j;
        const int shift = static_cast<int>((reinterpret_cast<uintptr_t>(at) & 15u) / sizeof(Real));
        at -= shift;
        Real line[2 * kWidth];
        take(at, line, 0);
#pragma unroll
        for (int q = 0; q < kN / kWidth; ++q) {
            if (q + 1 < kN / kWidth || shift != 0) take(at + (q + 1) * kWidth, line, kWidth);
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                Real t = line[k];
                if (shift == 1) t = line[k + 1];
                if constexpr (kWidth == 4) {
                    if (shift == 2) t = line[k + 2];
                    if (shift == 3) t = line[k + 3];
                }
                f(q * kWidth + k, t);
            }
#pragma unroll
            for (int k = 0; k < kWidth; ++k) line[k] = line[k + kWidth];
        }
    }
    static __device__ __forceinline__ void take(const Real* at, Real* line, int first) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(Real));
        Real part[kWidth];
        unpack(load16_table(at), part, Real());
#pragma unroll
        for (int k = 0; k < kWidth; ++k) line[first + k] = part[k];
    }

    __device__ __forceinline__ void store(Index j, const Real (&y)[kN]) const {
        if (same_phase && full(j)) {
            store16(grad + j, packed(y, T()));
            return;
        }
#pragma unroll
        for (int k = 0; k < kN; ++k)
            if (valid(j + k)) put_element(grad + j + k, y[k]);
    }

    const T* z;
    T* grad;
    Index classes, vectors;
    int phase;
    bool same_phase;
};

}  // namespace cuda
}  // namespace ltk
