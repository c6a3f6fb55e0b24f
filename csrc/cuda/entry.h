// What Python calls: integers (addresses, sizes, enums) and numbers in, null or an error message out. The same
// functions are the module's when nvcc builds them and the emulation's when g++ does (tests/cuda_host).
#pragma once
#include <cstdint>

namespace ltk {
namespace cuda {

// One call of the loss, by name as in cpu/adjusted_ce.h; what is not said is 0: no pointer, no table, the first code.
struct LossCall {
    int64_t device, stream, path, dtype;  // path: job.h
    int64_t logits, logits_stride, rows, classes;
    int64_t target, target_b, lam, ignore_index;
    int64_t shift, scale, margin, row_scale, weight;
    int64_t smoothing, label_scale;     // smoothing: of each label, in place of label_smoothing
    int64_t row_coef, row_coef_stride;  // stride: 1, or 0 for one number
    double focal_gamma, label_smoothing;
    int64_t reduction, loss, grad, grad_stride;
    int64_t scratch;  // ltk_cuda_scratch(...) doubles where the reduction is not none or there are tables
    int64_t form, form_table, form_seed;
    double option0, option1, option2;
};

// One call of the kernel between contrast's products, by name as in cpu/row_logsumexp.h; 0 where there is nothing.
struct ContrastCall {
    int64_t device, stream, dtype;  // dtype: float32 or float64, of dots and shift
    int64_t dots, stride, rows, columns;
    int64_t shift, row_scale, reference;  // reference: +inf for a row that has none
    int64_t own_begin, own_end, absent;
    int64_t loss, weight, base, bonus, minus_own, grad_base;
    int64_t other, own, grad_other, grad_own;
    int64_t coefficients;
};

// One call with soft targets, by name as in cpu/soft_targets.h; 0 where there is nothing.
struct SoftCall {
    int64_t device, stream, dtype, teacher;  // target: in the logits' type with `teacher`, else real
    int64_t logits, logits_stride, target, target_stride, rows, classes;
    int64_t shift, scale, weight, row_coef;
    int64_t row_loss, grad;
    double sigma, keep, floor;
};

}  // namespace cuda
}  // namespace ltk

extern "C" {

// Loss and gradient; no synchronisation, no allocation.
const char* ltk_cuda_adjusted_ce(const ltk::cuda::LossCall* call);

// The loss in two phases on a part of the classes; cpu/row_statistics.h has the fields, `out` and `terms` are doubles.
const char* ltk_cuda_row_statistics(int64_t device, int64_t stream, int64_t dtype, int64_t logits,
                                    int64_t logits_stride, int64_t rows, int64_t classes, int64_t target, int64_t shift,
                                    int64_t scale, int64_t weight, int64_t row_scale, int64_t smooth, int64_t out);
const char* ltk_cuda_gradient_from_statistics(int64_t device, int64_t stream, int64_t dtype, int64_t logits,
                                              int64_t logits_stride, int64_t rows, int64_t classes, int64_t target,
                                              int64_t shift, int64_t scale, int64_t weight, int64_t row_scale,
                                              int64_t terms, int64_t grad, int64_t grad_stride);

// Contrast: log-sum-exps or losses of rows of products, and coefficients in the products' place.
const char* ltk_cuda_row_logsumexp(const ltk::cuda::ContrastCall* call);

// Rows over the classes, or a teacher's logits, as targets: row losses, and the gradients of their sum over `row_coef`.
const char* ltk_cuda_soft_targets(const ltk::cuda::SoftCall* call);

// x *= *factor / *expected (1 where null) over n contiguous elements; nothing is read or written where they are equal.
const char* ltk_cuda_scale(int64_t device, int64_t stream, int64_t dtype, int64_t x, int64_t n, int64_t factor,
                           int64_t expected);

// out[i] = log det of the i-th symmetric positive definite n x n matrix (n <= 64, lower triangle read), NaN where a
// pivot is not positive. dtype: float32 or float64, for both.
const char* ltk_cuda_logdet(int64_t device, int64_t stream, int64_t dtype, int64_t matrices, int64_t batch, int64_t n,
                            int64_t out);

// Which plan serves a shape: {registers, threads, block, cluster} into plan[4]. Launches nothing.
const char* ltk_cuda_plan(int64_t device, int64_t path, int64_t dtype, int64_t classes, int64_t aligned, int64_t closed,
                          int64_t plan);

// Doubles of scratch for a call with these tables (0: none).
int64_t ltk_cuda_scratch(int64_t rows, int64_t classes, int64_t shift, int64_t scale, int64_t weight,
                         int64_t form_table);
}
