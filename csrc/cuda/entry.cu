// The entry points: fills a job, chooses a plan, launches. dtype codes are those of enum DType in cpu/kernels.h.
#include "entry.h"

#include "adjusted_ce.cuh"
#include "launch.cuh"
#include "logdet.cuh"
#include "scale.cuh"
#include "sigmoid_bce.cuh"

namespace ltk {
namespace cuda {
namespace {

template <class T = void>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// f(element) for the type of a code.
template <class F>
const char* with_type(int64_t dtype, F f) {
    switch (dtype) {
        case 0:
            return f(float());
        case 1:
            return f(double());
        case 2:
            return f(bf16());
        case 3:
            return f(f16());
    }
    return "unknown dtype";
}

template <class T>
bool aligned_rows(const AdjustedCe& ce) {
    return reinterpret_cast<uintptr_t>(ce.logits) % 16 == 0 && ce.logits_stride % kVec<T> == 0;
}

// Closed forms that change more than the label's logit, and mixed labels, recompute their exponentials.
bool keeps(const AdjustedCe& ce) {
    return ce.target_b == nullptr && (ce.closed.form == Form::none || ce.closed.form == Form::arcface);
}

template <class T>
Plan choose(const AdjustedCe& ce, Path path, bool aligned, int device) {
    const auto kernel = keeps(ce) ? adjusted_ce_rows<T> : adjusted_ce_rows_terms<T>;
    const int width = kVec<T>, held = Traits<T>::kHeld;
    // The device is asked where the answer matters.
    const bool long_rows = ce.classes > static_cast<int64_t>(256) * held * width - width;
    const int largest = path == Path::cluster || long_rows ? largest_cluster(kernel, kMaxBlock, device) : 1;
    return plan_rows(width, held, ce.classes, aligned, path, largest);
}

template <class T>
const char* launch_rows(RowsJob& job, Path path, Where where) {
    using Real = real_t<T>;
    const bool sigmoid = job.ce.closed.form == Form::sigmoid;
    void (*kernel)(RowsJob) = nullptr;
    if (sigmoid || job.use_statistics != RowsJob::off) path = Path::memory;
    job.plan = choose<T>(job.ce, path, aligned_rows<T>(job.ce), where.device);
    if (sigmoid)
        kernel = sigmoid_bce_rows<T>;
    else if (!job.plan.registers)
        kernel = adjusted_ce_rows_memory<T>;
    else
        kernel = keeps(job.ce) ? adjusted_ce_rows<T> : adjusted_ce_rows_terms<T>;

    const int64_t rows_per_block = job.plan.block / job.plan.threads;
    job.groups = (job.ce.rows + rows_per_block - 1) / rows_per_block;  // with clusters, one row each
    if (job.reduction != Reduction::none) {
        const int64_t blocks = (job.ce.rows + 4095) / 4096;
        const bool divides = job.reduction == Reduction::mean || job.reduction == Reduction::batch_mean;
        job.partials = divides ? static_cast<int>(blocks < kMaxPartials ? blocks : kMaxPartials) : 0;
        const char* error = launch(loss_denominator<Real>, divides ? job.partials : 1, kMaxBlock, 1, 0, where, job);
        if (error != nullptr) return error;
    }
    return launch(kernel, job.groups * job.plan.cluster, job.plan.block, job.plan.cluster, 0, where, job);
}

// What the loss and its two halves have in common. No reduction, the whole row.
RowsJob rows_job(int64_t logits, int64_t logits_stride, int64_t rows, int64_t classes, int64_t target, int64_t shift,
                 int64_t scale, int64_t margin, int64_t row_scale, int64_t weight, int64_t row_coef, double focal_gamma,
                 int64_t ignore_index, int64_t loss, int64_t grad, int64_t grad_stride) {
    RowsJob job{};
    AdjustedCe& ce = job.ce;
    ce.logits = pointer(logits);
    ce.logits_stride = logits_stride;
    ce.rows = rows;
    ce.classes = classes;
    ce.target = pointer<const int64_t>(target);
    ce.shift = pointer(shift);
    ce.scale = pointer(scale);
    ce.margin = pointer(margin);
    ce.row_scale = pointer(row_scale);
    ce.weight = pointer(weight);
    ce.row_coef = pointer(row_coef);
    ce.focal_gamma = focal_gamma;
    ce.ignore_index = ignore_index;
    ce.grad = pointer(grad);
    ce.grad_stride = grad_stride;
    job.reduction = Reduction::none;
    job.all_classes = classes;
    job.loss = pointer(loss);
    return job;
}

const char* run_rows(RowsJob& job, Path path, int64_t dtype, int64_t device, int64_t stream) {
    if (job.ce.rows == 0) return nullptr;  // Python knows the loss of nothing
    const DeviceGuard guard(static_cast<int>(device));
    if (guard.error != nullptr) return guard.error;
    const Where where{static_cast<int>(device), pointer(stream)};
    return with_type(dtype, [&](auto element) { return launch_rows<decltype(element)>(job, path, where); });
}

}  // namespace
}  // namespace cuda
}  // namespace ltk

using namespace ltk;
using namespace ltk::cuda;

