// Stress builds (-DHPC_MOE_STRESS=ON) sleep at random, poison what was drained, and can break one rule on purpose,
// so that a test can show that it would notice. In other builds all of this is empty.
#pragma once

#include "cuda/call.h"
#include "cuda/device/memory.cuh"

namespace hpc_moe::cuda {

// Rules that a stress build can break: the test that lists them expects each to be noticed.
enum class Mutation : int32_t {
    kNone,
    kFlagBeforeStoresAreDone,  // row flags are handed over before the row's last bulk copies have started
    kRowsWithoutFlag,          // drains do not wait for row flags
    kEndWithoutArrivals,       // a dispatch ends before everything has landed
    kPassWithoutDrain,         // a pass starts before the one before it was drained
    kSendWithoutEntries,       // rows are sent before the peers have entered the call
    kArrivalBeforeAllWarps,    // one warp of a block says that all of it have sent their rows
    kCountsWithoutEntries,     // the exchange reads counts before they are there
    kFlagBeforeRow,            // the row flag is written before the row
    kSendWithoutPermission,    // low-latency rows are sent before the peers have ended the calls before
    kRowBeforeFlag,            // low-latency: plain rows are read before their flag has come
    kWordWithoutTag,           // low-latency: words are taken before they have come
};

__device__ inline bool breaks(const Call& call, Mutation mutation) {
#ifdef HPC_MOE_STRESS
    return call.mutation == static_cast<int32_t>(mutation);
#else
    return false;
#endif
}

// Sleeps up to 200 us, one time in eight; call with whole warps or single threads.
__device__ inline void stress_sleep(const Call& call) {
#ifdef HPC_MOE_STRESS
    if (call.stress_seed == 0) return;
    uint32_t mixed = call.stress_seed + static_cast<uint32_t>(call.state->epoch) * 2654435761u +
                     (blockIdx.x * 64u + threadIdx.x / 32u) * 40503u + static_cast<uint32_t>(nanoseconds() >> 10) * 97u;
    mixed ^= mixed >> 16;
    mixed *= 0x45d9f3bu;
    mixed ^= mixed >> 13;
    if (mixed % 8 != 0) return;
    const uint64_t end = nanoseconds() + (mixed >> 8) % 200000u;
    while (nanoseconds() < end) __nanosleep(1000);
#endif
}

// Overwrites a drained part of the window, 16 bytes a lane, so that whoever reads it too late reads nonsense.
__device__ inline void poison(void* begin, int64_t bytes, int lane) {
#ifdef HPC_MOE_STRESS
    __syncwarp();
    for (int64_t at = 16 * lane; at + 16 <= bytes; at += 16 * 32) {
        store_16(static_cast<uint8_t*>(begin) + at, make_uint4(0xfdfdfdfdu, 0xfdfdfdfdu, 0xfdfdfdfdu, 0xfdfdfdfdu));
    }
#endif
}

}  // namespace hpc_moe::cuda
