#include "subset_scores.h"

#include "isa.h"
#include "parallel.h"

namespace ltk {
namespace {

void run(const SubsetScores<double>& job, int64_t begin, int64_t end, double* scratch) noexcept {
    kernels().subset_scores_f64(job, begin, end, scratch);
}
void run(const SubsetScores<float>& job, int64_t begin, int64_t end, float* scratch) noexcept {
    kernels().subset_scores_f32(job, begin, end, scratch);
}

}  // namespace

template <class Real>
void subset_scores(const SubsetScores<Real>& job, Real* scratch, int threads) noexcept {
    int64_t largest = 1;
    for (int64_t p = 0; p < job.packs; ++p)
        if (job.pack_size[p] > largest) largest = job.pack_size[p];
    // At least about 10 us of work in a block, so that handing it out costs little.
    const int64_t work = job.d * job.d * largest;
    const int64_t block = work >= 32768 ? 1 : 1 + 32768 / (work + 1);
    const int64_t stride = subset_scores_scratch(job.d, largest);
    parallel_rows(job.packs, block, threads,
                  [&](int64_t begin, int64_t end, int worker) { run(job, begin, end, scratch + worker * stride); });
}

template void subset_scores(const SubsetScores<double>&, double*, int) noexcept;
template void subset_scores(const SubsetScores<float>&, float*, int) noexcept;

}  // namespace ltk
