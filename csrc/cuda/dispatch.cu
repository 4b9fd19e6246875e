// Dispatch, inside a node.
//
// 1. All ranks meet (device/protocol.cuh). A rank's entry says where in its window this call's results may land;
//    without such a place its rows are *staged*: they wait in the window's stage, a region per source, and the
//    receiver moves them to its results. Meanwhile sending warps load their first rows.
// 2. *Send.* A warp takes a token, reads its row once, and writes it to every rank that it goes to: all links are used
//    all the time, at the rate that they take (pipeline.h). Lane r moves rows, and scales if it can, to rank r, by bulk
//    copies through shared memory; all lanes write the rest. Where a row goes follows from counts and positions that
//    both sides know: nothing is asked. This rank's own rows take the same way, straight to its results; where nothing
//    is staged, the warps that would drain copy them.
// 3. *Staged rows.* When every lane of a sending warp knows that its bulk copies are done (not: read), the warp
//    meets, and the lanes that send release their flags to the block's flagging warp, which acquires them, and
//    releases them (fence, then stores) in the peers' windows (Control::row_flags, epoch and pass). The receiver's
//    draining warps acquire them there, and copy (dispatch_drain.cuh). Where rows pass through registers, the
//    sending warp releases their flags itself.
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
#include "cuda/dispatch_drain.cuh"
#include "cuda/dispatch_plan.cuh"
#include "cuda/mover.h"

namespace hpc_moe::cuda {
namespace {

// --- sending -----------------------------------------------------------------------------------------------------

// Which of the positions for a rank a pass takes, and where the rank has their rows. Before a pass has begun: all.
struct PassRows {
    int first = 0, count = INT32_MAX;
    int shift = 0;  // from a position to a row

    __device__ bool takes(int position) const { return position >= first && position - first < count; }
    __device__ int row_of(int position) const { return takes(position) ? position + shift : -1; }
};

// Lane r: of rank r.
__device__ PassRows rows_of_pass(const DispatchParams& p, const Plan& plan, int pass) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.call.num_ranks) return {0, 0, 0};
    const int slots = p.stage.num_slots;
    if (plan.targets[lane].staged) return {pass * slots, slots, -pass * slots};
    return {0, pass == 0 ? INT32_MAX : 0, plan.targets[lane].first};
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

// A sending warp's tokens, one after the other. In lane r, the positions are those among the tokens for rank r, -1: it
// does not go there.
struct TokenCursor {
    int token;
    int offset;  // bytes of its row that are done
    int position;
    int next_position;       // of the token after it
    const int32_t* next_at;  // where that was read
};

// A sending warp's tokens, for bulk copies: see RowPump. Lane r sends to rank r.
class Tokens {
   public:
    __device__ Tokens(const DispatchParams& p, const Plan& plan)
        : p_(p), plan_(plan), role_(sender_role(p.pipeline)), lane_(threadIdx.x % 32) {
        go_to_first(loads_);
        go_to_first(stores_);
    }

    __device__ Pacer pacer() const {
        const int ranks = p_.call.num_ranks;
        const int sent = lane_ < ranks && lane_ != p_.call.rank ? rows_between(p_, p_.call.rank, lane_) : 0;
        const float peers_per_row = static_cast<float>(__reduce_add_sync(~0u, sent)) / max(p_.num_tokens, 1);
        return Pacer(p_.pipeline, role_, p_.num_tokens, peers_per_row);
    }

    // Of the one and only pass, what was loaded before it began is what it needs.
    __device__ void begin_pass(uint64_t epoch, int pass) {
        if (plan_.num_passes > 1) {
            go_to_first(loads_);
            go_to_first(stores_);
        }
        tag_ = pass_tag(epoch, pass);
        rows_ = rows_of_pass(p_, plan_, pass);
        if (lane_ >= p_.call.num_ranks) return;
        const Target& target = plan_.targets[lane_];
        const bool is_own = lane_ == p_.call.rank;
        base_ = is_own && (p_.grouped || moves_own_rows_apart(p_, plan_)) ? nullptr : target.base[kRows];
        stride_ = target.stride[kRows];
    }

    __device__ bool load_next(RowBuffers& buffers) {
        if (loads_.offset == 0 && !find(loads_)) return false;
        const int64_t token = loads_.token;
        buffers.fill(p_.x + token * p_.x_stride + loads_.offset, piece_size(p_.pipeline, p_.row_bytes, loads_.offset),
                     p_.scales + token * p_.scale_token_stride, loads_.offset == 0 ? p_.pipeline.scale_bytes : 0,
                     p_.pipeline.piece_bytes);
        end_piece(loads_);
        return true;
    }

