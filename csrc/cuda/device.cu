// What the CUDA runtime sees. The only CUDA code so far: the loss kernels of the GPU back end build on it.
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
