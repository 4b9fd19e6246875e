// Launching a kernel, and loading it beforehand, so that none is loaded behind one that waits.
//
// For nvcc only. tests/emulation/cuda/launch.h has the same functions for the CPU.
#pragma once

#include "cuda/check.h"

namespace hpc_moe::cuda {

struct Grid {
    int num_blocks;
    int num_threads;  // of a block
    size_t shared_bytes;
    cudaStream_t stream;
};

// Throws if that fails. `what` was being done.
template <typename... Params, typename... Arguments>
void launch_kernel(const char* what, void (*kernel)(Params...), const Grid& grid, const Arguments&... arguments) {
    kernel<<<grid.num_blocks, grid.num_threads, grid.shared_bytes, grid.stream>>>(arguments...);
    check(cudaGetLastError(), what);
}

// `most_shared_bytes`: that it is ever launched with, where this may be more than 48 KiB.
template <typename... Params>
void load_kernel(void (*kernel)(Params...), int most_shared_bytes = 0) {
    if (most_shared_bytes > 0) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes),
              "loading a kernel");
    }
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
}

}  // namespace hpc_moe::cuda
