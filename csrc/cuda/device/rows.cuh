// Moving rows: a warp's double buffer in shared memory for bulk copies, and copies through registers.
#pragma once

#include "cuda/call.h"
#include "cuda/device/memory.cuh"
#include "cuda/device/stress.cuh"
#include "cuda/pipeline.h"

namespace hpc_moe::cuda {

// What a warp does: the how-manieth of how many that do the same.
struct Role {
    int index, count;
};

__device__ inline bool is_sender(const PipelineShape& shape) { return threadIdx.x / 32 < shape.num_send_warps; }

// Neighbours in the order are on different SMs.
__device__ inline Role sender_role(const PipelineShape& shape) {
    return {static_cast<int>(blockIdx.x + gridDim.x * (threadIdx.x / 32)),
            static_cast<int>(gridDim.x * shape.num_send_warps)};
}

__device__ inline Role drainer_role(const PipelineShape& shape) {
    return {static_cast<int>(blockIdx.x + gridDim.x * (threadIdx.x / 32 - shape.num_send_warps)),
            static_cast<int>(gridDim.x * (kWarpsPerBlock - shape.num_send_warps))};
}

// Two buffers of a warp, filled by bulk copies and emptied in turn. For each piece: fill, then (with the next one
// already on its way) wait_filled, use `filled`, `emptied`.
struct WarpPipeline {
    uint8_t* buffers;    // two of buffer_bytes, in shared memory
    uint64_t* barriers;  // two load barriers
    uint32_t buffer_bytes;
    uint32_t num_filled = 0, num_emptied = 0;

    // The buffer that is filled next, which must not be in use any more, and its barrier.
    __device__ uint8_t* next() const { return buffers + (num_filled & 1u) * buffer_bytes; }
    __device__ uint64_t* next_barrier() const { return barriers + (num_filled & 1u); }
    // Lane 0.
    __device__ void fill(const void* from, uint32_t bytes) const {
        expect_bytes(next_barrier(), bytes);
        bulk_load(next(), from, bytes, next_barrier());
    }
    __device__ void wait_filled() const { wait_for_load(barriers + (num_emptied & 1u), num_emptied >> 1 & 1u); }
    __device__ const uint8_t* filled() const { return buffers + (num_emptied & 1u) * buffer_bytes; }
};

// The pipeline of a sending warp, in the block's dynamic shared memory.
__device__ inline WarpPipeline pipeline_of_warp(const PipelineShape& shape, int warp) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    WarpPipeline pipeline;
    pipeline.buffers = shared_memory + kBarrierBytes + 2 * warp * shape.piece_bytes;
    pipeline.barriers = reinterpret_cast<uint64_t*>(shared_memory) + 2 * warp;
    pipeline.buffer_bytes = shape.piece_bytes;
    return pipeline;
}

// All threads of the block, before a barrier.
__device__ inline void init_pipelines() {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    if (threadIdx.x < 2 * kMaxSendWarps) {
        init_load_barrier(reinterpret_cast<uint64_t*>(shared_memory) + threadIdx.x);
        publish_load_barriers();
    }
}

// Flags of rows that a warp has sent, each the lane's that owes it. A fence costs more than a microsecond, so one
// serves several rows.
struct DueFlags {
    static constexpr int kMaxRows = 4;
    uint64_t* flag = nullptr;  // in a peer's window
    int num_rows = 0;

    // All lanes, when lane 0's bulk copies of these rows are done: fence (acq_rel.sys), then the flags, which together
    // release the rows, and what any lane wrote along with them.
    __device__ void raise(const Call& call, uint64_t tag) {
        __syncwarp();
        if (num_rows == 0) return;
        fence_acq_rel_sys();
        if (flag != nullptr) store_relaxed_sys(flag, tag);
        flag = nullptr;
        num_rows = 0;
        stress_sleep(call);
    }
};

// Lane 0: its bulk copies have arrived.
__device__ inline void wait_for_arrival(const Call& call) {
    if (threadIdx.x % 32 != 0) return;
    if (breaks(call, Mutation::kFlagBeforeStoresAreDone)) {
        wait_until_stores_are_read();
    } else {
        wait_until_stores_are_done();
    }
}

// Frees the buffer that the next piece goes to, and raises flags when enough are due.
__device__ inline void finish_stores(const Call& call, DueFlags& due, uint64_t tag) {
    if (due.num_rows < DueFlags::kMaxRows) {
        if (threadIdx.x % 32 == 0) wait_until_stores_are_read();
        return;
    }
    wait_for_arrival(call);
    due.raise(call, tag);
}

// At the end of a pass: all rows have arrived, and all flags are raised.
__device__ inline void finish_all_stores(const Call& call, DueFlags& due, uint64_t tag) {
    wait_for_arrival(call);
    due.raise(call, tag);
}

// A warp copies [begin, end) of a row, in bytes, multiples of 16, to each non-null target. Many loads before the first
// store: the time of one is long.
template <int kTargets, int kUnroll = kTargets == 1 ? 4 : 2>
__device__ inline void copy_row(const uint8_t* from, uint8_t* const (&to)[kTargets], int begin, int end) {
    const int lane = threadIdx.x % 32;
    for (int first = begin + 16 * lane; first < end; first += 16 * 32 * kUnroll) {
        uint4 values[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int at = first + i * 16 * 32;
            if (at < end) values[i] = load_16(from + at);
        }
#pragma unroll
        for (int target = 0; target < kTargets; ++target) {
            if (to[target] == nullptr) continue;
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const int at = first + i * 16 * 32;
                if (at < end) store_16(to[target] + at, values[i]);
            }
        }
    }
}

// A warp fills [0, bytes) with zeros; bytes a multiple of 16.
__device__ inline void clear_row(uint8_t* row, int64_t bytes) {
    for (int64_t at = 16 * (threadIdx.x % 32); at < bytes; at += 16 * 32) store_16(row + at, make_uint4(0, 0, 0, 0));
}

}  // namespace hpc_moe::cuda
