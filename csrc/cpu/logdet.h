// Batched log-determinants of small symmetric positive definite matrices, float64.
#pragma once
#include <cstdint>

namespace ltk {

// Subsets or matrices of one size travel together, one per lane of a 64-byte pack: eight of float64, sixteen of
// float32. The numbers are the same for every ISA: they are a memory layout, and a result does not depend on which lane
// or thread it came from.
template <class Real>
constexpr int64_t kLanes = 64 / sizeof(Real);

// Doubles of scratch that one thread needs.
constexpr int64_t logdet_scratch(int64_t n) {
    return n * n * kLanes<double>;
}

// out[i] = log det of matrix i (n x n, row-major, contiguous, at `matrices + i * n * n`; only the lower triangle is
// read) for i in [begin, end), by LDL^T. NaN where a pivot is not positive. Relative error of det: about n * 2^-52
// times the condition number.
using LogdetBatch = void (*)(const double* matrices, int64_t n, int64_t begin, int64_t end, double* scratch,
                             double* out) noexcept;

// The whole batch over at most `threads` threads; `scratch` holds threads * logdet_scratch(n) doubles.
void logdet_batch(const double* matrices, int64_t batch, int64_t n, double* scratch, double* out, int threads) noexcept;

}  // namespace ltk
