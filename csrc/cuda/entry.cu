// The entry points: fills a job, chooses a plan, launches. dtype codes are those of enum DType in cpu/kernels.h.
#include "entry.h"

#include "adjusted_ce.cuh"
#include "launch.cuh"
#include "logdet.cuh"
#include "scale.cuh"
#include "sigmoid_bce.cuh"
#include "two_phase.cuh"

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
    const void* const code = reinterpret_cast<const void*>(kernel);
    const int largest = path == Path::cluster || long_rows ? abilities(code, kMaxBlock, device).largest_cluster : 1;
    return plan_rows(width, held, ce.classes, aligned, path, largest);
}

template <class T>
const char* launch_rows(RowsJob& job, Path path, Where where) {
    using Real = real_t<T>;
    const bool sigmoid = job.ce.closed.form == Form::sigmoid;
    void (*kernel)(RowsJob) = nullptr;
    if (sigmoid) path = Path::memory;
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

template <class T>
const char* launch_part(void (*kernel)(PartJob), PartJob& job, Where where) {
    const ClassPart& part = job.part;
    if (part.classes > INT32_MAX / 2) return "a part of the classes has more than 2^30 of them";
    const bool aligned = reinterpret_cast<uintptr_t>(part.logits) % 16 == 0 && part.logits_stride % kVec<T> == 0;
    const Plan plan = plan_rows(kVec<T>, Traits<T>::kHeld, part.classes, aligned, Path::memory, 1);
    job.threads = plan.threads;
    const int64_t rows_per_block = plan.block / plan.threads;
    return launch(kernel, (part.rows + rows_per_block - 1) / rows_per_block, plan.block, 1, 0, where, job);
}

PartJob part_job(int64_t logits, int64_t logits_stride, int64_t rows, int64_t classes, int64_t target, int64_t shift,
                 int64_t scale, int64_t weight, int64_t row_scale) {
    PartJob job{};
    job.part = {pointer<const void>(logits),
                logits_stride,
                pointer<const int64_t>(target),
                pointer<const void>(shift),
                pointer<const void>(scale),
                pointer<const void>(weight),
                pointer<const double>(row_scale),
                rows,
                classes};
    return job;
}

// f(element, where) with the device current; nothing for an empty batch.
template <class F>
const char* on_device(int64_t batch, int64_t device, int64_t stream, int64_t dtype, F f) {
    if (batch == 0) return nullptr;
    const DeviceGuard guard(static_cast<int>(device));
    if (guard.error != nullptr) return guard.error;
    const Where where{static_cast<int>(device), pointer(stream)};
    return with_type(dtype, [&](auto element) { return f(element, where); });
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
                                 int64_t weight, int64_t row_coef, int64_t row_coef_stride, double focal_gamma,
                                 double label_smoothing, int64_t ignore_index, int64_t reduction, int64_t loss,
                                 int64_t grad, int64_t grad_stride, int64_t scratch, int64_t form, int64_t form_table,
                                 int64_t form_seed, double option0, double option1, double option2) {
    RowsJob job{};
    AdjustedCe& ce = job.ce;
    ce.logits = pointer(logits);
    ce.logits_stride = logits_stride;
    ce.rows = rows;
    ce.classes = classes;
    ce.target = pointer<const int64_t>(target);
    ce.target_b = pointer<const int64_t>(target_b);
    ce.lam = pointer(lam);
    ce.shift = pointer(shift);
    ce.scale = pointer(scale);
    ce.margin = pointer(margin);
    ce.row_scale = pointer(row_scale);
    ce.weight = pointer(weight);
    ce.row_coef = pointer(row_coef);
    ce.focal_gamma = focal_gamma;
    ce.label_smoothing = label_smoothing;
    ce.ignore_index = ignore_index;
    ce.closed = {
        static_cast<Form>(form), pointer(form_table), pointer<const int64_t>(form_seed), {option0, option1, option2}};
    ce.grad = pointer(grad);
    ce.grad_stride = grad_stride;
    job.row_coef_stride = row_coef_stride;
    job.reduction = static_cast<Reduction>(reduction);
    job.loss = pointer(loss);
    if (scratch != 0) {
        job.ticket = pointer<unsigned>(scratch);
        job.denominators = pointer<double>(scratch) + 1;
        job.group_loss = job.denominators + kMaxPartials;
    }
    // Without rows Python knows the loss.
    return on_device(rows, device, stream, dtype, [&](auto element, Where where) {
        return launch_rows<decltype(element)>(job, static_cast<Path>(path), where);
    });
}

const char* ltk_cuda_row_statistics(int64_t device, int64_t stream, int64_t dtype, int64_t logits,
                                    int64_t logits_stride, int64_t rows, int64_t classes, int64_t target, int64_t shift,
                                    int64_t scale, int64_t weight, int64_t row_scale, int64_t smooth, int64_t out) {
    PartJob job = part_job(logits, logits_stride, rows, classes, target, shift, scale, weight, row_scale);
    job.smooth = smooth != 0;
    job.out = pointer<double>(out);
    return on_device(rows, device, stream, dtype, [&](auto element, Where where) {
        using T = decltype(element);
        return launch_part<T>(part_statistics<T>, job, where);
    });
}

const char* ltk_cuda_gradient_from_statistics(int64_t device, int64_t stream, int64_t dtype, int64_t logits,
                                              int64_t logits_stride, int64_t rows, int64_t classes, int64_t target,
                                              int64_t shift, int64_t scale, int64_t weight, int64_t row_scale,
                                              int64_t terms, int64_t grad, int64_t grad_stride) {
    PartJob job = part_job(logits, logits_stride, rows, classes, target, shift, scale, weight, row_scale);
    job.terms = pointer<const double>(terms);
    job.grad = pointer(grad);
    job.grad_stride = grad_stride;
    return on_device(rows, device, stream, dtype, [&](auto element, Where where) {
        using T = decltype(element);
        return launch_part<T>(part_gradient<T>, job, where);
    });
}

const char* ltk_cuda_scale(int64_t device, int64_t stream, int64_t dtype, int64_t x, int64_t n, int64_t factor,
                           int64_t expected) {
    const ScaleJob job{pointer(x), n, pointer(factor), pointer(expected)};
    return on_device(n, device, stream, dtype, [&](auto element, Where where) {
        using T = decltype(element);
        const int64_t blocks = (n + 8 * 256 * kVec<T> - 1) / (8 * 256 * kVec<T>);
        // Enough to fill a large device; where there is nothing to do, few enough to be gone in a microsecond or two.
        return launch(scale_elements<T>, blocks < 2048 ? blocks : 2048, 256, 1, 0, where, job);
    });
}

const char* ltk_cuda_logdet(int64_t device, int64_t stream, int64_t dtype, int64_t matrices, int64_t batch, int64_t n,
                            int64_t out) {
    return on_device(batch, device, stream, dtype, [&](auto element, Where where) -> const char* {
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
    return on_device(1, device, 0, dtype, [&](auto element, Where where) -> const char* {
        const Plan chosen = choose<decltype(element)>(ce, static_cast<Path>(path), aligned != 0, where.device);
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
