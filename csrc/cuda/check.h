// CUDA's error codes as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hpc_moe::cuda {

// Throws std::runtime_error unless `code` is success. `what` was being done.
inline void check(cudaError_t code, const char* what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // forget it: the next call is not to blame
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorName(code) + " (" +
                             cudaGetErrorString(code) + ")");
}

}  // namespace hpc_moe::cuda
