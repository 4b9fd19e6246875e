// Combine, inside a node.
//
// 1. All ranks meet (device/protocol.cuh): a peer that has entered has drained what was in its stage. Meanwhile sending
//    warps load their first rows.
// 2. *Send.* A warp takes a received row and writes it into the stage of the rank that its token came from: region
//    of this rank, slot of the token. Rows for different ranks take turns, so all links are used all the time. Rows
//    that came from this rank itself stay where they are. Lane 0 moves rows by bulk copies; in the grouped layout
//    all lanes add up a token's copies, and write the float32 sum.
// 3. *Flags.* As in dispatch.cu, step 3: when bulk copies are done, the block's flagging warp releases the rows' flags
//    (Control::row_flags, by source and slot), which the summing warps acquire. Where rows pass through registers, the
//    sending warp does.
// 4. *Sum.* A summing warp takes a token, waits for the flags of all ranks that it went to, and adds the rows in the
//    order of ranks, then the biases (combine_sums.cuh). Sums begin while later rows are on their way.
// 5. *Passes.* A pass takes as many tokens of every rank as a region has slots. The last summing warp of a pass
//    counts up (acq_rel) to what was expected, and releases Control::drained at all peers, which acquire it before
//    the next pass. A rank without tokens in a pass gets no rows in it, nor in later ones: nobody waits for it.
//
// The kernel ends when all sums are written, for which all rows had to come. Sending and summing is done by different
// warps of a block, all blocks are resident at once, and a sending warp never waits for a row.
#include "cuda/combine.h"
#include "cuda/combine_sums.cuh"
#include "cuda/device/protocol.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/mover.h"

namespace hpc_moe::cuda {
namespace {

// The last warp, after all ranks have entered.
__device__ void finish_plan(const CombineParams& p, Plan& plan) {
    const int lane = threadIdx.x % 32, ranks = p.call.num_ranks;
    int passes = 1;
    if (lane < ranks) {
        const int tokens = plan.entries[lane].num_tokens;
        if (ranks > 1) passes = max(1, (tokens + p.stage.num_slots - 1) / p.stage.num_slots);
    }
    passes = __reduce_max_sync(~0u, passes);
    if (lane == 0) {
        plan.num_passes = passes;
        plan.first_own = p.call.rank > 0 ? p.rank_prefix_matrix[(p.call.rank - 1) * ranks + p.call.rank] : 0;
    }
    __syncwarp();
}

// --- sending -----------------------------------------------------------------------------------------------------

// A received row, or a piece of it, on its way back. The same in all lanes.
struct Outgoing {
    int row;  // of x, in the token layout; else the received token
    int piece;
    int rank;
    int token;  // of that rank
};

// The slot of a token in a pass; -1 if it has none.
__device__ int slot_of(const CombineParams& p, int token, int pass) {
    const int slot = token - pass * p.stage.num_slots;
    return slot >= 0 && slot < p.stage.num_slots ? slot : -1;
}

__device__ uint64_t* flag_of(const CombineParams& p, int rank, int slot) {
    return &control_of(p.call, rank)->row_flags[p.call.rank][slot];
}

__device__ void send_weights(const CombineParams& p, const Outgoing& out, int slot) {
    const int lane = threadIdx.x % 32;
    if (p.topk_weights == nullptr || lane >= p.top_k) return;
    int64_t at = static_cast<int64_t>(out.row) * p.top_k + lane;
    if (p.grouped) at = p.grouped_rows[at];
    const float weight = at >= 0 ? p.topk_weights[at] : 0.0f;
    reinterpret_cast<float*>(slot_at(p, out.rank, p.call.rank, slot) + p.slot_weights)[lane] = weight;
}

// A sending warp's rows, those of the other ranks in turn; for bulk copies: see RowPump.
class Rows {
   public:
    using Piece = Outgoing;

    __device__ explicit Rows(const CombineParams& p) : p_(p), role_(sender_role(p.pipeline)) {
        const int lane = threadIdx.x % 32, ranks = p.call.num_ranks;
        if (lane < ranks) {
            first_ = lane > 0 ? p.rank_prefix_matrix[(lane - 1) * ranks + p.call.rank] : 0;
            end_ = p.rank_prefix_matrix[lane * ranks + p.call.rank];
        }
        const int most = __reduce_max_sync(~0u, lane == p.call.rank ? 0 : end_ - first_);
        num_items_ = static_cast<uint32_t>(most) * (ranks - 1);
        go_to_first();
    }

