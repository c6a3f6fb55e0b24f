// Body of logdet.h: eight matrices at a time, one per lane, so that the recurrences run over lanes and nothing is
// summed across them.
#include <cmath>

namespace ltk {
namespace LTK_NAMESPACE {

// 64 bytes on every ISA (the compiler splits it), aligned as a double: the caller's buffers promise no more.
typedef double Pack __attribute__((vector_size(64), aligned(8), may_alias));

static inline void add_logs(const Pack& product, Pack& total) {
    for (int lane = 0; lane < kPackLanes; ++lane)
        total[lane] += product[lane] > 0.0 ? std::log(product[lane]) : std::nan("");
}

// log det of the packed symmetric matrix in the lower triangle of `a` (size, size), which is overwritten: LDL^T, so no
// square roots.
static inline void log_det_pack(Pack* a, int64_t size, Pack& total) {
    const Pack one = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0};
    Pack product = one;
    Pack smallest = one;
    for (int64_t j = 0; j < size; ++j) {
        const Pack pivot = a[j * size + j];
        product *= pivot;
        smallest = pivot < smallest ? pivot : smallest;
        // One logarithm for four pivots; a product of more could overflow on features as large as 1e38.
        if (j % 4 == 3) {
            add_logs(product, total);
            product = one;
        }
        const Pack inverse = 1.0 / pivot;
        for (int64_t i = j + 1; i < size; ++i) {
            const Pack factor = a[i * size + j] * inverse;
            for (int64_t k = j + 1; k <= i; ++k) a[i * size + k] -= factor * a[k * size + j];
        }
    }
    if (size % 4 != 0) add_logs(product, total);
    // Two negative pivots would multiply to a positive product.
    for (int lane = 0; lane < kPackLanes; ++lane)
        if (!(smallest[lane] > 0.0)) total[lane] = std::nan("");
}

static void logdet_f64(const double* matrices, int64_t n, int64_t begin, int64_t end, double* scratch,
                       double* out) noexcept {
    Pack* pack = reinterpret_cast<Pack*>(scratch);
    for (int64_t first = begin; first < end; first += kPackLanes) {
        for (int64_t lane = 0; lane < kPackLanes; ++lane) {
            // The lanes past the end repeat the last matrix: any positive definite one would do.
            const double* a = matrices + (first + lane < end ? first + lane : end - 1) * n * n;
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j <= i; ++j) scratch[(i * n + j) * kPackLanes + lane] = a[i * n + j];
        }
        Pack total = {};
        log_det_pack(pack, n, total);
        for (int64_t lane = 0; lane < kPackLanes && first + lane < end; ++lane) out[first + lane] = total[lane];
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
