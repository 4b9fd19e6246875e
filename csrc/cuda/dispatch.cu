// Dispatch, inside a node.
//
// 1. All ranks meet (device/protocol.cuh). A rank's entry says where in its window this call's results may land;
//    without such a place its rows are *staged*: they wait in the window's stage, a region per source, and the
//    receiver moves them to its results.
// 2. *Send.* A warp takes a token, reads its row once, and writes it to every rank that it goes to, row by row in
//    turn: all links are used all the time. Lane 0 moves rows by bulk copies through shared memory; the other lanes
//    write scales and top-k data. Where a row goes follows from counts and positions that both sides know: nothing
//    is asked. This rank's own rows take the same way, straight to its results; where nothing is staged, the warps
//    that would drain copy them.
// 3. *Staged rows.* Every few rows, lane 0 waits until its bulk copies are done (not: read), the warp meets, and the
//    lanes release the rows' flags in the peers' windows (Control::row_flags, epoch and pass) with one fence. The
//    receiver's draining warps acquire it, and copy.
// 4. *Passes.* A region has few slots: rows beyond them wait for the next pass. The last draining warp of a pass
//    counts up (acq_rel) to what was expected, and releases Control::drained at all peers, which they acquire before
//    they write the next pass. Across calls, entering is that permission.
// 5. *End.* Sending threads wait for their bulk copies; the block meets; blocks count (acq_rel); the last one
//    releases Control::arrived at every peer and acquires that of all of them. So when the kernel ends, all rows are
//    there.
//
// All blocks must be resident at once: they wait for peers, which wait for them. Sending and draining is done by
// different warps of a block, and a sending warp never waits for a row.
#include "cuda/device/protocol.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/dispatch.h"
#include "cuda/mover.h"

namespace hpc_moe::cuda {
namespace {

constexpr int kPositions = kNumArrays;  // one more array, in the stage only
constexpr int kDrainParts = 4;          // warps that share a staged row

// Where rows for a rank go: array `a` of row `i` is at base[a] + i * stride[a].
struct Target {
    uint8_t* base[kNumArrays + 1];
    int64_t stride[kNumArrays + 1];
    int32_t first;  // row of this rank's first token there
    bool staged;
};

// What a block knows once all ranks have entered.
struct Plan {
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
        int64_t landing[kNumArrays];  // all loads first
#pragma unroll
        for (int a = 0; a < kNumArrays; ++a) landing[a] = entry.landing[a];
#pragma unroll
        for (int a = 0; a < kNumArrays; ++a) {
            target.base[a] = landing[a] < 0 ? nullptr : p.call.windows[rank] + landing[a];
        }
    }
}

// Warp 0, before the peers have entered.
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

// Warp 0, after all ranks have entered.
__device__ void finish_plan(const DispatchParams& p, uint64_t epoch, Plan& plan) {
    const int lane = threadIdx.x % 32;
    int passes = 1;
    bool staged = false;
    if (lane < p.call.num_ranks) {
        const Entry& entry = entry_of(p.call, epoch, lane);
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

// --- sending -----------------------------------------------------------------------------------------------------

// A piece of a token's row under way. `row` is the lane's: lane r has the row at rank r's target, or -1.
struct Outgoing {
    int token = -1;
    int piece = 0;
    int row = -1;
};

__device__ int row_at_target(const DispatchParams& p, const Plan& plan, int token, int pass) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.call.num_ranks) return -1;
    const int position = p.send_position[static_cast<int64_t>(token) * p.call.num_ranks + lane];
    if (position < 0) return -1;
    if (!plan.targets[lane].staged) return pass == 0 ? plan.targets[lane].first + position : -1;
    const int slot = position - pass * p.stage.num_slots;
    return slot >= 0 && slot < p.stage.num_slots ? slot : -1;
}

// Lane k's expert of the token, -1 where it has none.
__device__ int expert_of(const DispatchParams& p, int token) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.top_k || p.topk_index == nullptr) return -1;
    const int64_t expert = p.topk_index[static_cast<int64_t>(token) * p.top_k + lane];
    return expert >= 0 && expert < static_cast<int64_t>(p.experts_per_rank) * p.call.num_ranks
               ? static_cast<int>(expert)
               : -1;
}

