// Launching the kernels that move rows. Each exists twice: with bulk copies, and with copies through registers.
#pragma once

#include "cuda/call.h"
#include "cuda/check.h"
#include "cuda/pipeline.h"

namespace hpc_moe::cuda {

template <typename Params>
void launch_mover(void (*with_bulk_copies)(Params), void (*without)(Params), const Params& params, const Launch& launch,
                  const char* what) {
    const int num_shared_bytes = launch.bulk_copies ? shared_bytes(params.pipeline) : 0;
    auto* kernel = launch.bulk_copies ? with_bulk_copies : without;
    kernel<<<launch.num_blocks, kThreadsPerBlock, num_shared_bytes, launch.stream>>>(params);
    check(cudaGetLastError(), what);
}

// Loads what will be launched, so that nothing is loaded behind a kernel that spins. Without bulk copies, there may not
// be as much shared memory.
template <typename Params>
void prepare_mover(void (*with_bulk_copies)(Params), void (*without)(Params), bool bulk_copies) {
    if (bulk_copies) {
        check(cudaFuncSetAttribute(with_bulk_copies, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes),
              "loading a kernel");
    }
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, without), "loading a kernel");
}

}  // namespace hpc_moe::cuda
