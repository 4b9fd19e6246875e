// What a block of a dispatch knows once all ranks have entered: where every rank takes this rank's rows, and which rows
// come to this rank.
#pragma once

#include "cuda/device/protocol.cuh"
#include "cuda/dispatch.h"

namespace hpc_moe::cuda {
namespace {

constexpr int kPositions = kNumArrays;  // one more array, in the stage only

// Where rows for a rank go: array `a` of row `i` is at base[a] + i * stride[a].
struct Target {
    uint8_t* base[kNumArrays + 1];
    int64_t stride[kNumArrays + 1];
    int32_t first;  // row of this rank's first token there
    bool staged;
};

// What a block knows once all ranks have entered.
struct Plan {
    Entry entries[kMaxRanks];
    Target targets[kMaxRanks];
    int32_t rows_from[kMaxRanks];   // that this rank receives from each source
    int32_t first_from[kMaxRanks];  // and where they begin
    int32_t num_passes;
    bool any_staged;  // somewhere
    bool go;
};

__device__ int rows_between(const DispatchParams& p, int source, int rank) {
    const int ranks = p.call.num_ranks;
    const int before = source > 0 ? p.rank_prefix_matrix[(source - 1) * ranks + rank] : 0;
    return p.rank_prefix_matrix[source * ranks + rank] - before;
}

__device__ int first_row(const DispatchParams& p, int source, int rank) {
    return source > 0 ? p.rank_prefix_matrix[(source - 1) * p.call.num_ranks + rank] : 0;
}

__device__ void set_direct_strides(const DispatchParams& p, Target& target) {
    target.stride[kRows] = p.row_bytes;
    target.stride[kScales] = 4 * static_cast<int64_t>(p.num_scales);
    target.stride[kTopkIndex] = 8 * static_cast<int64_t>(p.top_k);
    target.stride[kTopkWeights] = 4 * static_cast<int64_t>(p.top_k);
    target.stride[kSourceIndex] = 4;
    target.base[kPositions] = nullptr;
    target.stride[kPositions] = 0;
}

// What of a target depends on the peer's entry.
__device__ void find_target(const DispatchParams& p, const Entry& entry, int rank, Target& target) {
    target.staged = rank != p.call.rank && entry.landing[kRows] < 0;
    if (target.staged) {
        uint8_t* region = p.call.windows[rank] + p.stage.offset + p.call.rank * p.stage.region_bytes;
        const int32_t offsets[kNumArrays + 1] = {
            0, p.slot.scales, p.slot.topk_index, p.slot.topk_weights, p.slot.source_index, p.slot.positions};
        for (int a = 0; a <= kNumArrays; ++a) {
            target.base[a] = offsets[a] < 0 ? nullptr : region + offsets[a];
            target.stride[a] = p.stage.slot_bytes;
        }
    } else if (rank != p.call.rank) {
        for (int a = 0; a < kNumArrays; ++a) {
            target.base[a] = entry.landing[a] < 0
                                 ? nullptr
                                 : p.call.windows[rank] + static_cast<int64_t>(entry.landing[a]) * kLandingUnit;
        }
    }
}

// The last warp, before the peers have entered.
__device__ void begin_plan(const DispatchParams& p, Plan& plan) {
    const int lane = threadIdx.x % 32;
    if (lane < p.call.num_ranks) {
        Target& target = plan.targets[lane];
        target.first = first_row(p, p.call.rank, lane);
        plan.rows_from[lane] = rows_between(p, lane, p.call.rank);
        plan.first_from[lane] = first_row(p, lane, p.call.rank);
        set_direct_strides(p, target);
        target.base[kRows] = p.recv_rows;  // this rank's; those of the others follow
        target.base[kScales] = reinterpret_cast<uint8_t*>(p.recv_scales);
        target.base[kTopkIndex] = reinterpret_cast<uint8_t*>(p.recv_topk_index);
        target.base[kTopkWeights] = reinterpret_cast<uint8_t*>(p.recv_topk_weights);
        target.base[kSourceIndex] = reinterpret_cast<uint8_t*>(p.recv_source_index);
    }
    __syncwarp();
}

// The last warp, after all ranks have entered.
__device__ void finish_plan(const DispatchParams& p, Plan& plan) {
    const int lane = threadIdx.x % 32;
    int passes = 1;
    bool staged = false;
    if (lane < p.call.num_ranks) {
        const Entry& entry = plan.entries[lane];
        staged = entry.landing[kRows] < 0;
        find_target(p, entry, lane, plan.targets[lane]);
        for (int source = 0; staged && source < p.call.num_ranks; ++source) {
            if (source == lane) continue;
            passes = max(passes, (rows_between(p, source, lane) + p.stage.num_slots - 1) / p.stage.num_slots);
        }
    }
    passes = __reduce_max_sync(~0u, passes);
    staged = __any_sync(~0u, staged && p.call.num_ranks > 1);
    if (lane == 0) {
        plan.num_passes = passes;
        plan.any_staged = staged;
    }
    __syncwarp();
}

// Where nothing is staged, the draining warps have time: they copy this rank's own rows, through registers, for a bulk
// copy inside the GPU would wait behind those to the peers. (Only with bulk copies.)
__device__ bool moves_own_rows_apart(const DispatchParams& p, const Plan& plan) {
    return !plan.any_staged && !p.grouped;
}

}  // namespace
}  // namespace hpc_moe::cuda
