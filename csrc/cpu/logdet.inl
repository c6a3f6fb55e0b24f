// Body of logdet.h: eight matrices at a time, one per lane, so that the recurrences run over lanes and nothing is
// summed across them.
#include <cmath>

namespace ltk {
namespace LTK_NAMESPACE {

// 64 bytes on every ISA (the compiler splits it), aligned as its element: the caller's buffers promise no more.
template <class Real>
struct Packed;
template <>
struct Packed<double> {
    typedef double Pack __attribute__((vector_size(64), aligned(8), may_alias));
};
template <>
struct Packed<float> {
    typedef float Pack __attribute__((vector_size(64), aligned(4), may_alias));
};

template <class Real>
using Pack = typename Packed<Real>::Pack;

template <class Real>
static inline void add_logs(const Pack<Real>& product, double* total) {
    for (int lane = 0; lane < kLanes<Real>; ++lane)
        total[lane] += product[lane] > Real(0) ? std::log(static_cast<double>(product[lane])) : std::nan("");
}

// total[lane] = log det of the packed symmetric matrix in the lower triangle of `a` (size, size), which is overwritten:
// LDL^T, so no square roots.
template <class Real>
static inline void log_det_pack(Pack<Real>* a, int64_t size, double* total) {
    // One logarithm for several pivots; a product of more could overflow on features as large as 1e38 (1e9 in float32).
    constexpr int kTogether = sizeof(Real) == 8 ? 4 : 2;
    const Pack<Real> zero = {};
    const Pack<Real> one = zero + Real(1);
    Pack<Real> product = one;
    Pack<Real> smallest = one;
    for (int lane = 0; lane < kLanes<Real>; ++lane) total[lane] = 0.0;
    for (int64_t j = 0; j < size; ++j) {
        const Pack<Real> pivot = a[j * size + j];
        product *= pivot;
        smallest = pivot < smallest ? pivot : smallest;
        if (j % kTogether == kTogether - 1) {
            add_logs<Real>(product, total);
            product = one;
        }
        const Pack<Real> inverse = one / pivot;
        for (int64_t i = j + 1; i < size; ++i) {
            const Pack<Real> factor = a[i * size + j] * inverse;
            for (int64_t k = j + 1; k <= i; ++k) a[i * size + k] -= factor * a[k * size + j];
        }
    }
    if (size % kTogether != 0) add_logs<Real>(product, total);
    // Two negative pivots would multiply to a positive product.
    for (int lane = 0; lane < kLanes<Real>; ++lane)
        if (!(smallest[lane] > Real(0))) total[lane] = std::nan("");
}

static void logdet_f64(const double* matrices, int64_t n, int64_t begin, int64_t end, double* scratch,
                       double* out) noexcept {
    constexpr int64_t kLane = kLanes<double>;
    for (int64_t first = begin; first < end; first += kLane) {
        for (int64_t lane = 0; lane < kLane; ++lane) {
            // The lanes past the end repeat the last matrix: any positive definite one would do.
            const double* a = matrices + (first + lane < end ? first + lane : end - 1) * n * n;
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j <= i; ++j) scratch[(i * n + j) * kLane + lane] = a[i * n + j];
        }
        double total[kLane];
        log_det_pack<double>(reinterpret_cast<Pack<double>*>(scratch), n, total);
        for (int64_t lane = 0; lane < kLane && first + lane < end; ++lane) out[first + lane] = total[lane];
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