    __device__ int store_next(const uint8_t* buffer, OwedFlags& flags) {
        const int offset = stores_.offset, size = piece_size(p_.pipeline, p_.row_bytes, offset);
        if (offset == 0) begin_row();
        if (plan_.any_staged && offset + size == p_.row_bytes) {
            const bool owes = owes_flag(plan_, row_);
            flags.add(p_.call, owes, owes ? flag_of(p_, row_) : nullptr, tag_);
        }
        if (to_ != nullptr) bulk_store(to_ + offset, buffer, size);
        if (p_.grouped) store_own_grouped(buffer, size);
        if (offset == 0) store_details(buffer);
        end_piece(stores_);
        return offset == 0 ? size + p_.pipeline.scale_bytes : size;
    }

   private:
    __device__ void go_to_first(TokenCursor& at) const {
        const int64_t row = static_cast<int64_t>(role_.index + role_.count) * p_.call.num_ranks;
        at = {role_.index, 0, load_position(p_, role_.index), load_position(p_, role_.index + role_.count),
              p_.send_position + row + lane_};
    }

    __device__ void go_on(TokenCursor& at) const {
        at.token += role_.count;
        at.offset = 0;
        at.position = at.next_position;
        at.next_at += role_.count * p_.call.num_ranks;
        // Not needed until the token after this one.
        at.next_position = lane_ < p_.call.num_ranks && at.token + role_.count < p_.num_tokens ? *at.next_at : -1;
    }

    __device__ void end_piece(TokenCursor& at) const {
        at.offset += p_.pipeline.piece_bytes;
        if (at.offset >= p_.row_bytes) go_on(at);
    }

    // Goes to the next token that this pass needs; before it has begun, to the next that goes anywhere.
    __device__ bool find(TokenCursor& at) const {
        for (; at.token < p_.num_tokens; go_on(at)) {
            if (__any_sync(~0u, rows_.takes(at.position))) return true;
        }
        return false;
    }

    __device__ void begin_row() {
        find(stores_);
        row_ = rows_.row_of(stores_.position);
        to_ = row_ >= 0 && base_ != nullptr ? base_ + row_ * stride_ : nullptr;
    }

    // What goes along with the row's first piece.
    __device__ void store_details(const uint8_t* buffer) const {
        if (p_.pipeline.scale_bytes > 0 && row_ >= 0 && !(p_.grouped && lane_ == p_.call.rank)) {
            const Target& target = plan_.targets[lane_];
            bulk_store(target.base[kScales] + row_ * target.stride[kScales], buffer + p_.pipeline.piece_bytes,
                       p_.pipeline.scale_bytes);
        }
        write_details(p_, plan_, stores_.token, row_);
    }

    __device__ void store_own_grouped(const uint8_t* buffer, int size) const {
        const int received = __shfl_sync(~0u, row_, p_.call.rank);
        if (received < 0) return;
        const int64_t own = own_grouped_row(p_, stores_.token, received);
        if (own >= 0) bulk_store(p_.recv_rows + own * p_.row_bytes + stores_.offset, buffer, size);
        if (stores_.offset == 0) write_own_grouped(p_, stores_.token, received, static_cast<int>(own));
    }

    const DispatchParams& p_;
    const Plan& plan_;
    const Role role_;
    const int lane_;
    TokenCursor loads_, stores_;
    // Of the pass, in lane r for rank r:
    PassRows rows_;
    uint8_t* base_ = nullptr;  // null: this rank's own rows do not go this way
    int64_t stride_ = 0;
    uint64_t tag_ = 0;
    // Of the row that is being stored:
    int row_ = -1;           // lane r: at rank r; -1: it does not go there
    uint8_t* to_ = nullptr;  // lane r: where it begins there; null: it does not go there, or not this way
};

// A sending warp's tokens of one pass, through registers.
__device__ void send_by_registers(const DispatchParams& p, const Plan& plan, int pass, uint64_t tag) {
    const Role role = sender_role(p.pipeline);
    const PassRows rows = rows_of_pass(p, plan, pass);
    for (int token = role.index; token < p.num_tokens; token += role.count) {
        const int at_target = rows.row_of(load_position(p, token));
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
        if (plan.num_passes > 1) pump.discard();
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
    } else if (is_drainer(p.pipeline)) {
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
