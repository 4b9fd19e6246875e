// A message around the ring of PEs: a test of whether NVSHMEM carries data and signals between the GPUs. No part of any
// call; probe.cu has the protocol.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace hpc_moe::nvshmem {

struct ProbeParams {
    void* inbox = nullptr;         // symmetric, num_bytes: what the sender's outbox holds
    const void* outbox = nullptr;  // symmetric, num_bytes: what to send
    uint64_t* signal = nullptr;    // symmetric, less than `value` on all PEs before any of them launches
    size_t num_bytes = 0;
    int target = 0;             // the PE to send to; each PE is the target of exactly one
    uint64_t value = 0;         // of the signal; larger than that of the probe before
    uint64_t timeout = 0;       // nanoseconds to wait for the sender
    uint64_t* found = nullptr;  // memory of this GPU or mapped host memory: the signal when the wait ended
};

// Does not wait. The probe has succeeded if, once the stream is done, *found is at least `value`.
void launch_probe(const ProbeParams& params, cudaStream_t stream);

}  // namespace hpc_moe::nvshmem
