// The only file that knows pybind11. Integers in (addresses, sizes, enums), the GIL released around the work, no logic:
// shapes, dtypes and devices were checked in Python, which also owns every buffer.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/adjusted_ce.h"
#include "cpu/balance.h"
#include "cpu/isa.h"
#include "cpu/logdet.h"
#include "cpu/subset_scores.h"
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

// () or (form, table, seed, option, option, option).
ltk::ClosedForm closed_form(const py::tuple& closed) {
    ltk::ClosedForm out{};
    if (closed.empty()) return out;
    out.form = static_cast<ltk::Form>(closed[0].cast<int>());
    out.table = pointer(closed[1].cast<Address>());
    out.seed = pointer<const int64_t>(closed[2].cast<Address>());
    for (size_t i = 0; i < 3; ++i) out.options[i] = closed[3 + i].cast<double>();
    return out;
}

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

    m.def("info", &info, "Instruction sets, the active one, compiler, CUDA runtime.");

    m.def(
        "exp_f32",
        [](Address x, Address y, int64_t n) { ltk::kernels().exp_f32(pointer<float>(x), pointer<float>(y), n); },
        "The vector exp of the active instruction set.");
    m.attr("ADJUSTED_CE_STACK") = ltk::kStack;
    m.def("adjusted_ce_scratch", &ltk::adjusted_ce_scratch, "Reals of scratch that one thread needs.");
    m.def(
        "adjusted_ce",
        [](int dtype, Address logits, int64_t logits_stride, int64_t rows, int64_t classes, Address target,
           Address target_b, Address lam, Address shift, Address scale, Address margin, Address row_scale,
           Address weight, Address row_coef, double focal_gamma, double label_smoothing, int64_t ignore_index,
           int reduction, Address row_loss, Address loss, Address grad, int64_t grad_stride, Address scratch,
           int threads, const py::tuple& closed) {
            ltk::AdjustedCe job{};
            job.logits = pointer(logits);
            job.logits_stride = logits_stride;
            job.target = pointer<const int64_t>(target);
            job.target_b = pointer<const int64_t>(target_b);
            job.lam = pointer(lam);
            job.shift = pointer(shift);
            job.scale = pointer(scale);
            job.margin = pointer(margin);
            job.row_scale = pointer(row_scale);
            job.weight = pointer(weight);
            job.row_coef = pointer(row_coef);
            job.focal_gamma = focal_gamma;
            job.label_smoothing = label_smoothing;
            job.ignore_index = ignore_index;
            job.rows = rows;
            job.classes = classes;
            job.row_loss = pointer(row_loss);
            job.grad = pointer(grad);
            job.grad_stride = grad_stride;
            job.closed = closed_form(closed);
            py::gil_scoped_release release;
            return ltk::adjusted_ce(job, dtype, static_cast<ltk::Reduction>(reduction), pointer(loss), pointer(scratch),
                                    threads);
        },
        "Loss and gradient; -1, or the first row with a bad label.");

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
    m.def("subset_scores_scratch", &ltk::subset_scores_scratch, "Doubles of scratch that one thread needs.");
    m.def(
        "subset_scores",
        [](Address pool, Address pack_start, Address pack_size, Address pack_scale, int64_t packs, int64_t d,
           Address basis, bool lower, Address scales, Address centre, double anchor, Address scratch, Address out,
           Address within, int threads) {
            ltk::SubsetScores job{};
            job.pool = pointer<const double>(pool);
            job.pack_start = pointer<const int64_t>(pack_start);
            job.pack_size = pointer<const int64_t>(pack_size);
            job.pack_scale = pointer<const int64_t>(pack_scale);
            job.packs = packs;
            job.d = d;
            job.basis = pointer<const double>(basis);
            job.lower = lower;
            job.scales = pointer<const double>(scales);
            job.centre = pointer<const double>(centre);
            job.anchor = anchor;
            job.out = pointer<double>(out);
            job.within = pointer<double>(within);
            py::gil_scoped_release release;
            ltk::subset_scores(job, pointer<double>(scratch), threads);
        },
        "log det(I + Y'^T A^-1 Y') of every candidate subset.");
#if defined(LTK_HAVE_CUDA)
    // Each returns None or an error message.
    const py::call_guard<py::gil_scoped_release> released;
    m.def("cuda_adjusted_ce", &ltk_cuda_adjusted_ce, released, "Loss and gradient.");
    m.def("cuda_row_statistics", &ltk_cuda_row_statistics, released, "Statistics of rows, or the gradient from them.");
    m.def("cuda_scale", &ltk_cuda_scale, released, "A gradient times a number on the device.");
    m.def("cuda_logdet", &ltk_cuda_logdet, released, "Log-determinants of small SPD matrices.");
    m.def("cuda_plan", &ltk_cuda_plan, released, "The plan for a shape.");
    m.def("cuda_scratch", &ltk_cuda_scratch, "Doubles of scratch for a reduced loss.");
#endif
}