    // From now on what is not needed in this pass is left out; before, nothing is known of passes.
    __device__ void begin_pass(uint64_t epoch, int pass) {
        if (pass > 0) go_to_first();
        pass_ = pass;
        tag_ = pass_tag(epoch, pass);
    }

    __device__ bool next(Outgoing& out) {
        for (; item_ < num_items_; go_on()) {
            if (here_.row < 0 || (pass_ >= 0 && slot_of(p_, here_.token, pass_) < 0)) continue;
            out = here_;
            here_.piece += 1;
            if (here_.piece == p_.pipeline.pieces_per_row) go_on();
            return true;
        }
        return false;
    }

    __device__ void load(const Outgoing& out, const RowBuffers& buffers) const {
        const int offset = out.piece * p_.pipeline.piece_bytes;
        buffers.fill(p_.call, p_.x + out.row * p_.x_stride + offset,
                     min(p_.pipeline.piece_bytes, p_.row_bytes - offset), nullptr, 0, 0);
    }

    __device__ void store(const Outgoing& out, const uint8_t* buffer, OwedFlags& flags) const {
        const int slot = slot_of(p_, out.token, pass_), offset = out.piece * p_.pipeline.piece_bytes;
        if (slot < 0) return;
        if (threadIdx.x % 32 == 0) {
            bulk_store(slot_at(p_, out.rank, p_.call.rank, slot) + offset, buffer,
                       min(p_.pipeline.piece_bytes, p_.row_bytes - offset));
        }
        if (out.piece == 0) send_weights(p_, out, slot);
        if (out.piece == p_.pipeline.pieces_per_row - 1) {
            flags.add(threadIdx.x % 32 == 0, flag_of(p_, out.rank, slot), tag_);
        }
    }

   private:
    // row -1: a rank that sent fewer rows has none for this item.
    __device__ Outgoing outgoing(uint32_t item) const {
        const uint32_t others = p_.call.num_ranks - 1;
        Outgoing out{-1, 0, (p_.call.rank + 1 + static_cast<int>(item % others)) % p_.call.num_ranks, -1};
        if (item >= num_items_) return out;
        const int row = __shfl_sync(~0u, first_, out.rank) + static_cast<int>(item / others);
        if (row >= __shfl_sync(~0u, end_, out.rank)) return out;
        out.row = row;
        out.token = p_.recv_source_index[row];
        return out;
    }

    __device__ void go_to_first() {
        item_ = role_.index;
        here_ = outgoing(item_);
        after_ = outgoing(item_ + role_.count);
    }

    __device__ void go_on() {
        item_ += role_.count;
        here_ = after_;
        after_ = outgoing(item_ + role_.count);  // not needed until the item after this one
    }

