// Dispatch, inside a node.
//
// 1. All ranks meet (device/protocol.cuh). A rank's entry says where in its window this call's results may land;
//    without such a place its rows are *staged*: they wait in the window's stage, a region per source, and the
//    receiver moves them to its results. Meanwhile sending warps load their first rows.
// 2. *Send.* A warp takes a token, reads its row once, and writes it to every rank that it goes to, row by row in
//    turn: all links are used all the time. Lane 0 moves rows, and scales if it can, by bulk copies through shared
//    memory; the other lanes write the rest. Where a row goes follows from counts and positions that both sides know:
//    nothing is asked. This rank's own rows take the same way, straight to its results; where nothing is staged, the
//    warps that would drain copy them.
// 3. *Staged rows.* When lane 0 knows that bulk copies are done (not: read), it releases their flags (.cta) to the
//    block's flagging warp, which acquires them, and releases them (fence, then stores) in the peers' windows
//    (Control::row_flags, epoch and pass). The receiver's draining warps acquire them there, and copy. Where rows pass
//    through registers, the sending warp releases their flags itself.
// 4. *Passes.* A region has few slots: rows beyond them wait for the next pass. The last draining warp of a pass
//    counts up (acq_rel) to what was expected, and releases Control::drained at all peers, which they acquire before
//    they write the next pass. Across calls, entering is that permission.
// 5. *End.* Sending threads wait for their bulk copies; the block meets; one warp releases Control::arrived, the
//    block's word, at every peer. Block 0 acquires those of all blocks of all peers. So when the kernel ends, all rows
//    are there.
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

// --- sending -----------------------------------------------------------------------------------------------------

// A token's row, or a piece of it, under way.
struct Outgoing {
    int token;
    int piece;
    int position;  // lane r: index among the tokens for rank r, -1: it does not go there
};

// Lane r: the token's row at rank r's target, -1 if it does not go there in this pass.
__device__ int row_at_target(const DispatchParams& p, const Plan& plan, int position, int pass) {
    if (position < 0) return -1;
    const Target& target = plan.targets[threadIdx.x % 32];
    if (!target.staged) return pass == 0 ? target.first + position : -1;
    const int slot = position - pass * p.stage.num_slots;
    return slot >= 0 && slot < p.stage.num_slots ? slot : -1;
}

__device__ int load_position(const DispatchParams& p, int token) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.call.num_ranks || token >= p.num_tokens) return -1;
    return p.send_position[static_cast<int64_t>(token) * p.call.num_ranks + lane];
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

// `at_target`: lane r has the row there, or -1; and so in what follows.
__device__ void write_scales(const DispatchParams& p, const Plan& plan, int token, int at_target) {
    const int lane = threadIdx.x % 32;
    const uint32_t* from = p.scales + token * p.scale_token_stride;
    for (int first = 0; first < p.num_scales; first += 32) {
        const int channel = first + lane;
        const uint32_t value = channel < p.num_scales ? from[channel * p.scale_channel_stride] : 0;
        for (int r = 0; r < p.call.num_ranks; ++r) {
            const int row = __shfl_sync(~0u, at_target, r);
            if (row < 0 || channel >= p.num_scales || (p.grouped && r == p.call.rank)) continue;
            const Target& target = plan.targets[r];
            reinterpret_cast<uint32_t*>(target.base[kScales] + row * target.stride[kScales])[channel] = value;
        }
    }
}

