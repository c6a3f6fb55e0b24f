// The only file that knows pybind11. Integers in (addresses, sizes, enums), the GIL released around the work, no logic:
// shapes, dtypes and devices were checked in Python, which also owns every buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/adjusted_ce.h"
#include "cpu/balance.h"
#include "cpu/experts.h"
#include "cpu/greedy.h"
#include "cpu/isa.h"
#include "cpu/logdet.h"
#include "cpu/nearest.h"
#include "cpu/row_logsumexp.h"
#include "cpu/row_statistics.h"
#include "cpu/sigmoid_ce.h"
#include "cpu/sinkhorn.h"
#include "cpu/soft_targets.h"
#include "cpu/subset_scores.h"
#include "cpu/vector_gradients.h"
#include "plain_call.h"
#if defined(LTK_HAVE_CUDA)
#include "cuda/device.h"
#include "cuda/entry.h"
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

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

py::dict info() {
    int count = 0;
    const ltk::IsaRow* rows = ltk::isa_rows(&count);
    const char* error = nullptr;
    const ltk::IsaRow* active = ltk::choose_isa(&error);
    py::dict isas;
    for (int i = 0; i < count; ++i)
        isas[rows[i].name] = rows[i].kernels == nullptr ? "not built"
                             : rows[i].supported        ? "usable"
                                                        : "not supported here";
    py::dict out;
    out["isa"] = active->name;
    out["isas"] = isas;
    out["compiler"] = __VERSION__;
#if defined(LTK_HAVE_CUDA)
    out["cuda"] = ltk::cuda_runtime_version();
    out["cuda_devices"] = ltk::cuda_device_count();
#else
    out["cuda"] = 0;
    out["cuda_devices"] = 0;
#endif
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    const char* error = nullptr;
    if (ltk::choose_isa(&error) == nullptr)
        throw py::import_error("ltkernels: LTKERNELS_ISA=" + std::string(std::getenv("LTKERNELS_ISA")) + ": " + error);

    if (!ltk::add_plain_call(m.ptr())) throw py::error_already_set();
    m.def("info", &info, "Instruction sets, the active one, compiler, CUDA runtime.");

    m.def(
        "exp_f32",
        [](Address x, Address y, int64_t n) { ltk::kernels().exp_f32(pointer<float>(x), pointer<float>(y), n); },
        "The vector exp of the active instruction set.");
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

    m.def("logdet_scratch", &ltk::logdet_scratch, "Doubles of scratch that one thread needs.");
    m.def(
        "logdet_batch",
        [](Address matrices, int64_t batch, int64_t n, Address scratch, Address out, int threads) {
            py::gil_scoped_release release;
            ltk::logdet_batch(pointer<const double>(matrices), batch, n, pointer<double>(scratch), pointer<double>(out),
                              threads);
        },
        "Log-determinants of `batch` SPD float64 n x n matrices.");
    // Bindings of further kernels: one m.def each, below.

    m.def(
        "balance",
        [](Address cost, int64_t rows, int64_t clusters, int64_t stride, Address capacity, float epsilon, Address price,
           Address label, Address scratch, Address bid) {
            ltk::Balance job{pointer<const float>(cost),
                             rows,
                             clusters,
                             stride,
                             pointer<const int64_t>(capacity),
                             epsilon,
                             pointer<float>(price),
                             pointer<int64_t>(label),
                             pointer<int64_t>(scratch),
                             pointer<float>(bid)};
            py::gil_scoped_release release;
            ltk::balance(job);
        },
        "Near-minimal assignment of rows to clusters of fixed capacity.");
    py::class_<ltk::Nearest>(m, "Nearest", "The k largest scores of every row (csrc/cpu/nearest.h).")
        .def(py::init(
            [](int64_t rows, int64_t k, int64_t room, Address score, Address column, Address kept, Address least) {
                return ltk::Nearest{
                    rows, k, room, pointer(score), pointer<int64_t>(column), pointer<int64_t>(kept), pointer(least)};
            }))
        .def("add",
             [](const ltk::Nearest& job, bool single, Address scores, int64_t stride, int64_t columns, int64_t first,
                int threads) {
                 py::gil_scoped_release release;
                 ltk::nearest_add(job, single, pointer(scores), stride, columns, first, threads);
             })
        .def("sort", [](const ltk::Nearest& job, bool single, int threads) {
            py::gil_scoped_release release;
            ltk::nearest_sort(job, single, threads);
        });
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
        "symmetric_rows",
        [](int dtype, Address dots, int64_t stride, int64_t rows, int64_t columns, double scale, double reference,
           Address factor, Address weight, int threads) {
            const ltk::SymmetricRows job{pointer(dots), stride,          rows,           columns, scale,
                                         reference,     pointer(factor), pointer(weight)};
            py::gil_scoped_release release;
            ltk::symmetric_rows(job, dtype, threads);
        },
        "Exponentials, or gradient factors, of the upper part of a symmetric matrix of products.");
    m.def("subset_scores_scratch", &ltk::subset_scores_scratch, "Elements of scratch that one thread needs.");
    m.def(
        "subset_scores",
        [](Address pool, Address pack_start, Address pack_size, Address pack_group, int64_t packs, int64_t d,
           Address basis, bool lower, Address scales, Address centre, double anchor, Address scratch, Address out,
           Address traces, bool single, int threads) {
            py::gil_scoped_release release;
            const auto run = [&](auto real) {
                using Real = decltype(real);
                ltk::SubsetScores<Real> job{};
                job.pool = pointer<const Real>(pool);
                job.pack_start = pointer<const int64_t>(pack_start);
                job.pack_size = pointer<const int64_t>(pack_size);
                job.pack_group = pointer<const int64_t>(pack_group);
                job.packs = packs;
                job.d = d;
                job.basis = pointer<const Real>(basis);
                job.lower = lower;
                job.scales = pointer<const Real>(scales);
                job.centre = pointer<const Real>(centre);
                job.anchor = anchor;
                job.out = pointer<double>(out);
                job.traces = pointer<double>(traces);
                ltk::subset_scores(job, pointer<Real>(scratch), threads);
            };
            single ? run(float()) : run(double());
        },
        "log det(I + Y'^T A^-1 Y') of every candidate subset.");

    py::class_<ltk::Greedy>(m, "Greedy", "One greedy run: addresses, sizes and state (csrc/cpu/greedy.h).")
        .def(py::init([](int64_t d, int64_t subsets, int64_t groups, bool single, double alpha) {
            ltk::Greedy job{};
            job.d = d;
            job.subsets = subsets;
            job.groups = groups;
            job.single = single;
            job.alpha = alpha;
            return job;
        }))
        .def("pool",
             [](ltk::Greedy& job, Address rows, Address offsets, Address group_of, Address group_size,
                Address group_begin, Address group_packed, Address norms) {
                 job.rows = pointer<const double>(rows);
                 job.offsets = pointer<const int64_t>(offsets);
                 job.group_of = pointer<const int64_t>(group_of);
                 job.group_size = pointer<const int64_t>(group_size);
                 job.group_begin = pointer<const int64_t>(group_begin);
                 job.group_packed = pointer<const int64_t>(group_packed);
                 job.norms = pointer<const double>(norms);
             })
        .def("state",
             [](ltk::Greedy& job, Address ids, Address left, Address packs, Address scatter, Address mean, double count,
                double anchor, Address scratch) {
                 job.ids = pointer<int64_t>(ids);
                 job.left = pointer<int64_t>(left);
                 job.packs = pointer(packs);
                 job.scatter = pointer<double>(scatter);
                 job.mean = pointer<double>(mean);
                 job.count = count;
                 job.anchor = anchor;
                 job.scratch = pointer<double>(scratch);
             })
        .def("rule",
             [](ltk::Greedy& job, int mode, double q, double low, double high, double tie, double stop) {
                 job.mode = static_cast<ltk::Mode>(mode);
                 job.q = q;
                 job.low = low;
                 job.high = high;
                 job.tie = tie;
                 job.stop = stop;
             })
        .def("steps",
             [](ltk::Greedy& job, int64_t steps, Address picked, Address values) {
                 job.steps = steps;
                 job.picked = pointer<int64_t>(picked);
                 job.values = pointer<double>(values);
             })
        .def(
            "pack", [](const ltk::Greedy& job) { ltk::greedy_pack(job); }, py::call_guard<py::gil_scoped_release>())
        .def_readonly("count", &ltk::Greedy::count)
        .def_readonly("anchor", &ltk::Greedy::anchor)
        .def_readonly("done", &ltk::Greedy::done)
        .def_readonly("scored", &ltk::Greedy::scored)
        .def_readonly("decided", &ltk::Greedy::decided);
    m.def("greedy_scratch", &ltk::greedy_scratch, "Doubles of scratch for one run.");
    m.def("greedy_packed", &ltk::greedy_packed, "Elements of the packs of `count` subsets of one size.");
    m.def(
        "greedy_runs",
        [](const std::vector<ltk::Greedy*>& runs, int threads) {
            std::vector<ltk::Greedy> jobs;
            for (const ltk::Greedy* run : runs) jobs.push_back(*run);
            {
                py::gil_scoped_release release;
                ltk::greedy_runs(jobs.data(), static_cast<int64_t>(jobs.size()), threads);
            }
            for (size_t i = 0; i < jobs.size(); ++i) *runs[i] = jobs[i];
        },
        "The next steps of independent runs.");