// Lane k's row of this rank's results for its own token, in the grouped layout; -1 where the expert is elsewhere.
__device__ int own_grouped_row(const DispatchParams& p, int token, int received) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.top_k) return -1;
    if (p.cached) return p.grouped_rows[static_cast<int64_t>(received) * p.top_k + lane];
    const int expert = expert_of(p, token), local = expert - p.call.rank * p.experts_per_rank;
    const int position = p.expert_position[static_cast<int64_t>(token) * p.top_k + lane];
    if (expert < 0 || position < 0 || local < 0 || local >= p.experts_per_rank) return -1;
    return p.source_begin[p.call.rank * p.experts_per_rank + local] + position;
}

__device__ void write_scales(const DispatchParams& p, const Plan& plan, const Outgoing& out) {
    const int lane = threadIdx.x % 32;
    const uint32_t* from = p.scales + out.token * p.scale_token_stride;
    for (int first = 0; first < p.num_scales; first += 32) {
        const int channel = first + lane;
        const uint32_t value = channel < p.num_scales ? from[channel * p.scale_channel_stride] : 0;
        for (int r = 0; r < p.call.num_ranks; ++r) {
            const int row = __shfl_sync(~0u, out.row, r);
            if (row < 0 || channel >= p.num_scales || (p.grouped && r == p.call.rank)) continue;
            const Target& target = plan.targets[r];
            reinterpret_cast<uint32_t*>(target.base[kScales] + row * target.stride[kScales])[channel] = value;
        }
    }
}