extern "C" {

const char* ltk_cuda_adjusted_ce(int64_t device, int64_t stream, int64_t path, int64_t dtype, int64_t logits,
                                 int64_t logits_stride, int64_t rows, int64_t classes, int64_t target, int64_t target_b,
                                 int64_t lam, int64_t shift, int64_t scale, int64_t margin, int64_t row_scale,
                                 int64_t weight, int64_t row_coef, double focal_gamma, double label_smoothing,
                                 int64_t ignore_index, int64_t reduction, int64_t loss, int64_t grad,
                                 int64_t grad_stride, int64_t scratch, int64_t form, int64_t form_table,
                                 int64_t form_seed, double option0, double option1, double option2) {
    RowsJob job = rows_job(logits, logits_stride, rows, classes, target, shift, scale, margin, row_scale, weight,
                           row_coef, focal_gamma, ignore_index, loss, grad, grad_stride);
    AdjustedCe& ce = job.ce;
    ce.target_b = pointer<const int64_t>(target_b);
    ce.lam = pointer(lam);
    ce.label_smoothing = label_smoothing;
    ce.closed = {
        static_cast<Form>(form), pointer(form_table), pointer<const int64_t>(form_seed), {option0, option1, option2}};
    job.reduction = static_cast<Reduction>(reduction);
    if (scratch != 0) {
        job.ticket = pointer<unsigned>(scratch);
        job.denominators = pointer<double>(scratch) + 1;
        job.group_loss = job.denominators + kMaxPartials;
    }
    return run_rows(job, static_cast<Path>(path), dtype, device, stream);
}

const char* ltk_cuda_row_statistics(int64_t device, int64_t stream, int64_t write, int64_t dtype, int64_t logits,
                                    int64_t logits_stride, int64_t rows, int64_t classes, int64_t first_class,
                                    int64_t all_classes, int64_t target, int64_t shift, int64_t scale, int64_t margin,
                                    int64_t row_scale, int64_t weight, int64_t row_coef, double focal_gamma,
                                    int64_t ignore_index, int64_t maximum, int64_t sum, int64_t target_logit,
                                    int64_t loss, int64_t grad, int64_t grad_stride) {
    RowsJob job = rows_job(logits, logits_stride, rows, classes, target, shift, scale, margin, row_scale, weight,
                           row_coef, focal_gamma, ignore_index, loss, grad, grad_stride);
    job.first_class = first_class;
    job.all_classes = all_classes;
    job.use_statistics = write != 0 ? RowsJob::write : RowsJob::read;
    job.statistics[0] = pointer(maximum);
    job.statistics[1] = pointer(sum);
    job.statistics[2] = pointer(target_logit);
    return run_rows(job, Path::memory, dtype, device, stream);
}

const char* ltk_cuda_scale(int64_t device, int64_t stream, int64_t dtype, int64_t x, int64_t n, int64_t factor) {
    if (n == 0) return nullptr;
    const DeviceGuard guard(static_cast<int>(device));
    if (guard.error != nullptr) return guard.error;
    const ScaleJob job{pointer(x), n, pointer(factor)};
    const Where where{static_cast<int>(device), pointer(stream)};
    return with_type(dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t blocks = (n + 8 * 256 * kVec<T> - 1) / (8 * 256 * kVec<T>);
        // Enough to fill a large device; where the factor is 1, few enough to be gone in a microsecond or two.
        return launch(scale_elements<T>, blocks < 2048 ? blocks : 2048, 256, 1, 0, where, job);
    });
}

const char* ltk_cuda_logdet(int64_t device, int64_t stream, int64_t dtype, int64_t matrices, int64_t batch, int64_t n,
                            int64_t out) {
    if (batch == 0) return nullptr;
    const DeviceGuard guard(static_cast<int>(device));
    if (guard.error != nullptr) return guard.error;
    const Where where{static_cast<int>(device), pointer(stream)};
    return with_type(dtype, [&](auto element) -> const char* {
        using T = decltype(element);
        if constexpr (std::is_floating_point_v<T>) {
            const LogdetJob job{pointer(matrices), batch, static_cast<int>(n), pointer(out)};
            // A warp a matrix; as many warps as fit into the 48 KiB that every device gives without asking.
            const size_t bytes = logdet_bytes<T>(job.n);
            int warps = 8;
            while (warps > 1 && warps * bytes > 48 * 1024) warps /= 2;
            return launch(logdet_warps<T>, (batch + warps - 1) / warps, 32 * warps, 1, warps * bytes, where, job);
        }
        return "log-determinants need float32 or float64";
    });
}

const char* ltk_cuda_plan(int64_t device, int64_t path, int64_t dtype, int64_t classes, int64_t aligned, int64_t closed,
                          int64_t plan) {
    AdjustedCe ce{};
    ce.classes = classes;
    ce.closed.form = closed != 0 ? Form::seesaw : Form::none;
    return with_type(dtype, [&](auto element) -> const char* {
        const Plan chosen =
            choose<decltype(element)>(ce, static_cast<Path>(path), aligned != 0, static_cast<int>(device));
        int64_t* out = pointer<int64_t>(plan);
        out[0] = chosen.registers;
        out[1] = chosen.threads;
        out[2] = chosen.block;
        out[3] = chosen.cluster;
        return nullptr;
    });
}

int64_t ltk_cuda_scratch(int64_t rows) {
    return adjusted_ce_cuda_scratch(rows);
}
}
