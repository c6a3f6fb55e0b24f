// One row of logits: vectors of 16 bytes, every one an aligned access whatever the number of classes, and at either end
// fewer logits than a vector has, read and written one by one, so that nothing outside the row is touched.
#pragma once
#include "element.cuh"
#include "job.h"

namespace ltk {
namespace cuda {

template <class T, class Index>
struct Row {
    using Real = real_t<T>;
    static constexpr int kN = kVec<T>, kWidth = 16 / static_cast<int>(sizeof(Real));

    __device__ __forceinline__ Row(const void* logits, void* gradient, int64_t columns, bool inside)
        : z(static_cast<const T*>(logits)), grad(static_cast<T*>(gradient)) {
        const unsigned offset = static_cast<unsigned>(reinterpret_cast<uintptr_t>(z)) & 15u;
        const Index classes = inside ? static_cast<Index>(columns) : 0;
        head = static_cast<int>((16u - offset) & 15u) / static_cast<int>(sizeof(T));
        if (head > classes) head = static_cast<int>(classes);
        vectors = (classes - head) / kN;
        ends = static_cast<int>(classes - vectors * kN);
        behind = vectors * kN;
        together = (static_cast<unsigned>(reinterpret_cast<uintptr_t>(grad)) & 15u) == offset;
    }
    __device__ __forceinline__ Index column(Index v) const { return v * kN + head; }
    __device__ __forceinline__ Index end(Index e) const { return e < head ? e : behind + e; }

    __device__ __forceinline__ Raw load(Index v) const { return load16(z + column(v)); }
    __device__ __forceinline__ Real element(Index j) const { return static_cast<Real>(get_element(z + j)); }

    // The copy of a table in which this row's vectors are aligned; null where there is no table.
    __device__ __forceinline__ const Real* copy(const Table& table) const {
        if (table.copies == nullptr) return static_cast<const Real*>(table.source);
        return static_cast<const Real*>(table.copies) + (-head & (kWidth - 1)) * table.step;
    }
    // Entries of such a copy for a vector's columns, and for one column.
    static __device__ __forceinline__ void read(const Real* copy, Index j, Real (&t)[kN]) {
#pragma unroll
        for (int q = 0; q < kN / kWidth; ++q) {
            Real part[kWidth];
            unpack(load16_table(copy + j + q * kWidth), part, Real());
#pragma unroll
            for (int k = 0; k < kWidth; ++k) t[q * kWidth + k] = part[k];
        }
    }
    static __device__ __forceinline__ void read(const Real* copy, Index j, Real (&t)[1]) { t[0] = __ldg(copy + j); }

    // kApart: for where the compiler would make single stores of both to join them.
    template <bool kApart = false>
    __device__ __forceinline__ void store(Index j, const Real (&y)[kN]) const {
        if (together) return (kApart ? store16_apart : store16)(grad + j, packed(y, T()));
#pragma unroll
        for (int k = 0; k < kN; ++k) put_element(grad + j + k, y[k]);
    }
    template <bool kApart = false>
    __device__ __forceinline__ void store(Index j, const Real (&y)[1]) const {
        put_element(grad + j, y[0]);
    }

    // f(first column, logits) for the vectors and the ends of one of `members` threads, `kFlight` loads at a time.
    template <int kFlight, class F>
    __device__ __forceinline__ void stream(Index member, Index members, F f) const {
        for (Index base = member; base < vectors; base += kFlight * members) {
            Raw raw[kFlight];
#pragma unroll
            for (int k = 0; k < kFlight; ++k)
                if (base + k * members < vectors) raw[k] = load(base + k * members);
#pragma unroll
            for (int k = 0; k < kFlight; ++k) {
                if (base + k * members >= vectors) break;
                Real x[kN];
                unpack(raw[k], x, T());
                f(column(base + k * members), x);
            }
        }
        for (Index e = member; e < ends; e += members) {
            Real x[1] = {element(end(e))};
            f(end(e), x);
        }
    }

    // The same gradient for the whole row.
    __device__ __forceinline__ void fill(Index member, Index members, Real value) const {
        Real y[kN], one[1] = {value};
#pragma unroll
        for (int k = 0; k < kN; ++k) y[k] = value;
        for (Index v = member; v < vectors; v += members) store(column(v), y);
        for (Index e = member; e < ends; e += members) store(end(e), one);
    }

    const T* z;
    T* grad;
    Index vectors, behind;  // behind: columns in vectors, so that an end behind them is column behind + e
    int head, ends;
    bool together;  // the gradient has the same distance to a 16-byte boundary
};

// Elements of an array, for functions of vectors and single elements alike: kExtent<decltype(x)>.
template <class Array>
constexpr int kExtent = static_cast<int>(std::extent_v<std::remove_reference_t<Array>>);
template <class Array>
__device__ __forceinline__ auto total_of(const Array& e) {
    if constexpr (kExtent<Array> == 1) return e[0];
    if constexpr (kExtent<Array> == 2) return e[0] + e[1];
    if constexpr (kExtent<Array> == 4) return (e[0] + e[1]) + (e[2] + e[3]);
    if constexpr (kExtent<Array> == 8) return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
}

}  // namespace cuda
}  // namespace ltk
