// Starting a kernel on a stream of torch. A function call, not <<< >>>: so the tests compile the
// same file for a CPU (tests/ops/cuda_emulator).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace stellarator {

// Does not wait for the device. Throws what CUDA says if the kernel cannot start.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            void* stream, Arguments... arguments) {
    if (blocks > INT32_MAX) throw std::runtime_error(std::string(op) + ": too many elements");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": the CUDA kernel does not start: " +
                                 cudaGetErrorString(error));
    }
}

}  // namespace stellarator
