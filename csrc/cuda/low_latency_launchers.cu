// The launches of this module's low-latency kernels. hpc_moe._C and hpc_moe._nvshmem have them compiled differently
// (device/transport.cuh); the runtime, which is in hpc_moe._C, launches those of either.
#include "cuda/device/transport.cuh"
#include "cuda/low_latency.h"

namespace hpc_moe::cuda {

const LowLatencyLaunchers& low_latency_launchers() {
    static const LowLatencyLaunchers launchers = {
        launch_low_latency_dispatch,
        launch_low_latency_combine,
        launch_low_latency_reject,
        [] {
            prepare_low_latency_dispatch();
            prepare_low_latency_combine();
            prepare_low_latency_reject();
        },
        kServedRanks,
    };
    return launchers;
}

}  // namespace hpc_moe::cuda
