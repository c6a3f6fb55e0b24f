// The module: what it was built with, and the functions of the other bind*.cpp.
#include "bind.h"

#include <string>

#include "cpu/isa.h"
#include "plain_call.h"
#if defined(LTK_HAVE_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

using ltk::Address;
using ltk::pointer;

py::dict info() {
    int count = 0;
    const ltk::IsaRow* rows = ltk::isa_rows(&count);
    py::dict isas;
    for (int i = 0; i < count; ++i)
        isas[rows[i].name] = rows[i].kernels == nullptr ? "not built"
                             : rows[i].supported        ? "usable"
                                                        : "not supported here";
    py::dict out;
    out["isa"] = ltk::active_isa().name;
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

// Without py::mod_gil_not_used: a free-threaded Python turns its GIL on for a module that does not say that it needs
// none, and that it needs none has not been tested (csrc/README.md).
PYBIND11_MODULE(_C, m) {
    const char* error = nullptr;
    if (ltk::choose_isa(&error) == nullptr)
        throw py::import_error("ltkernels: LTKERNELS_ISA=" + std::string(std::getenv("LTKERNELS_ISA")) + ": " + error);

    if (!ltk::add_plain_call(m.ptr())) throw py::error_already_set();
    m.def("info", &info, "Instruction sets, the active one, compiler, CUDA runtime.");

    m.def(
        "exp_f32",
        [](Address x, Address y, int64_t n) { ltk::kernels().exp_f32(pointer<float>(x), pointer<float>(y), n); },
        "The vector exp of the active instruction set.");
    ltk::bind_losses(m);
    ltk::bind_features(m);
#if defined(LTK_HAVE_CUDA)
    ltk::bind_device(m);
#endif
}
