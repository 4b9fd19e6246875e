// The part that a rank takes in a low-latency call which it rejects: the others hear why, and wait for nothing.
#include "cuda/device/low_latency.cuh"
#include "cuda/launch.h"

namespace hpc_moe::cuda {
namespace {

// One thread: the numbers in the outbox, which say that nothing comes, to a rank that is reached by puts.
__device__ void put_no_numbers(const LowLatencyCall& call, uint64_t epoch, int rank) {
    const int parity = epoch & 1, self = call.call.rank;
    LowLatencyControl* own = own_region(call);
    fence_acq_rel_sys();
    Net::put(own->coming[parity][self], coming_for(call, rank, epoch), sizeof own->coming[parity][self],
             route_to(call, rank));
    put_with_flag(call, rank, own->counts[parity][self], counts_for(call, rank, epoch),
                  sizeof own->counts[parity][self], &own->number_flags[parity][self], epoch);
}

// Both halves of the call, by one block; the others only count.
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    reject_low_latency(const __grid_constant__ LowLatencyCall call, LowLatencyKind kind,
                       const __grid_constant__ RejectionText text) {
    __shared__ Meeting meeting;
    tell_ended_calls(call);
    const uint64_t epoch = counters_of(call).sent[kind] + 1;
    Permission permission(call, kind);
    if (permission.wait(epoch) && blockIdx.x == 0) {
        const uint32_t masked = masked_ranks(call);
        for (int rank = 0; rank < call.call.num_ranks; ++rank) {
            if (masked >> rank & 1u) continue;
            uint64_t *const counts = counts_for(call, rank, epoch), *const coming = coming_for(call, rank, epoch);
            for (int i = threadIdx.x; i < kTextBytes; i += blockDim.x) {
                entry_for(call, rank, kind, epoch).text[i] = text.characters[i];
            }
            // As many numbers as a peer may wait for.
            for (int i = threadIdx.x; kind == kLowLatencyDispatch && i < kMaxLocalExperts; i += blockDim.x) {
                store_relaxed_sys(&counts[i], tagged(epoch, 0));
            }
            for (int i = threadIdx.x; kind == kLowLatencyDispatch && i < kMaxLowLatencyTokens / 32; i += blockDim.x) {
                store_relaxed_sys(&coming[i], tagged(epoch, 0));
            }
        }
        __syncthreads();
        const int other = threadIdx.x;
        const bool is_there = other < call.call.num_ranks && !(masked_ranks(call) >> other & 1u);
        if (kind == kLowLatencyDispatch && is_there && is_put(call, other)) {
            put_no_numbers(call, epoch, other);
        }
        if (threadIdx.x < 32) {
            fence_acq_rel_sys();  // the text; with the entry, a release
            post_entry(call, kind, epoch, false);
            meet_peers(call, kind, epoch, meeting, true);  // or a second rejection could overwrite this one
        }
    }
    end_halves(call, kind, epoch, false, false);
}

}  // namespace

void launch_low_latency_reject(const LowLatencyCall& call, LowLatencyKind kind, const char* text, int num_blocks,
                               cudaStream_t stream) {
    RejectionText copy{};
    for (int i = 0; i < kTextBytes - 1 && text[i]; ++i) copy.characters[i] = text[i];
    launch_kernel("launching the low-latency reject kernel", reject_low_latency,
                  {num_blocks, kLowLatencyThreads, 0, stream}, call, kind, copy);
}

void prepare_low_latency_reject() { load_kernel(reject_low_latency); }

}  // namespace hpc_moe::cuda