#if defined(LTK_HAVE_CUDA)
    // Each returns None or an error message.
    const py::call_guard<py::gil_scoped_release> released;
    using Call = ltk::cuda::LossCall;
    py::class_<Call> call(m, "CudaLossCall", "One call of the loss on a device (csrc/cuda/entry.h).");
    call.def(py::init([] { return Call{}; }));
    const std::pair<const char*, int64_t Call::*> integers[] = {
        {"device", &Call::device},
        {"stream", &Call::stream},
        {"path", &Call::path},
        {"dtype", &Call::dtype},
        {"logits", &Call::logits},
        {"logits_stride", &Call::logits_stride},
        {"rows", &Call::rows},
        {"classes", &Call::classes},
        {"target", &Call::target},
        {"target_b", &Call::target_b},
        {"lam", &Call::lam},
        {"ignore_index", &Call::ignore_index},
        {"shift", &Call::shift},
        {"scale", &Call::scale},
        {"margin", &Call::margin},
        {"row_scale", &Call::row_scale},
        {"weight", &Call::weight},
        {"row_coef", &Call::row_coef},
        {"reduction", &Call::reduction},
        {"row_coef_stride", &Call::row_coef_stride},
        {"loss", &Call::loss},
        {"grad", &Call::grad},
        {"scratch", &Call::scratch},
        {"grad_stride", &Call::grad_stride},
        {"form", &Call::form},
        {"form_table", &Call::form_table},
        {"form_seed", &Call::form_seed},
    };
    for (const auto& [name, member] : integers) call.def_readwrite(name, member);
    const std::pair<const char*, double Call::*> numbers[] = {
        {"focal_gamma", &Call::focal_gamma}, {"label_smoothing", &Call::label_smoothing},
        {"option0", &Call::option0},         {"option1", &Call::option1},
        {"option2", &Call::option2},
    };
    for (const auto& [name, member] : numbers) call.def_readwrite(name, member);
    m.def("cuda_adjusted_ce", &ltk_cuda_adjusted_ce, released, "Loss and gradient.");
    m.def("cuda_row_statistics", &ltk_cuda_row_statistics, released, "Statistics of rows of a part of the classes.");
    m.def("cuda_gradient_from_statistics", &ltk_cuda_gradient_from_statistics, released, "Gradient of such a part.");
    m.def("cuda_scale", &ltk_cuda_scale, released, "A gradient times a number on the device.");
    m.def("cuda_logdet", &ltk_cuda_logdet, released, "Log-determinants of small SPD matrices.");
    m.def("cuda_plan", &ltk_cuda_plan, released, "The plan for a shape.");
    m.def("cuda_scratch", &ltk_cuda_scratch, "Doubles of scratch for a reduced loss.");
#endif
}
