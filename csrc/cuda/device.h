// Present where the module was built with LTKERNELS_CUDA=ON. Both return 0 on a machine without a driver, and never
// fail.
#pragma once

namespace ltk {

int cuda_runtime_version() noexcept;  // as the runtime prints it: 13000 for 13.0
int cuda_device_count() noexcept;

}  // namespace ltk
