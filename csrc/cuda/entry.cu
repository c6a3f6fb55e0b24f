// The entry points: fills a job, chooses a plan, launches. dtype codes are those of enum DType in cpu/kernels.h.
#include "entry.h"

#include "adjusted_ce.cuh"
#include "launch.cuh"
#include "logdet.cuh"
#include "row_logsumexp.cuh"
#include "scale.cuh"
#include "sigmoid_bce.cuh"
#include "soft_targets.cuh"
#include "two_phase.cuh"
#include "vmf.cuh"

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

// Elements that rows begin at a multiple of, counted from a 16-byte boundary: up to `width`.
int64_t granule_of_rows(const AdjustedCe& ce, int64_t size, int64_t width) {
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(ce.logits) % 16) / size;
    const int64_t granule = granule_of(offset, width);
    return ce.rows > 1 ? granule_of(ce.logits_stride, granule) : granule;
}

// Closed forms that change more than the label's logit, and mixed labels, recompute their exponentials.
bool keeps(const AdjustedCe& ce) {
    return ce.target_b == nullptr && (ce.closed.form == Form::none || ce.closed.form == Form::arcface);
}

using RowsKernel = void (*)(RowsJob);
template <class T>
RowsKernel held_kernel(const AdjustedCe& ce) {
    if (!keeps(ce)) return adjusted_ce_rows_terms<T>;
    if constexpr (sizeof(T) <= 4)  // float64 is not where time is spent: one kernel for all tables
        if (ce.scale == nullptr && ce.row_scale == nullptr && ce.label_scale == nullptr && !smooths(ce))
            return ce.shift == nullptr ? adjusted_ce_rows<T, Tables::none> : adjusted_ce_rows<T, Tables::shift>;
    return adjusted_ce_rows<T, Tables::any>;
}

template <class T>
Plan choose(const AdjustedCe& ce, Path path, int64_t granule, int device) {
    const int held = keeps(ce) ? Traits<T>::kHeld : Traits<T>::kHeldTerms;
    const Room room{kVec<T>, held, Traits<T>::kEnds, Traits<T>::kClusterBlock};
    // The device is asked where the answer matters.
    const bool long_rows = ce.classes > static_cast<int64_t>(room.cluster_block) * room.held * room.width;
    int largest = 1;
    if (path == Path::cluster || long_rows)
        largest = abilities(reinterpret_cast<const void*>(held_kernel<T>(ce)), kMaxBlock, device).largest_cluster;
    return plan_rows(room, ce.classes, granule, path, largest);
}

// The tables of a call, copied into `scratch` where rows or the table itself do not begin at a 16-byte boundary.
template <class Real>
double* lay_out_tables(RowsJob& job, int64_t granule, double* scratch) {
    constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(Real));
    const AdjustedCe& ce = job.ce;
    job.scale.source = ce.scale;
    job.shift.source = ce.closed.form == Form::sigmoid ? ce.closed.table : ce.shift;
    job.weight.source = smooths(ce) ? ce.weight : nullptr;
    for (Table* table : {&job.scale, &job.shift, &job.weight}) {
        if (table->source == nullptr) continue;
        if (granule % kWidth == 0 && reinterpret_cast<uintptr_t>(table->source) % 16 == 0) continue;
        table->copies = scratch;
        table->step = table_pitch(ce.classes) + 1;
        scratch += table_doubles(ce.classes);
        ++job.copied;
    }
    return scratch;
}

