// Puts and signals of NVSHMEM, as device/transport.cuh wants them. A thread each.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstddef>
#include <cstdint>

#include "cuda/low_latency.h"

namespace hpc_moe::cuda {

struct Net {
    static constexpr bool kPuts = true;

#if NVSHMEM_VENDOR_VERSION >= 30519  // has queue pairs for its callers: see create_queue_pairs in world.h

    // Whether complete() waits for what has gone this way only, not for all that this rank has put.
    static constexpr bool kCompletesRoutes = true;

    // Starts it; `from` must stay as it is until the peer has said that it is done with what came.
    __device__ static void put(void* to, const void* from, size_t bytes, Route route) {
        nvshmemx_qp_uint8_put_nbi(static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, route.pe,
                                  route.queue);
    }

    // What goes this way from now on comes there behind what has gone this way before.
    __device__ static void order(Route route) { nvshmemx_qp_fence(route.pe, &route.queue, 1); }

    __device__ static void signal(uint64_t* flag, uint64_t value, Route route) {
        nvshmemx_qp_signal_op(flag, value, NVSHMEM_SIGNAL_SET, route.pe, route.queue);
    }

    // What has gone this way is there.
    __device__ static void complete(Route route) { nvshmemx_qp_quiet(route.pe, &route.queue, 1); }

#else  // NVSHMEM chooses a queue pair for each put, and its fence is about all of them

    static constexpr bool kCompletesRoutes = false;

    __device__ static void put(void* to, const void* from, size_t bytes, Route route) {
        nvshmem_putmem_nbi(to, from, bytes, route.pe);
    }

    __device__ static void order(Route) { nvshmem_fence(); }

    __device__ static void signal(uint64_t* flag, uint64_t value, Route route) {
        nvshmemx_signal_op(flag, value, NVSHMEM_SIGNAL_SET, route.pe);
    }

    __device__ static void complete(Route) { nvshmem_quiet(); }

#endif

    // Whether a signal has come. If so, what came before it is there.
    __device__ static bool has_come(const uint64_t* flag, uint64_t value) {
        return nvshmem_uint64_test(const_cast<uint64_t*>(flag), NVSHMEM_CMP_GE, value) != 0;
    }
};

}  // namespace hpc_moe::cuda