// Expert indices become those of the receiving rank; an expert elsewhere is -1, with weight 0.
__device__ void write_topk(const DispatchParams& p, const Plan& plan, const Outgoing& out) {
    const int lane = threadIdx.x % 32;
    const int expert = expert_of(p, out.token);
    const int64_t at = static_cast<int64_t>(out.token) * p.top_k + lane;
    const float weight = lane < p.top_k && p.topk_weights ? p.topk_weights[at] : 0.0f;
    const int position = lane < p.top_k && p.expert_position ? p.expert_position[at] : -1;
    for (int r = 0; r < p.call.num_ranks; ++r) {
        const int row = __shfl_sync(~0u, out.row, r);
        if (row < 0 || (p.grouped && r == p.call.rank)) continue;
        const Target& target = plan.targets[r];
        const int local = expert - r * p.experts_per_rank;
        const bool is_here = expert >= 0 && local >= 0 && local < p.experts_per_rank;
        if (lane < p.top_k && target.base[kTopkIndex]) {
            reinterpret_cast<int64_t*>(target.base[kTopkIndex] + row * target.stride[kTopkIndex])[lane] =
                is_here ? local : -1;
        }
        if (lane < p.top_k && target.base[kTopkWeights]) {
            reinterpret_cast<float*>(target.base[kTopkWeights] + row * target.stride[kTopkWeights])[lane] =
                is_here ? weight : 0.0f;
        }
        if (lane < p.top_k && target.base[kPositions]) {
            reinterpret_cast<int32_t*>(target.base[kPositions] + row * target.stride[kPositions])[lane] = position;
        }
        if (lane == 0 && target.base[kSourceIndex]) {
            *reinterpret_cast<int32_t*>(target.base[kSourceIndex] + row * target.stride[kSourceIndex]) = out.token;
        }
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

// This rank's own token in the grouped layout: all that goes with its rows. Lane k has `grouped_row`.
__device__ __noinline__ void write_own_grouped(const DispatchParams& p, const Outgoing& out, int received,
                                               int grouped_row) {
    const int lane = threadIdx.x % 32;
    const int64_t at = static_cast<int64_t>(out.token) * p.top_k + lane;
    const float weight = lane < p.top_k && p.topk_weights ? p.topk_weights[at] : 0.0f;
    const int local = expert_of(p, out.token) - p.call.rank * p.experts_per_rank;
    if (!p.cached) {
        if (lane < p.top_k) p.grouped_rows[static_cast<int64_t>(received) * p.top_k + lane] = grouped_row;
        if (lane == 0) p.recv_source_index[received] = out.token;
    }
    for (int k = 0; k < p.top_k; ++k) {
        const int row = __shfl_sync(~0u, grouped_row, k), expert = __shfl_sync(~0u, local, k);
        const float w = __shfl_sync(~0u, weight, k);
        if (row < 0) continue;
        write_grouped_details(p, row, p.scales + out.token * p.scale_token_stride, p.scale_channel_stride, expert, w);
    }
}

__device__ void write_details(const DispatchParams& p, const Plan& plan, const Outgoing& out) {
    if (p.num_scales > 0) write_scales(p, plan, out);
    if (!p.cached) write_topk(p, plan, out);
}

// Lane 8 j + r: rank r may read the warp's j-th row when it has arrived.
__device__ void owe_flags(const DispatchParams& p, const Plan& plan, const Outgoing& out, DueFlags& due) {
    const int lane = threadIdx.x % 32, rank = lane % kMaxRanks;
    const int slot = __shfl_sync(~0u, out.row, rank);
    if (!plan.any_staged || out.piece != p.pipeline.pieces_per_row - 1) return;
    if (lane / kMaxRanks == due.num_rows && slot >= 0 && plan.targets[rank].staged) {
        due.flag = &control_of(p.call, rank)->row_flags[p.call.rank][slot];
    }
    due.num_rows += 1;
}

// Where nothing is staged, the draining warps have time: they copy this rank's own rows, through registers, for a bulk
// copy inside the GPU would wait behind those to the peers. (Only with bulk copies.)
__device__ bool moves_own_rows_apart(const DispatchParams& p, const Plan& plan) {
    return !plan.any_staged && !p.grouped;
}

// Sends a piece that was loaded, and with the first one what goes with the row.
__device__ void store_piece(const DispatchParams& p, const Plan& plan, WarpPipeline& pipeline, const Outgoing& out,
                            DueFlags& due) {
    const int lane = threadIdx.x % 32, offset = out.piece * p.pipeline.piece_bytes;
    const int bytes = min(p.pipeline.piece_bytes, p.row_bytes - offset);
    if (lane == 0) pipeline.wait_filled();
    __syncwarp();
    for (int i = 1; i <= p.call.num_ranks; ++i) {
        const int r = (p.call.rank + i) % p.call.num_ranks;
        const int row = __shfl_sync(~0u, out.row, r);
        if (row < 0) continue;
        if (r == p.call.rank && moves_own_rows_apart(p, plan)) continue;
        if (p.grouped && r == p.call.rank) {
            const int own = own_grouped_row(p, out.token, row);
            for (int k = 0; k < p.top_k; ++k) {
                const int64_t to = __shfl_sync(~0u, own, k);
                if (to >= 0 && lane == 0) bulk_store(p.recv_rows + to * p.row_bytes + offset, pipeline.filled(), bytes);
            }
            if (out.piece == 0) write_own_grouped(p, out, row, own);
        } else if (lane == 0) {
            const Target& target = plan.targets[r];
            bulk_store(target.base[kRows] + row * target.stride[kRows] + offset, pipeline.filled(), bytes);
        }
    }
    if (lane == 0) commit_stores();
    pipeline.num_emptied += 1;
    if (out.piece == 0) write_details(p, plan, out);
    owe_flags(p, plan, out, due);
}

// Starts loading the warp's first piece: that takes a while, and nothing need be known of the peers.
__device__ void prefetch(const DispatchParams& p, WarpPipeline& pipeline) {
    const int token = sender_role(p.pipeline).index;
    if (token >= p.num_tokens) return;
    if (threadIdx.x % 32 == 0) pipeline.fill(p.x + token * p.x_stride, min(p.pipeline.piece_bytes, p.row_bytes));
    pipeline.num_filled += 1;
}

// Nobody wants what was prefetched.
__device__ void discard(WarpPipeline& pipeline) {
    if (pipeline.num_filled == pipeline.num_emptied) return;
    pipeline.wait_filled();
    pipeline.num_emptied += 1;
    __syncwarp();
}

// A sending warp's tokens of one pass, by bulk copies.
__device__ void send_by_bulk_copies(const DispatchParams& p, const Plan& plan, WarpPipeline& pipeline, int pass,
                                    uint64_t tag) {
    const int lane = threadIdx.x % 32;
    Outgoing ahead;
    DueFlags due;
    const Role role = sender_role(p.pipeline);
    for (int token = role.index; token < p.num_tokens; token += role.count) {
        const bool is_first = token == role.index;
        const int row = row_at_target(p, plan, token, pass);
        if (!__any_sync(~0u, row >= 0)) {
            if (is_first) discard(pipeline);
            continue;
        }
        for (int piece = 0; piece < p.pipeline.pieces_per_row; ++piece) {
            if (is_first && piece == 0 && pipeline.num_filled > pipeline.num_emptied) {  // prefetched
                ahead = {token, piece, row};
                continue;
            }
            finish_stores(p.call, due, tag);  // of the piece before last, whose buffer this one takes
            const int offset = piece * p.pipeline.piece_bytes;
            if (lane == 0) {
                pipeline.fill(p.x + token * p.x_stride + offset, min(p.pipeline.piece_bytes, p.row_bytes - offset));
            }
            pipeline.num_filled += 1;
            if (ahead.token >= 0) store_piece(p, plan, pipeline, ahead, due);
            ahead = {token, piece, row};
        }
    }
    finish_stores(p.call, due, tag);
    if (ahead.token >= 0) store_piece(p, plan, pipeline, ahead, due);
    finish_all_stores(p.call, due, tag);
}

// A sending warp's tokens of one pass, through registers.
__device__ void send_by_registers(const DispatchParams& p, const Plan& plan, int pass, uint64_t tag) {
    const Role role = sender_role(p.pipeline);
    for (int token = role.index; token < p.num_tokens; token += role.count) {
        Outgoing out{token, p.pipeline.pieces_per_row - 1, row_at_target(p, plan, token, pass)};
        if (!__any_sync(~0u, out.row >= 0)) continue;
        const uint8_t* from = p.x + token * p.x_stride;
        uint8_t* to[kMaxRanks] = {};
        int own = -1;
#pragma unroll
        for (int i = 1; i <= kMaxRanks; ++i) {
            if (i > p.call.num_ranks) break;
            const int r = (p.call.rank + i) % p.call.num_ranks, row = __shfl_sync(~0u, out.row, r);
            if (row < 0) continue;
            if (p.grouped && r == p.call.rank) {
                own = row;
            } else {
                to[i - 1] = plan.targets[r].base[kRows] + row * plan.targets[r].stride[kRows];
            }
        }
        DueFlags due;
        owe_flags(p, plan, out, due);
        if (breaks(p.call, Mutation::kFlagBeforeRow)) due.raise(p.call, tag);
        copy_row<kMaxRanks>(from, to, 0, p.row_bytes);
        if (own >= 0) {
            const int own_row = own_grouped_row(p, token, own);
            for (int k = 0; k < p.top_k; ++k) {
                const int64_t row = __shfl_sync(~0u, own_row, k);
                uint8_t* const copy[1] = {p.recv_rows + row * p.row_bytes};
                if (row >= 0) copy_row<1>(from, copy, 0, p.row_bytes);
            }
            write_own_grouped(p, out, own, own_row);
        }
        write_details(p, plan, out);
        due.raise(p.call, tag);
    }
}

// Whether the lane's rank gets rows of this rank in a pass, and so must have drained the one before.
__device__ bool gets_rows(const DispatchParams& p, const Plan& plan, int pass) {
    const int lane = threadIdx.x % 32;
    return lane < p.call.num_ranks && plan.targets[lane].staged &&
           rows_between(p, p.call.rank, lane) > pass * p.stage.num_slots;
}

template <bool kBulkCopies>
__device__ void send(const DispatchParams& p, const Plan& plan, WarpPipeline& pipeline, uint64_t epoch) {
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        if (pass > 0 && !wait_for_drains(p.call, epoch, pass, gets_rows(p, plan, pass))) return;
        const uint64_t tag = pass_tag(epoch, pass);
        if constexpr (kBulkCopies) {
            send_by_bulk_copies(p, plan, pipeline, pass, tag);
        } else {
            send_by_registers(p, plan, pass, tag);
        }
    }
}

// A draining warp: this rank's own rows, see moves_own_rows_apart.
__device__ void move_own_rows(const DispatchParams& p, const Plan& plan) {
    const Role role = drainer_role(p.pipeline);
    for (int token = role.index; token < p.num_tokens; token += role.count) {
        const int position = p.send_position[static_cast<int64_t>(token) * p.call.num_ranks + p.call.rank];
        if (position < 0) continue;
        const int64_t own = plan.targets[p.call.rank].first + position;
        uint8_t* const to[1] = {p.recv_rows + own * p.row_bytes};
        copy_row<1, 8>(p.x + token * p.x_stride, to, 0, p.row_bytes);
    }
}

// --- draining ----------------------------------------------------------------------------------------------------

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

// --- the kernel ----------------------------------------------------------------------------------------------------

// Warp 0 of the last block: tells every peer that all of this rank's rows are there, and waits for theirs.
__device__ void tell_arrivals(const DispatchParams& p, uint64_t epoch) {
    stress_sleep(p.call);
    const int lane = threadIdx.x % 32;
    if (lane < p.call.num_ranks) store_release_sys(&control_of(p.call, lane)->arrived[p.call.rank], epoch);
}

__device__ void wait_for_arrivals(const DispatchParams& p, uint64_t epoch) {
    const int lane = threadIdx.x % 32;
    if (lane < p.call.num_ranks && !breaks(p.call, Mutation::kEndWithoutArrivals)) {
        wait_for(p.call, &control_of(p.call, p.call.rank)->arrived[lane], epoch, Missing::kArrival, lane);
    }
}

// All threads of a block, for an uncached call that does not take place: what later calls with this handle read says
// that nothing was sent, so that they touch nothing that is not there.
__device__ __noinline__ void clear_call(const DispatchParams& p) {
    const int ranks = p.call.num_ranks, width = p.grouped ? 1 : p.top_k;
    for (int i = threadIdx.x; i < ranks * ranks; i += blockDim.x) const_cast<int32_t*>(p.rank_prefix_matrix)[i] = 0;
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(p.num_tokens) * ranks; i += blockDim.x) {
        const_cast<int32_t*>(p.send_position)[i] = -1;
    }
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(p.num_rows) * width; i += blockDim.x) {
        if (p.recv_topk_index) p.recv_topk_index[i] = -1;
        if (p.recv_topk_weights) p.recv_topk_weights[i] = 0.0f;
    }
    for (int i = threadIdx.x; p.grouped && i < 2 * p.experts_per_rank; i += blockDim.x) {
        const_cast<int32_t*>(p.expert_ranges)[i] = 0;
    }
    for (int i = threadIdx.x; i < p.num_rows; i += blockDim.x) {
        if (p.recv_source_index) p.recv_source_index[i] = -1;
    }
    for (int64_t i = threadIdx.x; p.grouped && i < static_cast<int64_t>(p.num_rows) * p.top_k; i += blockDim.x) {
        p.grouped_rows[i] = -1;
    }
}