template <class T>
const char* launch_rows(RowsJob& job, Path path, double* scratch, Where where) {
    using Real = real_t<T>;
    const AdjustedCe& ce = job.ce;
    const bool sigmoid = ce.closed.form == Form::sigmoid, vmf = ce.closed.form == Form::vmf;
    const int64_t granule = granule_of_rows(ce, sizeof(T), kVec<T>);
    job.plan = choose<T>(ce, sigmoid || vmf ? Path::memory : path, granule, where.device);
    const RowsKernel kernel = sigmoid              ? sigmoid_bce_rows<T>
                              : vmf                ? vmf_rows<T>
                              : job.plan.registers ? held_kernel<T>(ce)
                                                   : adjusted_ce_rows_memory<T>;
    const int64_t rows_per_block = job.plan.block / job.plan.threads;
    job.groups = (ce.rows + rows_per_block - 1) / rows_per_block;  // with clusters, one row each
    job.denominators = lay_out_tables<Real>(job, granule, scratch + 2);
    job.group_loss = job.denominators + kMaxPartials;
    const bool reduced = job.reduction != Reduction::none, two = reduced || job.copied != 0;
    if (two && scratch == nullptr) return "scratch is missing";
    if (two) {
        if (reduced) job.ticket = reinterpret_cast<unsigned*>(scratch);
        const int64_t partials = (ce.rows + kPartialRows - 1) / kPartialRows;
        const bool divides = job.reduction == Reduction::mean || job.reduction == Reduction::batch_mean;
        job.partials = divides ? static_cast<int>(partials < kMaxPartials ? partials : kMaxPartials) : 0;
        int64_t grid = job.copied != 0 ? (ce.classes + kMaxBlock - 1) / kMaxBlock : 1;
        if (grid > 132) grid = 132;
        if (grid < job.partials) grid = job.partials;
        const char* error = launch(loss_prologue<Real>, {grid, kMaxBlock}, where, job);
        if (error != nullptr) return error;
    }
    Shape shape{job.groups * job.plan.cluster, job.plan.block, job.plan.cluster};
    shape.overlaps = two && abilities(reinterpret_cast<const void*>(kernel), kMaxBlock, where.device).code >= 90;
    return launch(kernel, shape, where, job);
}

template <class T>
const char* launch_part(void (*kernel)(PartJob), PartJob& job, Where where) {
    const ClassPart& part = job.part;
    if (part.classes > INT32_MAX / 2) return "a part of the classes has more than 2^30 of them";
    const Room room{kVec<T>, Traits<T>::kHeld, Traits<T>::kEnds, kMemoryBlock};
    job.plan = plan_rows(room, part.classes, 1, Path::memory, 1);
    const int64_t rows_per_block = job.plan.block / job.plan.threads;
    return launch(kernel, {(part.rows + rows_per_block - 1) / rows_per_block, job.plan.block}, where, job);
}

template <class T>
const char* launch_contrast(ContrastJob& job, Where where) {
    if (job.rows.columns > INT32_MAX / 2) return "there are more than 2^30 columns";
    const Room room{kVec<T>, Traits<T>::kHeld, Traits<T>::kEnds, kMemoryBlock};
    job.plan = plan_rows(room, job.rows.columns, 1, Path::memory, 1);
    const int64_t rows_per_block = job.plan.block / job.plan.threads;
    return launch(contrast_rows<T>, {(job.rows.rows + rows_per_block - 1) / rows_per_block, job.plan.block}, where,
                  job);
}

