// The losses: softmax, soft targets, experts, sigmoid, parts of the classes, contrast.
#include <pybind11/stl.h>

#include <utility>

#include "bind.h"
#include "cpu/adjusted_ce.h"
#include "cpu/experts.h"
#include "cpu/isa.h"
#include "cpu/row_logsumexp.h"
#include "cpu/row_statistics.h"
#include "cpu/self_contrast.h"
#include "cpu/sigmoid_ce.h"
#include "cpu/sinkhorn.h"
#include "cpu/soft_targets.h"
#include "cpu/vector_gradients.h"

namespace py = pybind11;

namespace ltk {
namespace {

// One call of the loss: the kernel's record, and what the caller of the kernel keeps beside it.
struct LossCall {
    ltk::AdjustedCe job{};
    int dtype = 0;
    ltk::VectorGradients gradients{};
};

// One call with targets that are rows over the classes, one of coupled experts, and one of the sigmoid loss.
struct SoftCall {
    ltk::SoftTargets job{};
    int dtype = 0;
};
struct ExpertsCall {
    ltk::Experts job{};
    int dtype = 0;
};
struct SigmoidCall {
    ltk::SigmoidCe job{};
    int dtype = 0;
};

// `order` is followed by both ends of every row's range: 3 x rows numbers.
ltk::SelfRows self_rows(int64_t kept, int64_t all, int64_t width, Address unit, Address inverse, Address order) {
    int64_t* at = pointer<int64_t>(order);
    return {kept, width, pointer(unit), pointer<double>(inverse), at, at + all, at + 2 * all};
}

}  // namespace

void bind_losses(py::module_& m) {
    m.attr("ADJUSTED_CE_STACK") = ltk::kStack;
    m.def("adjusted_ce_scratch", &ltk::adjusted_ce_scratch, "Reals of scratch that one thread needs.");
    m.def("vector_gradients_scratch", &ltk::vector_gradients_scratch,
          "Doubles of scratch for the tables' gradients of one call.");
    py::class_<LossCall>(m, "AdjustedCe",
                         "One call of the loss: addresses, sizes and options (csrc/cpu/adjusted_ce.h).")
        .def(py::init([](int dtype, Address logits, int64_t stride, int64_t rows, int64_t classes, Address target,
                         int64_t ignore_index) {
            LossCall call;
            call.dtype = dtype;
            call.job.logits = pointer(logits);
            call.job.logits_stride = stride;
            call.job.rows = rows;
            call.job.classes = classes;
            call.job.target = pointer<const int64_t>(target);
            call.job.ignore_index = ignore_index;
            return call;
        }))
        .def("mixed",
             [](LossCall& call, Address target_b, Address lam) {
                 call.job.target_b = pointer<const int64_t>(target_b);
                 call.job.lam = pointer(lam);
             })
        .def("tables",
             [](LossCall& call, Address shift, Address scale, Address margin, Address row_scale, Address weight) {
                 call.job.shift = pointer(shift);
                 call.job.scale = pointer(scale);
                 call.job.margin = pointer(margin);
                 call.job.row_scale = pointer(row_scale);
                 call.job.weight = pointer(weight);
             })
        .def("inputs",
             [](LossCall& call, Address sample_weight, Address smoothing, Address label_scale) {
                 call.job.sample_weight = pointer(sample_weight);
                 call.job.smoothing = pointer(smoothing);
                 call.job.label_scale = pointer(label_scale);
             })
        .def("options",
             [](LossCall& call, double focal_gamma, double label_smoothing) {
                 call.job.focal_gamma = focal_gamma;
                 call.job.label_smoothing = label_smoothing;
             })
        .def("closed",
             [](LossCall& call, int form, Address table, Address seed, double a, double b, double c) {
                 call.job.closed = {
                     static_cast<ltk::Form>(form), pointer(table), pointer<const int64_t>(seed), {a, b, c}};
             })
        .def("gradient",
             [](LossCall& call, Address grad, int64_t stride, Address row_coef) {
                 call.job.grad = pointer(grad);
                 call.job.grad_stride = stride;
                 call.job.row_coef = pointer(row_coef);
             })
        .def("gradients_of_tables",
             [](LossCall& call, Address scratch, Address shift, Address scale, Address margin, Address row_scale,
                Address weight) {
                 void* out[ltk::kTables] = {pointer(shift), pointer(scale), pointer(margin), pointer(row_scale),
                                            pointer(weight)};
                 call.gradients = ltk::vector_gradients(call.job, out, pointer<double>(scratch),
                                                        call.dtype == static_cast<int>(ltk::DType::f64));
                 call.job.vectors = &call.gradients;
             })
        .def(
            "run",
            [](LossCall& call, int reduction, Address row_loss, Address loss, Address scratch, int threads) {
                call.job.row_loss = pointer(row_loss);
                return ltk::adjusted_ce(call.job, call.dtype, static_cast<ltk::Reduction>(reduction), pointer(loss),
                                        pointer(scratch), threads);
            },
            py::call_guard<py::gil_scoped_release>(), "Loss and gradient; -1, or the first row with a bad label.");

    py::class_<SoftCall>(m, "SoftTargets", "One call with soft targets (csrc/cpu/soft_targets.h).")
        .def(py::init([](int dtype, Address logits, int64_t stride, int64_t rows, int64_t classes) {
            SoftCall call;
            call.dtype = dtype;
            call.job.logits = pointer(logits);
            call.job.logits_stride = stride;
            call.job.rows = rows;
            call.job.classes = classes;
            call.job.sigma = call.job.keep = call.job.factor = 1.0;
            return call;
        }))
        .def("target",
             [](SoftCall& call, Address target, int64_t stride, bool real_target, bool teacher) {
                 call.job.target = pointer(target);
                 call.job.target_stride = stride;
                 call.job.real_target = real_target;
                 call.job.teacher = teacher;
             })
        .def("tables",
             [](SoftCall& call, Address shift, Address scale, Address weight) {
                 call.job.shift = pointer(shift);
                 call.job.scale = pointer(scale);
                 call.job.weight = pointer(weight);
             })
        .def("options",
             [](SoftCall& call, double factor, double sigma, double keep, double floor) {
                 call.job.factor = factor;
                 call.job.sigma = sigma;
                 call.job.keep = keep;
                 call.job.floor = floor;
             })
        .def("rows",
             [](SoftCall& call, Address row_weight, Address row_coef) {
                 call.job.row_weight = pointer(row_weight);
                 call.job.row_coef = pointer(row_coef);
             })
        .def(
            "run",
            [](SoftCall& call, int reduction, Address row_loss, Address loss, Address grad, Address scratch,
               int threads) {
                call.job.row_loss = pointer(row_loss);
                call.job.grad = pointer(grad);
                return ltk::soft_targets(call.job, call.dtype, static_cast<ltk::Reduction>(reduction), pointer(loss),
                                         pointer(scratch), threads);
            },
            py::call_guard<py::gil_scoped_release>(), "Loss and gradient; -1, or the first row with a bad target.");
    m.attr("EXPERTS") = ltk::kExperts;
    m.def("experts_scratch", &ltk::experts_scratch, "Reals of scratch that one thread needs.");
    py::class_<ExpertsCall>(m, "Experts", "One call of coupled experts (csrc/cpu/experts.h).")
        .def(py::init([](int dtype, int coupling, bool adjusted, double sigma, Address inverse_temperature) {
            ExpertsCall call;
            call.dtype = dtype;
            call.job.coupling = static_cast<ltk::Coupling>(coupling);
            call.job.adjusted = adjusted;
            call.job.sigma = sigma;
            call.job.inverse_temperature = pointer(inverse_temperature);
            return call;
        }))
        .def("add",
             [](ExpertsCall& call, const LossCall& expert, double factor) {
                 call.job.expert[call.job.experts] = expert.job;
                 call.job.factor[call.job.experts++] = factor;
             })
        .def("joint",
             [](ExpertsCall& call, const LossCall& loss, double factor) {
                 call.job.joint = loss.job;
                 call.job.factor[call.job.experts] = factor;
             })
        .def(
            "run",
            [](ExpertsCall& call, int reduction, Address row_loss, Address loss, Address scratch, int threads) {
                call.job.row_loss = pointer(row_loss);
                return ltk::experts_ce(call.job, call.dtype, static_cast<ltk::Reduction>(reduction), pointer(loss),
                                       pointer(scratch), threads);
            },
            py::call_guard<py::gil_scoped_release>(), "Loss and gradients; -1, or what is refused.");

    const auto part = [](Address logits, int64_t logits_stride, int64_t rows, int64_t classes, Address target,
                         Address shift, Address scale, Address weight, Address row_scale) {
        ltk::ClassPart out{};
        out.logits = pointer(logits);
        out.logits_stride = logits_stride;
        out.target = pointer<const int64_t>(target);
        out.shift = pointer(shift);
        out.scale = pointer(scale);
        out.weight = pointer(weight);
        out.row_scale = pointer<const double>(row_scale);
        out.rows = rows;
        out.classes = classes;
        return out;
    };
    m.def(
        "row_statistics",
        [part](int dtype, Address logits, int64_t logits_stride, int64_t rows, int64_t classes, Address target,
               Address shift, Address scale, Address weight, Address row_scale, bool smooth, Address out, int threads) {
            const ltk::ClassPart job =
                part(logits, logits_stride, rows, classes, target, shift, scale, weight, row_scale);
            py::gil_scoped_release release;
            ltk::row_statistics(job, dtype, smooth, pointer<double>(out), threads);
        },
        "Reference, sum of exponentials, label logit and smoothing sum of every row.");
    m.def(
        "row_maxima",
        [part](int dtype, Address logits, int64_t logits_stride, int64_t rows, int64_t classes, Address target,
               Address shift, Address scale, Address weight, Address row_scale, Address out, Address index,
               int threads) {
            const ltk::ClassPart job =
                part(logits, logits_stride, rows, classes, target, shift, scale, weight, row_scale);
            py::gil_scoped_release release;
            ltk::row_maxima(job, dtype, pointer<double>(out), pointer<int64_t>(index), threads);
        },
        "The statistics of every row whose reference is its largest other logit, and which that is.");
    m.def(
        "gradient_from_statistics",
        [part](int dtype, Address logits, int64_t logits_stride, int64_t rows, int64_t classes, Address target,
               Address shift, Address scale, Address weight, Address row_scale, Address row, Address grad,
               int64_t grad_stride, int threads) {
            const ltk::ClassPart job =
                part(logits, logits_stride, rows, classes, target, shift, scale, weight, row_scale);
            py::gil_scoped_release release;
            ltk::gradient_from_statistics(job, dtype, pointer<const double>(row), pointer(grad), grad_stride, threads);
        },
        "The gradient of every row from its statistics.");
    // The sigmoid loss (csrc/cpu/sigmoid_ce.h).
    m.def("sigmoid_ce_columns", &ltk::sigmoid_ce_columns, "Reals of scratch for the statistics of one call.");
    py::class_<SigmoidCall>(m, "SigmoidCe", "One call of the sigmoid loss: addresses, sizes and options.")
        .def(py::init(
            [](int dtype, Address logits, int64_t stride, int64_t rows, int64_t classes, int64_t ignore_index) {
                SigmoidCall call;
                call.dtype = dtype;
                call.job.logits = pointer(logits);
                call.job.logits_stride = stride;
                call.job.rows = rows;
                call.job.classes = classes;
                call.job.ignore_index = ignore_index;
                return call;
            }))
        .def("labels",
             [](SigmoidCall& call, Address target, Address weight) {
                 call.job.target = pointer<const int64_t>(target);
                 call.job.weight = pointer(weight);
             })
        .def("multi_label",
             [](SigmoidCall& call, Address hot, int64_t stride, bool bytes) {
                 call.job.hot = pointer(hot);
                 call.job.hot_stride = stride;
                 call.job.hot_type = bytes ? ltk::Hot::u8 : ltk::Hot::f32;
             })
        .def("tables",
             [](SigmoidCall& call, Address scale, Address shift, Address positive, Address negative,
                Address sample_weight) {
                 call.job.tables.scale = pointer(scale);
                 call.job.tables.shift = pointer(shift);
                 call.job.tables.positive = pointer(positive);
                 call.job.tables.negative = pointer(negative);
                 call.job.sample_weight = pointer(sample_weight);
             })
        .def("options",
             [](SigmoidCall& call, double threshold, double negative_scale, double focal_gamma) {
                 call.job.tables.threshold = threshold;
                 call.job.tables.negative_scale = negative_scale;
                 call.job.tables.focal_gamma = focal_gamma;
             })
        .def("rebalance",
             [](SigmoidCall& call, Address table, double a, double b, double c) {
                 call.job.tables.rebalance = pointer(table);
                 const double map[] = {a, b, c};
                 for (int k = 0; k < 3; ++k) call.job.tables.map[k] = map[k];
             })
        .def("gradient",
             [](SigmoidCall& call, Address grad, Address row_coef) {
                 call.job.grad = pointer(grad);
                 call.job.row_coef = pointer(row_coef);
             })
        .def("statistics",
             [](SigmoidCall& call, Address out, Address columns) {
                 call.job.statistics = pointer(out);
                 call.job.columns = pointer(columns);
             })
        .def(
            "run",
            [](SigmoidCall& call, int reduction, double upstream, Address row_loss, Address loss, int threads) {
                call.job.row_loss = pointer(row_loss);
                return ltk::sigmoid_ce(call.job, call.dtype, reduction, upstream, pointer(loss), threads);
            },
            py::call_guard<py::gil_scoped_release>(), "Loss, gradient and statistics; the status of sigmoid_ce.");

    m.def(
        "sinkhorn",
        [](bool single, Address similarities, int64_t stride, int64_t rows, int64_t classes, Address prior,
           double inverse, double tolerance, int64_t limit, Address labels, Address potential, Address shift,
           Address columns) {
            ltk::Sinkhorn job{};
            job.similarities = pointer(similarities);
            job.stride = stride;
            job.rows = rows;
            job.classes = classes;
            job.prior = pointer<const double>(prior);
            job.inverse = inverse;
            job.tolerance = tolerance;
            job.limit = limit;
            job.labels = pointer(labels);
            job.potential = pointer<double>(potential);
            job.shift = pointer(shift);
            job.columns = pointer<double>(columns);
            {
                py::gil_scoped_release release;
                ltk::sinkhorn(job, single);
            }
            return std::make_pair(job.error, job.iterations);
        },
        "Soft labels with given class shares; the error and the number of iterations.");
    py::class_<ltk::RowLogsumexp>(m, "RowLogsumexp", "Two log-sum-exps a row (csrc/cpu/row_logsumexp.h).")
        .def(py::init([](Address dots, int64_t stride, int64_t rows, int64_t columns, Address shift, Address row_scale,
                         Address reference) {
            ltk::RowLogsumexp job{};
            job.dots = pointer(dots);
            job.stride = stride;
            job.rows = rows;
            job.columns = columns;
            job.shift = pointer(shift);
            job.row_scale = pointer<const double>(row_scale);
            job.reference = pointer<const double>(reference);
            return job;
        }))
        .def("groups",
             [](ltk::RowLogsumexp& job, Address own_begin, Address own_end, Address absent) {
                 job.own_begin = pointer<const int64_t>(own_begin);
                 job.own_end = pointer<const int64_t>(own_end);
                 job.absent = pointer<const int64_t>(absent);
             })
        .def("loss",
             [](ltk::RowLogsumexp& job, Address loss, Address weight, Address base, Address bonus, bool minus_own,
                Address grad_base) {
                 job.loss = pointer<double>(loss);
                 job.weight = pointer<const double>(weight);
                 job.base = pointer<const double>(base);
                 job.bonus = pointer<const double>(bonus);
                 job.minus_own = minus_own;
                 job.grad_base = pointer<double>(grad_base);
             })
        .def("values",
             [](ltk::RowLogsumexp& job, Address other, Address own, Address grad_other, Address grad_own) {
                 job.other = pointer<double>(other);
                 job.own = pointer<double>(own);
                 job.grad_other = pointer<const double>(grad_other);
                 job.grad_own = pointer<const double>(grad_own);
             })
        .def(
            "run",
            [](ltk::RowLogsumexp& job, int dtype, bool coefficients, int threads) {
                job.coefficients = coefficients;
                ltk::row_logsumexp(job, dtype, threads);
            },
            py::call_guard<py::gil_scoped_release>());
    m.def(
        "self_contrast_start",
        [](int dtype, Address features, int64_t stride, int64_t all, int64_t width, Address labels,
           int64_t ignore_index, double eps, Address unit, Address inverse, Address order, Address positive,
           Address scratch, int threads) {
            ltk::SelfStart job{self_rows(all, all, width, unit, inverse, order), pointer(features), stride, eps,
                               pointer<double>(positive)};
            py::gil_scoped_release release;
            ltk::self_contrast_start(job, pointer<const int64_t>(labels), all, ignore_index, dtype, pointer(scratch),
                                     threads);
            return job.rows.kept;
        },
        "Unit rows in the order of their labels, and the sums of their products with their positives.");
    m.def(
        "self_contrast_products",
        [](int dtype, Address products, int64_t stride, int64_t rows, int64_t columns, double scale, Address total,
           Address factor, bool kept, int threads) {
            const ltk::SelfProducts job{pointer(products),      stride,          rows, columns, scale,
                                        pointer<double>(total), pointer(factor), kept};
            py::gil_scoped_release release;
            ltk::self_contrast_products(job, dtype, threads);
        },
        "Exponentials of products, or the factors of the gradient's product.");
    m.def(
        "self_contrast_losses",
        [](int dtype, int64_t kept, int64_t all, Address order, double scale, double alpha, double beta, double gamma,
           Address positive, Address total, Address weight, Address upstream, Address base, Address linear,
           Address loss, Address of_base, Address of_linear, Address factor, Address slope, int reduction) {
            const ltk::SelfLosses job{self_rows(kept, all, 0, 0, 0, order),
                                      all,
                                      scale,
                                      alpha,
                                      beta,
                                      gamma,
                                      pointer<const double>(positive),
                                      pointer<const double>(total),
                                      pointer<const double>(weight),
                                      pointer<const double>(upstream),
                                      pointer<const double>(base),
                                      pointer<const double>(linear),
                                      pointer<double>(loss),
                                      pointer<double>(of_base),
                                      pointer<double>(of_linear),
                                      pointer(factor),
                                      pointer<double>(slope)};
            return ltk::self_contrast_losses(job, static_cast<ltk::Reduction>(reduction), dtype);
        },
        "The losses of the rows, their sum, and the factors of the gradient.");
    m.def(
        "self_contrast_gradient",
        [](int dtype, int64_t kept, int64_t all, int64_t width, Address unit, Address inverse, Address order,
           double scale, Address slope, Address products, Address along, Address out, Address scratch, int threads) {
            const ltk::SelfGradient job{self_rows(kept, all, width, unit, inverse, order),
                                        scale,
                                        pointer<const double>(slope),
                                        pointer(products),
                                        pointer<double>(along),
                                        pointer(out)};
            py::gil_scoped_release release;
            return ltk::self_contrast_gradient(job, all, dtype, pointer(scratch), threads);
        },
        "The gradient of the rows before they were made unit ones; returns that of the scale.");
}

}  // namespace ltk
