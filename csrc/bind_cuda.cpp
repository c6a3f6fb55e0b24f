// The kernels on a device, in builds that have them.
#include <utility>

#include "bind.h"
#include "cuda/entry.h"

namespace py = pybind11;

namespace ltk {

void bind_device(py::module_& m) {
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
        {"smoothing", &Call::smoothing},
        {"label_scale", &Call::label_scale},
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
    using Contrast = ltk::cuda::ContrastCall;
    py::class_<Contrast> contrast(m, "CudaContrastCall", "One call of the kernel of contrast (csrc/cuda/entry.h).");
    contrast.def(py::init([] { return Contrast{}; }));
    const std::pair<const char*, int64_t Contrast::*> fields[] = {
        {"device", &Contrast::device},
        {"stream", &Contrast::stream},
        {"dtype", &Contrast::dtype},
        {"dots", &Contrast::dots},
        {"stride", &Contrast::stride},
        {"rows", &Contrast::rows},
        {"columns", &Contrast::columns},
        {"shift", &Contrast::shift},
        {"row_scale", &Contrast::row_scale},
        {"reference", &Contrast::reference},
        {"own_begin", &Contrast::own_begin},
        {"own_end", &Contrast::own_end},
        {"absent", &Contrast::absent},
        {"loss", &Contrast::loss},
        {"weight", &Contrast::weight},
        {"base", &Contrast::base},
        {"bonus", &Contrast::bonus},
        {"minus_own", &Contrast::minus_own},
        {"grad_base", &Contrast::grad_base},
        {"other", &Contrast::other},
        {"own", &Contrast::own},
        {"grad_other", &Contrast::grad_other},
        {"grad_own", &Contrast::grad_own},
        {"coefficients", &Contrast::coefficients},
    };
    for (const auto& [name, member] : fields) contrast.def_readwrite(name, member);
    using Soft = ltk::cuda::SoftCall;
    py::class_<Soft> soft(m, "CudaSoftCall", "One call with soft targets on a device (csrc/cuda/entry.h).");
    soft.def(py::init([] { return Soft{}; }));
    const std::pair<const char*, int64_t Soft::*> rows[] = {
        {"device", &Soft::device},     {"stream", &Soft::stream},
        {"dtype", &Soft::dtype},       {"teacher", &Soft::teacher},
        {"logits", &Soft::logits},     {"logits_stride", &Soft::logits_stride},
        {"target", &Soft::target},     {"target_stride", &Soft::target_stride},
        {"rows", &Soft::rows},         {"classes", &Soft::classes},
        {"shift", &Soft::shift},       {"scale", &Soft::scale},
        {"weight", &Soft::weight},     {"row_coef", &Soft::row_coef},
        {"row_loss", &Soft::row_loss}, {"grad", &Soft::grad},
    };
    for (const auto& [name, member] : rows) soft.def_readwrite(name, member);
    const std::pair<const char*, double Soft::*> shares[] = {
        {"sigma", &Soft::sigma}, {"keep", &Soft::keep}, {"floor", &Soft::floor}};
    for (const auto& [name, member] : shares) soft.def_readwrite(name, member);
    m.def("cuda_soft_targets", &ltk_cuda_soft_targets, released, "Rows with soft targets.");
    m.def("cuda_row_logsumexp", &ltk_cuda_row_logsumexp, released, "Rows of products of contrast.");
    m.def("cuda_adjusted_ce", &ltk_cuda_adjusted_ce, released, "Loss and gradient.");
    m.def("cuda_row_statistics", &ltk_cuda_row_statistics, released, "Statistics of rows of a part of the classes.");
    m.def("cuda_gradient_from_statistics", &ltk_cuda_gradient_from_statistics, released, "Gradient of such a part.");
    m.def("cuda_scale", &ltk_cuda_scale, released, "A gradient times a number on the device.");
    m.def("cuda_logdet", &ltk_cuda_logdet, released, "Log-determinants of small SPD matrices.");
    m.def("cuda_plan", &ltk_cuda_plan, released, "The plan for a shape.");
    m.def("cuda_scratch", &ltk_cuda_scratch, "Doubles of scratch for a reduced loss.");
}

}  // namespace ltk
