// What the files that know pybind11 share; they are bind*.cpp. Integers in (addresses, sizes, enums), the GIL released
// around the work, no logic: shapes, dtypes and devices were checked in Python, which also owns every buffer.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace ltk {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_losses(pybind11::module_& m);
void bind_features(pybind11::module_& m);
#if defined(LTK_HAVE_CUDA)
void bind_device(pybind11::module_& m);
#endif

}  // namespace ltk
