// Puts and signals of NVSHMEM, as device/transport.cuh wants them. A thread each.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstddef>
#include <cstdint>

namespace hpc_moe::cuda {

struct Net {
    static constexpr bool kPuts = true;

    // Starts it; `from` must stay as it is until the peer has said that it is done with what came.
    __device__ static void put(void* to, const void* from, size_t bytes, int pe) {
        nvshmem_putmem_nbi(to, from, bytes, pe);
    }

    // What this thread puts and signals to a PE from now on comes there behind what it has put before.
    __device__ static void order() { nvshmem_fence(); }

    __device__ static void signal(uint64_t* flag, uint64_t value, int pe) {
        nvshmemx_signal_op(flag, value, NVSHMEM_SIGNAL_SET, pe);
    }

    // All that this rank has put is there.
    __device__ static void complete() { nvshmem_quiet(); }

    // Whether a signal has come. If so, what came before it is there.
    __device__ static bool has_come(const uint64_t* flag, uint64_t value) {
        return nvshmem_uint64_test(const_cast<uint64_t*>(flag), NVSHMEM_CMP_GE, value) != 0;
    }
};

}  // namespace hpc_moe::cuda
