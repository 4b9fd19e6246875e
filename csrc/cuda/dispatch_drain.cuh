// The half of dispatch.cu that stays on this GPU: staged rows are copied to the results, or, where nothing is staged,
// this rank's own rows; and what nobody sends is marked.
//
// A draining warp takes a quarter of a staged row, acquires the row's flag, copies, and counts. Sources take turns, as
// their rows come.
#pragma once

#include "cuda/device/protocol.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/dispatch.h"
#include "cuda/dispatch_plan.cuh"

namespace hpc_moe::cuda {
namespace {

constexpr int kDrainParts = 4;  // warps that share a staged row

// A draining warp: this rank's own rows, see moves_own_rows_apart.
__device__ void move_own_rows(const DispatchParams& p, const Plan& plan) {
    const Role role = drainer_role(p.pipeline);
    const auto position_of = [&](int token) {
        if (token >= p.num_tokens) return -1;
        return p.send_position[static_cast<int64_t>(token) * p.call.num_ranks + p.call.rank];
    };
    int next = position_of(role.index);
    for (int token = role.index; token < p.num_tokens; token += role.count) {
        const int position = next;
        next = position_of(token + role.count);  // not needed until the token after this one
        if (position < 0) continue;
        const int64_t own = plan.targets[p.call.rank].first + position;
        uint8_t* const to[1] = {p.recv_rows + own * p.row_bytes};
        copy_row<1>(p.x + token * p.x_stride, to, 0, p.row_bytes);
    }
}

// What goes with one row of the grouped results, for a received token that is this rank's `local` expert's. All lanes.
__device__ void write_grouped_details(const DispatchParams& p, int row, const uint32_t* scales, int64_t scale_stride,
                                      int local, float weight) {
    const int lane = threadIdx.x % 32;
    for (int channel = lane; channel < p.num_scales; channel += 32) {
        p.recv_scales[static_cast<int64_t>(row) * p.num_scales + channel] = scales[channel * scale_stride];
    }
    if (lane == 0 && p.recv_topk_index) p.recv_topk_index[row] = local;
    if (lane == 0 && p.recv_topk_weights) p.recv_topk_weights[row] = weight;
}

// A warp's share of a staged row, in the token layout. `received` is its row in the results.
__device__ void drain_token(const DispatchParams& p, const uint8_t* slot, int received, int part, int begin, int end) {
    const int lane = threadIdx.x % 32;
    uint8_t* const to[1] = {p.recv_rows + static_cast<int64_t>(received) * p.row_bytes};
    copy_row<1>(slot, to, begin, end);
    if (part != 0) return;
    const uint32_t* scales = reinterpret_cast<const uint32_t*>(slot + p.slot.scales);
    for (int channel = lane; channel < p.num_scales; channel += 32) {
        p.recv_scales[static_cast<int64_t>(received) * p.num_scales + channel] = scales[channel];
    }
    if (p.cached) return;
    const int64_t at = static_cast<int64_t>(received) * p.top_k + lane;
    if (lane < p.top_k && p.recv_topk_index) {
        p.recv_topk_index[at] = reinterpret_cast<const int64_t*>(slot + p.slot.topk_index)[lane];
    }
    if (lane < p.top_k && p.recv_topk_weights) {
        p.recv_topk_weights[at] = reinterpret_cast<const float*>(slot + p.slot.topk_weights)[lane];
    }
    if (lane == 0) p.recv_source_index[received] = *reinterpret_cast<const int32_t*>(slot + p.slot.source_index);
}

// The same in the grouped layout: a copy for every local expert that the token selected.
__device__ void drain_grouped(const DispatchParams& p, const uint8_t* slot, int source, int received, int part,
                              int begin, int end) {
    const int lane = threadIdx.x % 32;
    const int64_t at = static_cast<int64_t>(received) * p.top_k + lane;
    int local = -1, row = -1;
    if (lane < p.top_k && p.cached) row = p.grouped_rows[at];
    if (lane < p.top_k && !p.cached) {
        local = static_cast<int>(reinterpret_cast<const int64_t*>(slot + p.slot.topk_index)[lane]);
        const int position = reinterpret_cast<const int32_t*>(slot + p.slot.positions)[lane];
        if (local >= 0 && position >= 0) row = p.source_begin[source * p.experts_per_rank + local] + position;
        if (part == 0) p.grouped_rows[at] = row;
    }
    if (part == 0 && lane == 0 && !p.cached) {
        p.recv_source_index[received] = *reinterpret_cast<const int32_t*>(slot + p.slot.source_index);
    }
    float weight = 0.0f;
    if (lane < p.top_k && p.slot.topk_weights >= 0) {
        weight = reinterpret_cast<const float*>(slot + p.slot.topk_weights)[lane];
    }
    for (int k = 0; k < p.top_k; ++k) {
        const int64_t to_row = __shfl_sync(~0u, row, k);
        const int expert = __shfl_sync(~0u, local, k);
        const float w = __shfl_sync(~0u, weight, k);
        if (to_row < 0) continue;
        uint8_t* const to[1] = {p.recv_rows + to_row * p.row_bytes};
        copy_row<1>(slot, to, begin, end);
        if (part == 0) {
            const uint32_t* scales = reinterpret_cast<const uint32_t*>(slot + p.slot.scales);
            write_grouped_details(p, static_cast<int>(to_row), scales, 1, expert, w);
        }
    }
}

// Rows that are staged here in a pass, of all sources; and the most of one source.
__device__ int rows_in_pass(const DispatchParams& p, const Plan& plan, int pass, int* most) {
    int sum = 0;
    for (int source = 0; source < p.call.num_ranks; ++source) {
        if (source == p.call.rank) continue;
        const int rows = min(max(plan.rows_from[source] - pass * p.stage.num_slots, 0), p.stage.num_slots);
        *most = max(*most, rows);
        sum += rows;
    }
    return sum;
}

// A draining warp: its parts of the rows staged here, pass by pass, sources in turn.
__device__ void drain(const DispatchParams& p, const Plan& plan, uint64_t epoch) {
    const int lane = threadIdx.x % 32, others = p.call.num_ranks - 1;
    const Role role = drainer_role(p.pipeline);
    const int part_bytes = (p.row_bytes / kDrainParts + 127) / 128 * 128;
    uint64_t expected = 0;
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        int most = 0;
        expected += static_cast<uint64_t>(kDrainParts) * rows_in_pass(p, plan, pass, &most);
        for (int64_t unit = role.index; unit < static_cast<int64_t>(most) * others * kDrainParts; unit += role.count) {
            const int part = unit % kDrainParts, slot = unit / kDrainParts / others;
            const int source = (p.call.rank + 1 + unit / kDrainParts % others) % p.call.num_ranks;
            const int in_source = pass * p.stage.num_slots + slot;
            if (in_source >= plan.rows_from[source]) continue;
            bool there = true;
            if (lane == 0 && !breaks(p.call, Mutation::kRowsWithoutFlag)) {
                there = wait_for(p.call, &control_of(p.call, p.call.rank)->row_flags[source][slot],
                                 pass_tag(epoch, pass), Missing::kRow, source);
            }
            if (!__all_sync(~0u, there)) return;
            __syncwarp();  // what lane 0 has acquired, all have
            stress_sleep(p.call);
            uint8_t* row = p.call.windows[p.call.rank] + p.stage.offset + source * p.stage.region_bytes +
                           slot * p.stage.slot_bytes;
            const int begin = min(part * part_bytes, p.row_bytes), end = min(begin + part_bytes, p.row_bytes);
            const int received = plan.first_from[source] + in_source;
            if (p.grouped) {
                drain_grouped(p, row, source, received, part, begin, end);
            } else {
                drain_token(p, row, received, part, begin, end);
            }
            poison(row + begin, end - begin, lane);
            __syncwarp();
            if (plan.num_passes > 1 && lane == 0) count_drained(p.call, epoch, pass, expected);
        }
    }
}

// --- rows that nobody sends ----------------------------------------------------------------------------------------

__device__ void mark_unused_row(const DispatchParams& p, int row, bool clear) {
    const int lane = threadIdx.x % 32;
    const int width = p.grouped ? 1 : p.top_k;
    if (clear) {
        clear_row(p.recv_rows + static_cast<int64_t>(row) * p.row_bytes, p.row_bytes);
        for (int c = lane; c < p.num_scales; c += 32) p.recv_scales[static_cast<int64_t>(row) * p.num_scales + c] = 0;
    }
    if (lane < width && p.recv_topk_index) p.recv_topk_index[static_cast<int64_t>(row) * width + lane] = -1;
    if (lane < width && p.recv_topk_weights) p.recv_topk_weights[static_cast<int64_t>(row) * width + lane] = 0.0f;
}

// Padding of the grouped layout is zero; rows beyond what comes, with num_worst_tokens, select no expert.
__device__ __noinline__ void mark_unused(const DispatchParams& p, const Plan& plan) {
    const int lane = threadIdx.x % 32, last_source = p.call.num_ranks - 1;
    const auto [first, step] = drainer_role(p.pipeline);
    const int num_recv = plan.first_from[last_source] + plan.rows_from[last_source];
    int used = num_recv;
    if (p.grouped) {
        for (int e = 0; e < p.experts_per_rank; ++e) {
            const int end = p.expert_ranges[2 * e + 1];
            for (int row = p.expert_ranges[2 * e] + first; row < end; row += step) mark_unused_row(p, row, true);
        }
        used = p.expert_ranges[2 * p.experts_per_rank - 1];
    }
    if (!p.marks_unused) return;
    for (int row = used + first; row < p.num_rows; row += step) mark_unused_row(p, row, false);
    if (p.cached) return;
    for (int token = num_recv + first; token < p.num_rows; token += step) {
        if (lane == 0) p.recv_source_index[token] = -1;
        if (lane < p.top_k && p.grouped) p.grouped_rows[static_cast<int64_t>(token) * p.top_k + lane] = -1;
    }
}

}  // namespace
}  // namespace hpc_moe::cuda
