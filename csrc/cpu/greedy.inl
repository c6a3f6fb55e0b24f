// Body of greedy.h: small dense algebra in float64, vectors along rows.
#include <cmath>

namespace ltk {
namespace LTK_NAMESPACE {

typedef double Row __attribute__((vector_size(64), aligned(8), may_alias));

// y[0:n) -= factor x[0:n)
static inline void subtract(double* y, const double* x, double factor, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) *reinterpret_cast<Row*>(y + i) -= factor * *reinterpret_cast<const Row*>(x + i);
    for (; i < n; ++i) y[i] -= factor * x[i];
}

static double factor_f64(double* a, int64_t d, double* inverse, double* column) noexcept {
    double total = 0.0;
    bool definite = true;
    for (int64_t j = 0; j < d; ++j) {
        const double pivot = a[j * d + j];
        definite = definite && pivot > 0.0;
        const double root = std::sqrt(pivot), scale = 1.0 / root;
        total += std::log(pivot);
        // A contiguous copy of the column: the update below runs along rows.
        for (int64_t i = j; i < d; ++i) column[i] = a[i * d + j] * scale;
        for (int64_t i = j + 1; i < d; ++i) subtract(a + i * d + j + 1, column + j + 1, column[i], i - j);
        a[j * d + j] = root;
        for (int64_t i = j + 1; i < d; ++i) a[i * d + j] = column[i];
    }
    for (int64_t i = 0; i < d; ++i) {
        double* row = inverse + i * d;
        for (int64_t k = 0; k < d; ++k) row[k] = 0.0;
        row[i] = 1.0;
        for (int64_t k = 0; k < i; ++k) subtract(row, inverse + k * d, a[i * d + k], k + 1);
        const double scale = 1.0 / a[i * d + i];
        for (int64_t k = 0; k <= i; ++k) row[k] *= scale;
    }
    return definite ? total : std::nan("");
}

static void rank_update_f64(const double* y, int64_t rows, int64_t d, double* t) noexcept {
    for (int64_t i = 0; i < d; ++i)
        for (int64_t r = 0; r < rows; ++r) subtract(t + i * d, y + r * d, -y[r * d + i], d);
}

static void lower_times_f64(const double* b, const double* x, int64_t d, double* out) noexcept {
    for (int64_t i = 0; i < d; ++i) {
        Row lanes = {};
        int64_t k = 0;
        for (; k + 8 <= i + 1; k += 8)
            lanes += *reinterpret_cast<const Row*>(b + i * d + k) * *reinterpret_cast<const Row*>(x + k);
        double sum = 0.0;
        for (int lane = 0; lane < 8; ++lane) sum += lanes[lane];
        for (; k <= i; ++k) sum += b[i * d + k] * x[k];
        out[i] = sum;
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