template <class T>
const char* launch_soft(SoftJob& job, Where where) {
    if (job.soft.classes > INT32_MAX / 2) return "there are more than 2^30 classes";
    const Room room{kVec<T>, Traits<T>::kHeld, Traits<T>::kEnds, kMemoryBlock};
    job.plan = plan_rows(room, job.soft.classes, 1, Path::memory, 1);
    const int64_t rows_per_block = job.plan.block / job.plan.threads;
    return launch(job.soft.teacher ? soft_rows<T, true> : soft_rows<T, false>,
                  {(job.soft.rows + rows_per_block - 1) / rows_per_block, job.plan.block}, where, job);
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

const char* ltk_cuda_adjusted_ce(const LossCall* call) {
    RowsJob job{};
    AdjustedCe& ce = job.ce;
    ce.logits = pointer(call->logits);
    ce.logits_stride = call->logits_stride;
    ce.rows = call->rows;
    ce.classes = call->classes;
    ce.target = pointer<const int64_t>(call->target);
    ce.target_b = pointer<const int64_t>(call->target_b);
    ce.lam = pointer(call->lam);
    ce.shift = pointer(call->shift);
    ce.scale = pointer(call->scale);
    ce.margin = pointer(call->margin);
    ce.row_scale = pointer(call->row_scale);
    ce.weight = pointer(call->weight);
    ce.smoothing = pointer(call->smoothing);
    ce.label_scale = pointer(call->label_scale);
    ce.row_coef = pointer(call->row_coef);
    ce.focal_gamma = call->focal_gamma;
    ce.label_smoothing = call->label_smoothing;
    ce.ignore_index = call->ignore_index;
    ce.closed = {static_cast<Form>(call->form),
                 pointer(call->form_table),
                 pointer<const int64_t>(call->form_seed),
                 {call->option0, call->option1, call->option2}};
    ce.grad = pointer(call->grad);
    ce.grad_stride = call->grad_stride;
    job.row_coef_stride = call->row_coef_stride;
    job.reduction = static_cast<Reduction>(call->reduction);
    job.loss = pointer(call->loss);
    // Without rows Python knows the loss.
    return on_device(ce.rows, call->device, call->stream, call->dtype, [&](auto element, Where where) {
        return launch_rows<decltype(element)>(job, static_cast<Path>(call->path), pointer<double>(call->scratch),
                                              where);
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

const char* ltk_cuda_row_logsumexp(const ContrastCall* call) {
    ContrastJob job{};
    RowLogsumexp& rows = job.rows;
    rows.dots = pointer(call->dots);
    rows.stride = call->stride;
    rows.rows = call->rows;
    rows.columns = call->columns;
    rows.shift = pointer(call->shift);
    rows.row_scale = pointer<const double>(call->row_scale);
    rows.reference = pointer<const double>(call->reference);
    rows.own_begin = pointer<const int64_t>(call->own_begin);
    rows.own_end = pointer<const int64_t>(call->own_end);
    rows.absent = pointer<const int64_t>(call->absent);
    rows.loss = pointer<double>(call->loss);
    rows.weight = pointer<const double>(call->weight);
    rows.base = pointer<const double>(call->base);
    rows.bonus = pointer<const double>(call->bonus);
    rows.minus_own = call->minus_own != 0;
    rows.grad_base = pointer<double>(call->grad_base);
    rows.other = pointer<double>(call->other);
    rows.own = pointer<double>(call->own);
    rows.grad_other = pointer<const double>(call->grad_other);
    rows.grad_own = pointer<const double>(call->grad_own);
    rows.coefficients = call->coefficients != 0;
    return on_device(rows.rows, call->device, call->stream, call->dtype, [&](auto element, Where where) -> const char* {
        using T = decltype(element);
        if constexpr (std::is_floating_point_v<T>) return launch_contrast<T>(job, where);
        return "products are float32 or float64";
    });
}

const char* ltk_cuda_soft_targets(const SoftCall* call) {
    SoftJob job{};
    SoftTargets& soft = job.soft;
    soft.logits = pointer(call->logits);
    soft.logits_stride = call->logits_stride;
    soft.target = pointer(call->target);
    soft.target_stride = call->target_stride;
    soft.teacher = call->teacher != 0;
    soft.shift = pointer(call->shift);
    soft.scale = pointer(call->scale);
    soft.weight = pointer(call->weight);
    soft.row_coef = pointer(call->row_coef);
    soft.sigma = call->sigma;
    soft.keep = call->keep;
    soft.floor = call->floor;
    soft.rows = call->rows;
    soft.classes = call->classes;
    soft.row_loss = pointer(call->row_loss);
    soft.grad = pointer(call->grad);
    return on_device(soft.rows, call->device, call->stream, call->dtype,
                     [&](auto element, Where where) { return launch_soft<decltype(element)>(job, where); });
}

const char* ltk_cuda_scale(int64_t device, int64_t stream, int64_t dtype, int64_t x, int64_t n, int64_t factor,
                           int64_t expected) {
    const ScaleJob job{pointer(x), n, pointer(factor), pointer(expected)};
    return on_device(n, device, stream, dtype, [&](auto element, Where where) {
        using T = decltype(element);
        // As many as a large device holds at once, and where there is nothing to do, few enough to be gone at once.
        const int64_t blocks = (n + 4 * kScaleBlock * kVec<T> - 1) / (4 * kScaleBlock * kVec<T>);
        return launch(scale_elements<T>, {blocks < 264 ? blocks : 264, kScaleBlock}, where, job);
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
            return launch(logdet_warps<T>, {(batch + warps - 1) / warps, 32 * warps, 1, warps * bytes}, where, job);
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
        using T = decltype(element);
        const Plan chosen = choose<T>(ce, static_cast<Path>(path), aligned != 0 ? kVec<T> : 1, where.device);
        int64_t* out = pointer<int64_t>(plan);
        out[0] = chosen.registers;
        out[1] = chosen.threads;
        out[2] = chosen.block;
        out[3] = chosen.cluster;
        return nullptr;
    });
}

int64_t ltk_cuda_scratch(int64_t rows, int64_t classes, int64_t shift, int64_t scale, int64_t weight,
                         int64_t form_table) {
    return adjusted_ce_cuda_scratch(rows, classes, (shift != 0) + (scale != 0) + (weight != 0) + (form_table != 0));
}
}
