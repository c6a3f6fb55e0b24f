#include "self_contrast.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace ltk {
namespace {

int64_t real_bytes(int dtype) noexcept {
    return static_cast<DType>(dtype) == DType::f64 ? 8 : 4;
}

void* scratch_of(void* scratch, int worker, int64_t width, int dtype) noexcept {
    return static_cast<char*>(scratch) + 2 * worker * width * real_bytes(dtype);
}

void put_real(void* out, int64_t at, double value, int dtype) noexcept {
    if (static_cast<DType>(dtype) == DType::f64)
        static_cast<double*>(out)[at] = value;
    else
        static_cast<float*>(out)[at] = static_cast<float>(value);
}

}  // namespace

void self_contrast_start(SelfStart& job, const int64_t* labels, int64_t all, int64_t ignore_index, int dtype,
                         void* scratch, int threads) noexcept {
    SelfRows& rows = job.rows;
    int64_t kept = 0, last = all;
    for (int64_t i = 0; i < all; ++i) rows.order[labels[i] == ignore_index ? --last : kept++] = i;
    rows.kept = kept;
    std::sort(rows.order, rows.order + kept,
              [labels](int64_t a, int64_t b) { return labels[a] < labels[b] || (labels[a] == labels[b] && a < b); });
    for (int64_t begin = 0, end; begin < kept; begin = end) {
        for (end = begin + 1; end < kept && labels[rows.order[end]] == labels[rows.order[begin]];) ++end;
        for (int64_t k = begin; k < end; ++k) rows.begin[k] = begin, rows.end[k] = end;
    }
    const SelfContrastKernels& run = kernels().self_contrast[dtype];
    const int64_t block = rows_a_block(rows.width);
    parallel_rows(kept, block, threads, [&](int64_t begin, int64_t end, int) { run.unit(job, begin, end); });
    parallel_rows(kept, block, threads, [&](int64_t begin, int64_t end, int worker) {
        run.positives(job, begin, end, scratch_of(scratch, worker, rows.width, dtype));
    });
}

void self_contrast_products(const SelfProducts& job, int dtype, int threads) noexcept {
    parallel_rows(job.rows, rows_a_block(job.columns), threads,
                  [&](int64_t begin, int64_t end, int) { kernels().self_contrast[dtype].products(job, begin, end); });
}

double self_contrast_losses(const SelfLosses& job, Reduction reduction, int dtype) noexcept {
    const SelfRows& rows = job.rows;
    const auto positives = [&rows](int64_t k) { return static_cast<double>(rows.end[k] - rows.begin[k] - 1); };
    const auto weight = [&job, &rows](int64_t k) { return job.weight == nullptr ? 1.0 : job.weight[rows.order[k]]; };
    double size = reduction == Reduction::batch_mean ? static_cast<double>(rows.kept) : 1.0;
    if (reduction == Reduction::mean) {
        size = 0.0;
        for (int64_t k = 0; k < rows.kept; ++k)
            if (job.beta + job.alpha * positives(k) > 0.0) size += weight(k);
    }
    if (size == 0.0) size = 1.0;  // a batch without a row that counts has the loss 0: it must not stop a training run
    std::fill(job.loss, job.loss + job.all, 0.0);
    if (job.of_base != nullptr) std::fill(job.of_base, job.of_base + job.all, 0.0);
    if (job.of_linear != nullptr) std::fill(job.of_linear, job.of_linear + job.all, 0.0);
    double sum = 0.0;
    for (int64_t k = 0; k < rows.kept; ++k) {
        const int64_t i = rows.order[k];
        const double share = job.beta + job.alpha * positives(k), own = weight(k) / size;
        put_real(job.factor, k, 0.0, dtype);
        job.slope[k] = 0.0;
        if (own == 0.0 || share == 0.0) continue;
        const double total = job.gamma * job.total[k];
        double every = total == 0.0 ? -INFINITY : job.scale + std::log(total);
        if (job.base != nullptr && job.base[i] > -INFINITY) {
            const double top = std::fmax(every, job.base[i]);
            every = top + std::log(std::exp(every - top) + std::exp(job.base[i] - top));
        }
        double linear = job.alpha * job.scale * job.positive[k];
        if (job.linear != nullptr) linear += job.beta * job.linear[i];
        sum += job.loss[i] = own * (every - linear / share);
        const double coef = own * (job.upstream == nullptr ? 1.0 : job.upstream[i]);
        job.slope[k] = coef * job.alpha / share;
        if (total != 0.0) put_real(job.factor, k, coef * job.gamma * std::exp(job.scale - every), dtype);
        if (job.of_base != nullptr) job.of_base[i] = coef * std::exp(job.base[i] - every);
        if (job.of_linear != nullptr) job.of_linear[i] = -coef * job.beta / share;
    }
    return sum;
}

double self_contrast_gradient(const SelfGradient& job, int64_t all, int dtype, void* scratch, int threads) noexcept {
    const SelfRows& rows = job.rows;
    const int64_t bytes = rows.width * real_bytes(dtype);
    for (int64_t k = rows.kept; k < all; ++k)
        std::memset(static_cast<char*>(job.out) + rows.order[k] * bytes, 0, static_cast<size_t>(bytes));
    parallel_rows(rows.kept, rows_a_block(rows.width), threads, [&](int64_t begin, int64_t end, int worker) {
        kernels().self_contrast[dtype].gradient(job, begin, end, scratch_of(scratch, worker, rows.width, dtype));
    });
    double sum = 0.0;
    for (int64_t k = 0; k < rows.kept; ++k) sum += job.along[k];
    return 0.5 * sum;  // every pair is in it twice
}

}  // namespace ltk
