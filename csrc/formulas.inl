// Scalar formulas that the CPU and the CUDA kernels share. Who includes this says how functions are declared
// (LTK_FORMULA) and in which namespace they are (LTK_NAMESPACE): code of one instruction set may not serve another.
#include <cmath>
#include <cstdint>

#include "cpu/adjusted_ce.h"

namespace ltk {
namespace LTK_NAMESPACE {

// phi(l) = (1 - e^-l)^gamma l and its derivative. 1 - e^-l = -expm1(-l) is exact where e^-l rounds to 1.
template <class Real>
LTK_FORMULA void focal(Real gamma, Real l, Real* phi, Real* slope) noexcept {
    *phi = l;
    *slope = Real(1);
    if (gamma == Real(0)) return;
    const Real q = -std::expm1(-l);
    if (q <= Real(0)) {  // also the limit at l = 0 for every gamma > 0; a NaN falls through
        *phi = *slope = Real(0);
        return;
    }
    const Real power = std::pow(q, gamma), p = std::exp(-l);
    *phi = power * l;
    *slope = power + (p > Real(0) ? gamma * l * p * power / q : Real(0));
}

// ArcFace, Deng et al. 2019, equation 3: cos(theta + m) = c cos m - sin theta sin m where theta + m <= pi, and beyond
// that the line c - m sin m. Its slope sin(theta + m) / sin(theta) grows without bound towards c = 1: sin theta counts
// as 1e-3 at least there, as 1e-7 beside float64, whose cosines tell smaller angles apart.
template <class Real>
LTK_FORMULA void arcface(const ClosedForm& closed, double c, double* value, double* slope) noexcept {
    constexpr bool fine = sizeof(Real) == sizeof(double);
    constexpr double floor = fine ? 1e-7 : 1e-3;
    const double cos_m = closed.options[0], sin_m = closed.options[1];
    if (c <= -cos_m) {
        *value = c - std::atan2(sin_m, cos_m) * sin_m;
        *slope = 1.0;
    } else {
        double square = 1.0 - c * c;
        if (fine && square < 1e-6) square = (1.0 - c) * (1.0 + c);  // the difference would keep few digits
        const double sine = square > 0.0 ? std::sqrt(square) : 0.0;
        *value = c * cos_m - sine * sin_m;  // NaN for NaN
        *slope = cos_m + c / (sine > floor ? sine : floor) * sin_m;
    }
    if (closed.options[2] != 0.0) *slope = 1.0;
}

// Softmax equalization, Tan et al. 2020: the random number is a function of (seed, row, class), so every call with one
// seed draws the same mask; losses/_terms.py has its twin. lowbias32 of Chris Wellons' hash prospector: a bijection of
// 32 bits without measurable bias; 24 of them decide, an int32 comparison with room for the probability 1.
LTK_FORMULA uint32_t mix32(uint32_t x) noexcept {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
LTK_FORMULA uint32_t equalization_key(int64_t signed_seed, int64_t row) noexcept {
    const uint64_t seed = static_cast<uint64_t>(signed_seed);
    return mix32(mix32(mix32(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32)) ^
                 static_cast<uint32_t>(row));
}
LTK_FORMULA int32_t equalization_limit(const ClosedForm& closed) noexcept {
    return static_cast<int32_t>(std::rint(closed.options[0] * 16777216.0));
}
LTK_FORMULA bool equalization_draws(uint32_t key, int64_t j, int32_t limit) noexcept {
    const uint32_t draw = mix32(mix32(static_cast<uint32_t>(j) + 0x9e3779b9u) ^ key);
    return static_cast<int32_t>(draw >> 8) < limit;
}

// Gaussian clouded logits, Li et al. 2022: the size of a normal number in units of three standard deviations.
// Box and Muller's formula with the angle in the first quadrant, since the sign is dropped; both uniform
// numbers come of the hash above.
LTK_FORMULA double cloud_size(uint32_t key, int64_t j) noexcept {
    const uint32_t first = mix32(mix32(static_cast<uint32_t>(j) + 0x9e3779b9u) ^ key);
    const uint32_t second = mix32(first + 0x9e3779b9u);
    const double u = static_cast<double>((first >> 8) + 1) * 0x1p-24, v = static_cast<double>(second >> 8) * 0x1p-24;
    return std::sqrt(-2.0 * std::log(u)) * std::sin(1.57079632679489662 * v) / 3.0;
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
