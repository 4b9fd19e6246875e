// What every call of the CUDA runtime hands to its kernels: who this rank is, where the windows are, what must agree.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/control.h"

namespace hpc_moe::cuda {

struct Call {
    int rank;
    int num_ranks;
    uint64_t timeout;             // nanoseconds that a wait may last
    uint8_t* windows[kMaxRanks];  // of every rank, as this process sees them; each starts with a Control
    LocalState* state;
    HostRecord* host;         // as the device sees it
    Entry entry;              // what this rank announces when it enters, as far as the host knows it
    int32_t behind_exchange;  // runs only if the exchange before it succeeded
    // Stress builds only.
    uint32_t stress_seed;
    int32_t mutation;  // a rule to break on purpose, see device/stress.cuh; 0: none
};

// Where rows wait in a window until they are drained: a region per source, a slot per row.
struct Stage {
    int64_t offset;        // bytes from the start of a window
    int64_t region_bytes;  // of a source
    int64_t slot_bytes;
    int32_t num_slots;  // of a source
};

// Why a rank rejects a call, for the kernel that tells the peers.
struct RejectionText {
    char characters[kTextBytes];
};

// How a kernel is launched.
struct Launch {
    int num_blocks;
    bool bulk_copies;
    cudaStream_t stream;
};

}  // namespace hpc_moe::cuda