    const CombineParams& p_;
    const Role role_;
    int first_ = 0, end_ = 0;  // lane r: the rows of x that came from rank r
    uint32_t num_items_;
    uint32_t item_;
    Outgoing here_, after_;  // of this item and the one after
    int pass_ = -1;          // not known
    uint64_t tag_ = 0;
};

__device__ uint4 float_bits_of(const float* values) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
}

__device__ void write_row(const CombineParams& p, const Outgoing& out, uint8_t* slot) {
    if (!p.grouped) {
        uint8_t* const to[1] = {slot};
        copy_row<1>(p.x + out.row * p.x_stride, to, 0, p.row_bytes);
        return;
    }
    for (int at = 16 * (threadIdx.x % 32); at < p.row_bytes; at += kChunkBytes) {
        float sum[8];
        sum_copies(p, out.row, at, sum);
        store_16(slot + 2 * at, float_bits_of(sum));
        store_16(slot + 2 * at + 16, float_bits_of(sum + 4));
    }
}

__device__ void send_by_registers(const CombineParams& p, Rows& rows, int pass, uint64_t tag) {
    for (Outgoing out; rows.next(out);) {
        const int slot = slot_of(p, out.token, pass);
        const bool owes = threadIdx.x % 32 == 0;
        uint64_t* const flag = flag_of(p, out.rank, slot);
        if (breaks(p.call, Mutation::kFlagBeforeRow)) raise_flag(p.call, owes, flag, tag);
        write_row(p, out, slot_at(p, out.rank, p.call.rank, slot));
        send_weights(p, out, slot);
        raise_flag(p.call, owes, flag, tag);
    }
}

// Whether the lane's rank may get rows of this rank in a pass, and so must have drained the one before.
__device__ bool gets_rows(const CombineParams& p, const Plan& plan, int pass) {
    const int lane = threadIdx.x % 32;
    return lane < p.call.num_ranks && lane != p.call.rank && plan.entries[lane].num_tokens > pass * p.stage.num_slots;
}

// A sending warp, pass by pass. `pump`: null where rows pass through registers.
__device__ void send(const CombineParams& p, const Plan& plan, Rows& rows, RowPump<Rows>* pump, uint64_t epoch) {
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        if (pass > 0 && !wait_for_drains(p.call, epoch, pass, gets_rows(p, plan, pass))) break;
        rows.begin_pass(epoch, pass);
        if (pump) {
            pump->move(p.call, rows);
        } else {
            send_by_registers(p, rows, pass, pass_tag(epoch, pass));
        }
    }
    if (pump) pump->finish();
}

// --- the kernel ----------------------------------------------------------------------------------------------------

// A block: its warps by their roles. The last one meets the peers while the others load their first rows.
template <bool kBulkCopies>
__device__ void move_rows(const CombineParams& p, Plan& plan, FlagRings& rings, uint64_t epoch) {
    const bool sends = is_sender(p.pipeline) && p.call.num_ranks > 1;
    if (sends && kBulkCopies) {
        Rows rows(p);
        RowPump<Rows> pump(buffers_of_warp(p.pipeline), rings.of[threadIdx.x / 32]);
        pump.prefetch(rows);
        block_barrier();
        if (plan.go) {
            send(p, plan, rows, &pump, epoch);
        } else {
            pump.discard();
        }
        return;
    }
    if (threadIdx.x / 32 == kLastWarp) {
        if (blockIdx.x == 0) enter_call(p.call, epoch);
        const bool go = meet(p.call, epoch, plan.entries);
        if (go) finish_plan(p, plan);
        if (threadIdx.x % 32 == 0) plan.go = go;
    }
    block_barrier();
    if (!plan.go) return;
    if (sends) {
        Rows rows(p);
        send(p, plan, rows, nullptr, epoch);
    } else if (kBulkCopies && is_flagger()) {
        if (p.call.num_ranks > 1) raise_flags(p.call, p.pipeline, rings);
    } else if (is_drainer(p.pipeline)) {
        sum<kBulkCopies>(p, plan, epoch);
    }
}

template <bool kBulkCopies>
__global__ void __launch_bounds__(kThreadsPerBlock, 1) combine(const __grid_constant__ CombineParams p) {
    if constexpr (kBulkCopies && !HPC_MOE_HAS_BULK_COPIES) return;  // never launched there
    __shared__ Plan plan;
    __shared__ FlagRings rings;
    if (threadIdx.x / 32 == kLastWarp && blockIdx.x == 0) {
        fence_acq_rel_sys();  // for enter_call: it takes a while
    } else {
        fetch_parameters(p);
    }
    const uint64_t epoch = begin_epoch(p.call);
    move_rows<kBulkCopies>(p, plan, rings, epoch);
    __syncthreads();
    if (threadIdx.x == 0 && is_last_block(p.call)) {
        if (plan.go) count_passes(p.call, plan.num_passes);
        end_epoch(p.call, epoch);
    }
}

}  // namespace

void launch_combine(const CombineParams& params, const Launch& launch) {
    launch_mover(combine<true>, combine<false>, params, launch, "launching the combine kernel");
}

void prepare_combine(bool bulk_copies) { prepare_mover(combine<true>, combine<false>, bulk_copies); }

}  // namespace hpc_moe::cuda
