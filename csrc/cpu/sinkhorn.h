// Balanced soft labels: all iterations of the entropic transport problem with given column sums in one call.
#pragma once
#include <cstdint>

namespace ltk {

// "real" is float or double throughout. Labels come out as rows of the plan times `rows`: each row sums to 1.
struct Sinkhorn {
    const void* similarities;  // rows x classes real, unit class stride, finite
    int64_t stride;
    int64_t rows;
    int64_t classes;
    const double* prior;  // (classes,) above 0, summing to 1
    double inverse;       // 1 / epsilon
    double tolerance;     // of the sum over the classes of |column sum - prior|
    int64_t limit;        // iterations at most
    void* labels;         // (rows, classes) out, contiguous
    double* potential;    // (classes,) scratch
    void* shift;          // (classes,) real scratch
    double* columns;      // (classes,) scratch
    double error;         // out
    int64_t iterations;   // out
};

// labels_ij = softmax over j of (inverse s_ij + shift_j) for one row.
template <class Real>
using SinkhornRow = void (*)(const Real* s, const Real* shift, Real inverse, int64_t classes, Real* out) noexcept;

void sinkhorn(Sinkhorn& job, bool single) noexcept;

}  // namespace ltk
