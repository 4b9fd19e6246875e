// Stands in for csrc/cuda/launch.h: kernels run to their ends, on the CPU.
#pragma once

#include "device.h"

namespace hpc_moe::cuda {
namespace {

// Shared memory whose size the launch says. It goes by the name that kernels give it, since that is how they find it.
[[maybe_unused]] thread_local int32_t numbers[4096];

}  // namespace

struct Grid {
    int num_blocks;
    int num_threads;
    size_t shared_bytes;
    cudaStream_t stream;
    bool begins_early = false;
};

template <typename... Params, typename... Arguments>
void launch_kernel(const char* what, void (*kernel)(Params...), const Grid& grid, const Arguments&... arguments) {
    if (grid.shared_bytes > sizeof numbers || grid.num_threads > emulation::kMaxThreads) {
        fprintf(stderr, "%s: too large for the emulation\n", what);
        abort();
    }
    emulation::launch(grid.num_blocks, grid.num_threads, [&] { kernel(arguments...); });
}

template <typename... Params>
void load_kernel(void (*)(Params...), int = 0) {}

}  // namespace hpc_moe::cuda
