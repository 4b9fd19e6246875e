// Ranks that low-latency calls go on without: changes from the host, and the fresh start that lets one come back.
//
// A fresh start takes place while no rank that takes part has a kernel under way: their host sides agree on it, each
// after it has waited for its own. Then all of them go on counting calls from the same number, above all earlier ones,
// so that nothing which a rank wrote while it was masked can be taken for a later call's.
#include "cuda/device/low_latency.cuh"
#include "cuda/launch.h"

namespace hpc_moe::cuda {
namespace {

__global__ void mask_ranks(LowLatencyState* state, uint32_t ranks) { atomicOr(&state->masked, ranks); }

__global__ void query_masks(const LowLatencyState* state, int num_ranks, int32_t* masked) {
    const int rank = threadIdx.x;
    if (rank < num_ranks) masked[rank] = state->masked >> rank & 1u;
}

// A thread for each block of later kernels.
__global__ void restart(LowLatencyState* state, LowLatencyControl* own, int num_ranks, uint64_t epoch,
                        uint32_t masked) {
    LowLatencyState::OfBlock& counters = state->of_block[threadIdx.x];
    for (int kind = 0; kind < kNumLowLatencyKinds; ++kind) {
        counters.sent[kind] = counters.received[kind] = epoch;
        if (static_cast<int>(threadIdx.x) < num_ranks) own->consumed[kind][threadIdx.x] = epoch;
    }
    counters.shape = 0;
    if (threadIdx.x == 0) state->masked = masked;
}

}  // namespace

void launch_mask_ranks(LowLatencyState* state, uint32_t ranks, cudaStream_t stream) {
    launch_kernel("masking ranks", mask_ranks, {1, 1, 0, stream}, state, ranks);
}

void launch_query_masks(const LowLatencyState* state, int num_ranks, int32_t* masked, cudaStream_t stream) {
    launch_kernel("reading which ranks are masked", query_masks, {1, 32, 0, stream}, state, num_ranks, masked);
}

void launch_restart(LowLatencyState* state, LowLatencyControl* own, int num_ranks, uint64_t epoch, uint32_t masked,
                    cudaStream_t stream) {
    launch_kernel("restarting low-latency calls", restart, {1, kMaxBlocks, 0, stream}, state, own, num_ranks, epoch,
                  masked);
}

void prepare_low_latency_masks() {
    load_kernel(mask_ranks);
    load_kernel(query_masks);
    load_kernel(restart);
}

}  // namespace hpc_moe::cuda