// Expert indices become those of the receiving rank; an expert elsewhere is -1, with weight 0.
__device__ void write_topk(const DispatchParams& p, const Plan& plan, int token, int at_target) {
    const int lane = threadIdx.x % 32;
    const int expert = expert_of(p, token);
    const int64_t at = static_cast<int64_t>(token) * p.top_k + lane;
    const float weight = lane < p.top_k && p.topk_weights ? p.topk_weights[at] : 0.0f;
    const int position = lane < p.top_k && p.expert_position ? p.expert_position[at] : -1;
    for (int r = 0; r < p.call.num_ranks; ++r) {
        const int row = __shfl_sync(~0u, at_target, r);
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
            *reinterpret_cast<int32_t*>(target.base[kSourceIndex] + row * target.stride[kSourceIndex]) = token;
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
__device__ __noinline__ void write_own_grouped(const DispatchParams& p, int token, int received, int grouped_row) {
    const int lane = threadIdx.x % 32;
    const int64_t at = static_cast<int64_t>(token) * p.top_k + lane;
    const float weight = lane < p.top_k && p.topk_weights ? p.topk_weights[at] : 0.0f;
    const int local = expert_of(p, token) - p.call.rank * p.experts_per_rank;
    if (!p.cached) {
        if (lane < p.top_k) p.grouped_rows[static_cast<int64_t>(received) * p.top_k + lane] = grouped_row;
        if (lane == 0) p.recv_source_index[received] = token;
    }
    for (int k = 0; k < p.top_k; ++k) {
        const int row = __shfl_sync(~0u, grouped_row, k), expert = __shfl_sync(~0u, local, k);
        const float w = __shfl_sync(~0u, weight, k);
        if (row < 0) continue;
        write_grouped_details(p, row, p.scales + token * p.scale_token_stride, p.scale_channel_stride, expert, w);
    }
}

__device__ void write_details(const DispatchParams& p, const Plan& plan, int token, int at_target) {
    if (p.num_scales > 0 && p.pipeline.scale_bytes == 0) write_scales(p, plan, token, at_target);
    if (!p.cached) write_topk(p, plan, token, at_target);
}

// Lane r: whether rank r waits for a flag of this row.
__device__ bool owes_flag(const Plan& plan, int at_target) {
    return at_target >= 0 && plan.targets[threadIdx.x % 32].staged;
}

__device__ uint64_t* flag_of(const DispatchParams& p, int slot) {
    return &control_of(p.call, threadIdx.x % kMaxRanks)->row_flags[p.call.rank][slot];
}

// Where nothing is staged, the draining warps have time: they copy this rank's own rows, through registers, for a bulk
// copy inside the GPU would wait behind those to the peers. (Only with bulk copies.)
__device__ bool moves_own_rows_apart(const DispatchParams& p, const Plan& plan) {
    return !plan.any_staged && !p.grouped;
}

// A sending warp's tokens, for bulk copies: see RowPump.
class Tokens {
   public:
    using Piece = Outgoing;

    __device__ Tokens(const DispatchParams& p, const Plan& plan) : p_(p), plan_(plan), role_(sender_role(p.pipeline)) {
        go_to_first();
    }

    // From now on what is not needed in this pass is left out; before, nothing is known of passes.
    __device__ void begin_pass(uint64_t epoch, int pass) {
        if (pass > 0) go_to_first();
        pass_ = pass;
        tag_ = pass_tag(epoch, pass);
    }

    __device__ bool next(Outgoing& out) {
        for (; token_ < p_.num_tokens; go_on()) {
            const int row = pass_ < 0 ? position_ : row_at_target(p_, plan_, position_, pass_);
            if (!__any_sync(~0u, row >= 0)) continue;
            out = {token_, piece_, position_};
            piece_ += 1;
            if (piece_ == p_.pipeline.pieces_per_row) go_on();
            return true;
        }
        return false;
    }

    __device__ void load(const Outgoing& out, const RowBuffers& buffers) const {
        const PipelineShape& shape = p_.pipeline;
        const int offset = out.piece * shape.piece_bytes;
        buffers.fill(p_.call, p_.x + out.token * p_.x_stride + offset, min(shape.piece_bytes, p_.row_bytes - offset),
                     p_.scales + out.token * p_.scale_token_stride, out.piece == 0 ? shape.scale_bytes : 0,
                     shape.piece_bytes);
    }

    __device__ void store(const Outgoing& out, const uint8_t* buffer, OwedFlags& flags) const {
        const int at_target = row_at_target(p_, plan_, out.position, pass_);
        for (int i = 1; i <= p_.call.num_ranks; ++i) {
            const int r = (p_.call.rank + i) % p_.call.num_ranks;
            const int row = __shfl_sync(~0u, at_target, r);
            if (row < 0) continue;
            if (p_.grouped && r == p_.call.rank) {
                store_own_grouped(out, buffer, row);
            } else if (threadIdx.x % 32 == 0) {
                store_to(out, buffer, plan_.targets[r], row, r != p_.call.rank || !moves_own_rows_apart(p_, plan_));
            }
        }
        if (out.piece == 0) write_details(p_, plan_, out.token, at_target);
        if (plan_.any_staged && out.piece == p_.pipeline.pieces_per_row - 1) {
            const bool owes = owes_flag(plan_, at_target);
            flags.add(owes, owes ? flag_of(p_, at_target) : nullptr, tag_);
        }
    }

   private:
    __device__ void go_to_first() {
        token_ = role_.index;
        position_ = load_position(p_, token_);
        next_position_ = load_position(p_, token_ + role_.count);
        piece_ = 0;
    }

    __device__ void go_on() {
        token_ += role_.count;
        position_ = next_position_;
        next_position_ = load_position(p_, token_ + role_.count);  // not needed until the token after this one
        piece_ = 0;
    }

    // Lane 0.
    __device__ void store_to(const Outgoing& out, const uint8_t* buffer, const Target& target, int row,
                             bool with_row) const {
        const int offset = out.piece * p_.pipeline.piece_bytes;
        const int bytes = min(p_.pipeline.piece_bytes, p_.row_bytes - offset);
        if (with_row) bulk_store(target.base[kRows] + row * target.stride[kRows] + offset, buffer, bytes);
        if (p_.pipeline.scale_bytes > 0 && out.piece == 0) {
            bulk_store(target.base[kScales] + row * target.stride[kScales], buffer + p_.pipeline.piece_bytes,
                       p_.pipeline.scale_bytes);
        }
    }

    __device__ void store_own_grouped(const Outgoing& out, const uint8_t* buffer, int received) const {
        const int offset = out.piece * p_.pipeline.piece_bytes;
        const int bytes = min(p_.pipeline.piece_bytes, p_.row_bytes - offset);
        const int own = own_grouped_row(p_, out.token, received);
        for (int k = 0; k < p_.top_k; ++k) {
            const int64_t to = __shfl_sync(~0u, own, k);
            if (to >= 0 && threadIdx.x % 32 == 0) bulk_store(p_.recv_rows + to * p_.row_bytes + offset, buffer, bytes);
        }
        if (out.piece == 0) write_own_grouped(p_, out.token, received, own);
    }

    const DispatchParams& p_;
    const Plan& plan_;
    const Role role_;
    int token_, piece_, position_, next_position_;  // the next piece; the positions of its token and of the one after
    int pass_ = -1;                                 // not known
    uint64_t tag_ = 0;
};

// A sending warp's tokens of one pass, through registers.
__device__ void send_by_registers(const DispatchParams& p, const Plan& plan, int pass, uint64_t tag) {
    const Role role = sender_role(p.pipeline);
    for (int token = role.index; token < p.num_tokens; token += role.count) {
        const int at_target = row_at_target(p, plan, load_position(p, token), pass);
        if (!__any_sync(~0u, at_target >= 0)) continue;
        const uint8_t* from = p.x + token * p.x_stride;
        uint8_t* to[kMaxRanks] = {};
        int own = -1;
#pragma unroll
        for (int i = 1; i <= kMaxRanks; ++i) {
            if (i > p.call.num_ranks) break;
            const int r = (p.call.rank + i) % p.call.num_ranks, row = __shfl_sync(~0u, at_target, r);
            if (row < 0) continue;
            if (p.grouped && r == p.call.rank) {
                own = row;
            } else {
                to[i - 1] = plan.targets[r].base[kRows] + row * plan.targets[r].stride[kRows];
            }
        }
        const bool owes = owes_flag(plan, at_target);
        uint64_t* const flag = owes ? flag_of(p, at_target) : nullptr;
        if (breaks(p.call, Mutation::kFlagBeforeRow)) raise_flag(p.call, owes, flag, tag);
        copy_row<kMaxRanks>(from, to, 0, p.row_bytes);
        if (own >= 0) {
            const int own_row = own_grouped_row(p, token, own);
            for (int k = 0; k < p.top_k; ++k) {
                const int64_t row = __shfl_sync(~0u, own_row, k);
                uint8_t* const copy[1] = {p.recv_rows + row * p.row_bytes};
                if (row >= 0) copy_row<1>(from, copy, 0, p.row_bytes);
            }
            write_own_grouped(p, token, own, own_row);
        }
        write_details(p, plan, token, at_target);
        raise_flag(p.call, owes, flag, tag);
    }
}

// Whether the lane's rank gets rows of this rank in a pass, and so must have drained the one before.
__device__ bool gets_rows(const DispatchParams& p, const Plan& plan, int pass) {
    const int lane = threadIdx.x % 32;
    return lane < p.call.num_ranks && plan.targets[lane].staged &&
           rows_between(p, p.call.rank, lane) > pass * p.stage.num_slots;
}

// A sending warp, pass by pass.
__device__ void send(const DispatchParams& p, const Plan& plan, RowPump<Tokens>& pump, Tokens& tokens, uint64_t epoch) {
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        if (pass > 0 && !wait_for_drains(p.call, epoch, pass, gets_rows(p, plan, pass))) break;
        tokens.begin_pass(epoch, pass);
        pump.move(p.call, tokens);
    }
    pump.finish();
}

__device__ void send_by_registers(const DispatchParams& p, const Plan& plan, uint64_t epoch) {
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        if (pass > 0 && !wait_for_drains(p.call, epoch, pass, gets_rows(p, plan, pass))) return;
        send_by_registers(p, plan, pass, pass_tag(epoch, pass));
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
        copy_row<1>(p.x + token * p.x_stride, to, 0, p.row_bytes);
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

// One warp of every block, when all of the block has sent: tells every peer.
__device__ void tell_arrivals(const DispatchParams& p, uint64_t epoch) {
    if (load_relaxed_gpu(&p.call.state->gave_up)) return;
    stress_sleep(p.call);
    const int lane = threadIdx.x % 32;
    if (lane >= p.call.num_ranks || lane == p.call.rank) return;
    store_release_sys(&control_of(p.call, lane)->arrived[p.call.rank][blockIdx.x], epoch);
}

// Warps of one block, from the second on, a peer each: all blocks of that peer have sent everything.
__device__ void wait_for_arrivals(const DispatchParams& p, const Plan& plan, uint64_t epoch) {
    const int rank = static_cast<int>(threadIdx.x / 32) - 1;
    if (rank >= p.call.num_ranks || rank == p.call.rank || breaks(p.call, Mutation::kEndWithoutArrivals)) return;
    for (int block = threadIdx.x % 32; block < plan.entries[rank].num_blocks; block += 32) {
        const uint64_t* word = &control_of(p.call, p.call.rank)->arrived[rank][block];
        if (!wait_for(p.call, word, epoch, Missing::kArrival, rank)) return;
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

// All threads, in a call that does not go on. The last block clears, for the others still read what it writes.
__device__ __noinline__ void end_without_rows(const DispatchParams& p, uint64_t epoch) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) is_last = is_last_block(p.call);
    __syncthreads();
    if (!is_last) return;
    if (p.marks_unused) clear_call(p);
    if (threadIdx.x == 0) end_epoch(p.call, epoch);
}

// The last warp: enters, and meets the peers.
__device__ void make_plan(const DispatchParams& p, uint64_t epoch, Plan& plan) {
    if (blockIdx.x == 0) enter_call(p.call, epoch);
    begin_plan(p, plan);
    const bool go = meet(p.call, epoch, plan.entries);
    if (go) finish_plan(p, plan);
    if (threadIdx.x % 32 == 0) plan.go = go;
}

// A block that takes part: its warps by their roles.
template <bool kBulkCopies>
__device__ void move_rows(const DispatchParams& p, Plan& plan, FlagRings& rings, uint64_t epoch) {
    const bool sends = is_sender(p.pipeline);
    if constexpr (kBulkCopies) {
        if (sends) {
            Tokens tokens(p, plan);
            RowPump<Tokens> pump(buffers_of_warp(p.pipeline), rings.of[threadIdx.x / 32]);
            pump.prefetch(tokens);
            block_barrier();
            if (plan.go) {
                send(p, plan, pump, tokens, epoch);
            } else {
                pump.discard();
            }
            return;
        }
    }
    if (threadIdx.x / 32 == kLastWarp) make_plan(p, epoch, plan);
    block_barrier();
    if (!plan.go) return;
    if (sends) {
        send_by_registers(p, plan, epoch);
    } else if (kBulkCopies && is_flagger()) {
        if (plan.any_staged) raise_flags(p.call, p.pipeline, rings);
    } else {
        if (p.grouped || p.marks_unused) mark_unused(p, plan);
        if (kBulkCopies && moves_own_rows_apart(p, plan)) move_own_rows(p, plan);
        if (p.call.entry.landing[kRows] < 0 && p.call.num_ranks > 1) drain(p, plan, epoch);
    }
}

template <bool kBulkCopies>
__global__ void __launch_bounds__(kThreadsPerBlock, 1) dispatch(const __grid_constant__ DispatchParams p) {
    if constexpr (kBulkCopies && !HPC_MOE_HAS_BULK_COPIES) return;  // never launched there
    __shared__ Plan plan;
    __shared__ FlagRings rings;
    if (threadIdx.x / 32 == kLastWarp && blockIdx.x == 0) {
        fence_acq_rel_sys();  // for make_plan: it takes a while
    } else {
        fetch_parameters(p);
    }
    if (p.call.behind_exchange && p.call.state->refused) {
        if (blockIdx.x == 0 && p.marks_unused) clear_call(p);
        return;
    }
    const uint64_t epoch = begin_epoch(p.call);
    move_rows<kBulkCopies>(p, plan, rings, epoch);
    if (plan.go && threadIdx.x < 32 && breaks(p.call, Mutation::kArrivalBeforeAllWarps)) tell_arrivals(p, epoch);
    __syncthreads();
    if (!plan.go) {
        end_without_rows(p, epoch);
    } else if (threadIdx.x < 32) {
        tell_arrivals(p, epoch);
        if (threadIdx.x == 0 && is_last_block(p.call)) {
            count_passes(p.call, plan.num_passes);
            end_epoch(p.call, epoch);
        }
    } else if (blockIdx.x == 0) {
        wait_for_arrivals(p, plan, epoch);
    }
}

}  // namespace

void launch_dispatch(const DispatchParams& params, const Launch& launch) {
    launch_mover(dispatch<true>, dispatch<false>, params, launch, "launching the dispatch kernel");
}

void prepare_dispatch(bool bulk_copies) { prepare_mover(dispatch<true>, dispatch<false>, bulk_copies); }

}  // namespace hpc_moe::cuda
