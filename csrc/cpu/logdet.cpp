#include "logdet.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {

void logdet_batch(const double* matrices, int64_t batch, int64_t n, double* scratch, double* out,
                  int threads) noexcept {
    parallel_rows(batch, 64, threads, [&](int64_t begin, int64_t end, int worker) {
        kernels().logdet_f64(matrices, n, begin, end, scratch + worker * logdet_scratch(n), out);
    });
}

}  // namespace ltk
