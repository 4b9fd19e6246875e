// Launching a kernel, and loading it beforehand, so that none is loaded behind one that waits.
//
// tests/emulation/cuda/launch.h has the same functions for the CPU.
#pragma once

#include "cuda/check.h"

namespace hpc_moe::cuda {

struct Grid {
    int num_blocks;
    int num_threads;  // of a block
    size_t shared_bytes;
    cudaStream_t stream;
    // The kernel may begin while the one in front of it on the stream ends, and calls wait_for_earlier_kernels() before
    // it looks at anything but its parameters (CUDA's programmatic dependent launch).
    bool begins_early = false;
};

// Throws if that fails. `what` was being done.
template <typename... Params, typename... Arguments>
void launch_kernel(const char* what, void (*kernel)(Params...), const Grid& grid, const Arguments&... arguments) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.num_blocks);
    config.blockDim = dim3(grid.num_threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = grid.stream;
    config.attrs = &early;
    config.numAttrs = grid.begins_early ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
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