template <bool kBulkCopies>
__global__ void __launch_bounds__(kThreadsPerBlock, 1) dispatch(const __grid_constant__ DispatchParams p) {
    if constexpr (kBulkCopies && !HPC_MOE_HAS_BULK_COPIES) return;  // never launched there
    __shared__ Plan plan;
    if (p.call.behind_exchange && p.call.state->refused) {
        if (blockIdx.x == 0 && p.marks_unused) clear_call(p);
        return;
    }
    const uint64_t epoch = begin_epoch(p.call);
    const bool sends = is_sender(p.pipeline);
    WarpPipeline pipeline;
    if constexpr (kBulkCopies) {
        init_pipelines();
        __syncthreads();
        if (sends) {
            pipeline = pipeline_of_warp(p.pipeline, threadIdx.x / 32);
            prefetch(p, pipeline);
        }
    }
    if (threadIdx.x < 32) {
        begin_plan(p, plan);
        const bool go = meet(p.call, epoch);
        if (go) finish_plan(p, epoch, plan);
        if (threadIdx.x == 0) plan.go = go;
    }
    __syncthreads();
    if (!plan.go) {
        discard(pipeline);
    } else if (sends) {
        send<kBulkCopies>(p, plan, pipeline, epoch);
    } else {
        if (p.grouped || p.marks_unused) mark_unused(p, plan);
        if (kBulkCopies && moves_own_rows_apart(p, plan)) move_own_rows(p, plan);
        if (p.call.landing[kRows] < 0 && p.call.num_ranks > 1) drain(p, plan, epoch);
    }
    if (plan.go && breaks(p.call, Mutation::kArrivalBeforeAllBlocks) && blockIdx.x == 0 && threadIdx.x < 32) {
        tell_arrivals(p, epoch);
    }
    if (!is_last_block(p.call)) return;
    if (!plan.go && p.marks_unused) clear_call(p);
    if (plan.go && threadIdx.x < 32 && !load_relaxed_gpu(&p.call.state->gave_up)) {
        tell_arrivals(p, epoch);
        wait_for_arrivals(p, epoch);
        if (threadIdx.x == 0) count_passes(p.call, plan.num_passes);
    }
    end_epoch(p.call, epoch);
}

}  // namespace

void launch_dispatch(const DispatchParams& params, const Launch& launch) {
    launch_mover(dispatch<true>, dispatch<false>, params, launch, "launching the dispatch kernel");
}

void prepare_dispatch() { prepare_mover(dispatch<true>, dispatch<false>); }

}  // namespace hpc_moe::cuda
