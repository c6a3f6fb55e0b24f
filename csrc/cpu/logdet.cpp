#include "logdet.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {

void logdet_batch(const double* matrices, int64_t batch, int64_t n, double* scratch, double* out,
                  int threads) noexcept {
    struct Context {
        const double* matrices;
        int64_t batch, n, block;
        double *scratch, *out;
    } context{matrices, batch, n, 64, scratch, out};
    parallel_blocks((batch + context.block - 1) / context.block, threads,
                    [](void* c, int64_t block, int worker) noexcept {
                        const Context& x = *static_cast<Context*>(c);
                        const int64_t begin = block * x.block;
                        const int64_t end = begin + x.block < x.batch ? begin + x.block : x.batch;
                        kernels().logdet_f64(x.matrices, x.n, begin, end, x.scratch + worker * logdet_scratch(x.n),
                                             x.out);
                    },
                    &context);
}

}  // namespace ltk
