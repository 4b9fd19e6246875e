// How a peer is reached that this GPU cannot write to: what it gets is put together in an *outbox*, in this rank's
// symmetric memory, and put from there, each piece followed by a signal. Flags are signals then, which the peer tests.
//
// In hpc_moe._C there are no puts: all ranks are reached by stores. hpc_moe._nvshmem compiles the same kernels with
// HPC_MOE_PUTS, and NVSHMEM's functions behind `Net`.
#pragma once

#include "cuda/device/memory.cuh"
#include "cuda/low_latency.h"

#ifdef HPC_MOE_PUTS
#include "nvshmem/puts.cuh"
#endif

namespace hpc_moe::cuda {

#ifndef HPC_MOE_PUTS
struct Net {
    static constexpr bool kPuts = false, kCompletesRoutes = false;
    __device__ static void put(void*, const void*, size_t, Route) {}
    __device__ static void order(Route) {}
    __device__ static void signal(uint64_t*, uint64_t, Route) {}
    __device__ static void complete(Route) {}
    __device__ static bool has_come(const uint64_t*, uint64_t) { return true; }
};
#endif

// Ranks that these kernels serve. More than a node has are reached by puts, and kernels without are faster for that.
constexpr int kServedRanks = Net::kPuts ? kMaxLowLatencyRanks : kMaxRanks;

__device__ inline bool is_put(const LowLatencyCall& call, int rank) {
    return Net::kPuts && (call.put_ranks >> rank & 1u);
}

__device__ inline uint8_t* region_at(const LowLatencyCall& call, int rank) {
    return kServedRanks == kMaxRanks || rank < kMaxRanks ? call.call.windows[rank] : call.state->regions[rank];
}

// Where packets or rows for a rank are put together.
__device__ inline uint8_t* outbox_for(const LowLatencyCall& call, int rank, uint64_t epoch) {
    const int index = __popc(call.put_ranks & ((1u << rank) - 1));
    return call.outboxes + index * call.outbox_bytes + (epoch & 1) * call.outbox_parity_bytes;
}

// This block's way to a rank. Blocks have queue pairs of their own, as far as there are enough: so they do not wait for
// each other's puts.
__device__ inline Route route_to(const LowLatencyCall& call, int rank) {
    return {call.state->pes[rank], call.state->of_block[blockIdx.x].queue};
}

// Whether a flag of `rank`, in this rank's region, is at least `wanted`; acquires what came with it.
__device__ inline bool has_come(const LowLatencyCall& call, const uint64_t* flag, uint64_t wanted, int rank) {
    return is_put(call, rank) ? Net::has_come(flag, wanted) : load_acquire_sys(flag) >= wanted;
}

// One thread, which knows what others have written to `from` (a barrier): puts a piece, then raises a flag. `to` and
// `flag` are where they lie in this rank's region.
__device__ inline void put_with_flag(const LowLatencyCall& call, int rank, void* to, const void* from, size_t bytes,
                                     uint64_t* flag, uint64_t value) {
    fence_acq_rel_sys();  // what other threads wrote is there for whoever moves it
    const Route route = route_to(call, rank);
    Net::put(to, from, bytes, route);
    Net::order(route);
    Net::signal(flag, value, route);
}

}  // namespace hpc_moe::cuda
