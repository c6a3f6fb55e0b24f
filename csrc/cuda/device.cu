// What the CUDA runtime sees.
#include "device.h"

#include <cuda_runtime_api.h>

namespace ltk {

int cuda_runtime_version() noexcept {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_device_count() noexcept {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace ltk
