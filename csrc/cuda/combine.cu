// Combine, inside a node.
//
// 1. All ranks meet (device/protocol.cuh): a peer that has entered has drained what was in its stage. Meanwhile sending
//    warps load their first rows.
// 2. *Send.* A warp takes a received row and writes it into the stage of the rank that its token came from: region
//    of this rank, slot of the token. Rows for different ranks take turns, so all links are used all the time. Rows
//    that came from this rank itself stay where they are. Lane r moves those for rank r by bulk copies, at the rate
//    that the links take (pipeline.h); in the grouped layout all lanes add up a token's copies, and write the float32
//    sum.
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

// A received row on its way back. The same in all lanes.
struct Outgoing {
    int row;    // of x, in the token layout; else the received token; -1: none
    int rank;   // that the token came from
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

// An item is the how-manieth row of which of the other ranks, as seen from this one. Items are numbered rank by rank
// within a turn, and dealt to the sending warps in rounds, each round one further: so every warp serves all ranks.
struct Item {
    int turn, other;
    int place;  // of the warp, in this round
};

// A sending warp's items, one after the other. The same in all lanes.
struct RowCursor {
    Item item, next_item;
    Outgoing row, next_row;
    int offset;  // bytes of the row that are done
};

// A sending warp's rows, those of the other ranks in turn; for bulk copies: see RowPump. Lane r sends to rank r.
class Rows {
   public:
    __device__ explicit Rows(const CombineParams& p, const Plan& plan)
        : p_(p), plan_(plan), role_(sender_role(p.pipeline)), others_(p.call.num_ranks - 1) {
        const int lane = threadIdx.x % 32, ranks = p.call.num_ranks;
        if (lane < ranks) {
            first_ = lane > 0 ? p.rank_prefix_matrix[(lane - 1) * ranks + p.call.rank] : 0;
            end_ = p.rank_prefix_matrix[lane * ranks + p.call.rank];
            region_ = slot_at(p, lane, p.call.rank, 0);
            flags_ = flag_of(p, lane, 0);
        }
        num_turns_ = __reduce_max_sync(~0u, lane == p.call.rank ? 0 : end_ - first_);
        start_ = {role_.index / others_, role_.index % others_, role_.index};
        step_ = {(role_.count + 1) / others_, (role_.count + 1) % others_, 1};
        go_to_first(loads_);
        go_to_first(stores_);
    }

    __device__ Pacer pacer() const { return Pacer(p_.pipeline, role_, num_turns_ * others_, 1.0f); }

    // Of the one and only pass, what was loaded before it began is what it needs.
    __device__ void begin_pass(uint64_t epoch, int pass) {
        if (plan_.num_passes > 1) {
            go_to_first(loads_);
            go_to_first(stores_);
        }
        pass_ = pass;
        tag_ = pass_tag(epoch, pass);
    }

    __device__ bool load_next(RowBuffers& buffers) {
        if (loads_.offset == 0 && !find(loads_)) return false;
        const int size = piece_size(p_.pipeline, p_.row_bytes, loads_.offset);
        buffers.fill(p_.x + loads_.row.row * p_.x_stride + loads_.offset, size, nullptr, 0, 0);
        end_piece(loads_);
        return true;
    }

    __device__ int store_next(const uint8_t* buffer, OwedFlags& flags) {
        if (stores_.offset == 0) {
            find(stores_);
            slot_ = slot_of(p_, stores_.row.token, pass_);
            to_ = region_ + slot_ * p_.stage.slot_bytes;
            if (slot_ >= 0) send_weights(p_, stores_.row, slot_);
        }
        const bool sends = threadIdx.x % 32 == stores_.row.rank && slot_ >= 0;
        const int offset = stores_.offset, size = piece_size(p_.pipeline, p_.row_bytes, offset);
        if (offset + size == p_.row_bytes) flags.add(p_.call, sends, flags_ + slot_, tag_);
        if (sends) bulk_store(to_ + offset, buffer, size);
        end_piece(stores_);
        return size;
    }

    // Without bulk copies: the next row of the pass, as a whole.
    __device__ bool next(Outgoing& out) {
        if (!find(stores_)) return false;
        out = stores_.row;
        go_on(stores_);
        return true;
    }

   private:
    __device__ Outgoing outgoing(const Item& item) const {
        Outgoing out = {-1, p_.call.rank + 1 + item.other, -1};
        if (out.rank >= p_.call.num_ranks) out.rank -= p_.call.num_ranks;
        const int row = __shfl_sync(~0u, first_, out.rank) + item.turn;
        if (row >= __shfl_sync(~0u, end_, out.rank)) return out;  // a rank that sent fewer rows has none here
        out.row = row;
        out.token = p_.recv_source_index[row];
        return out;
    }

    __device__ Item after(const Item& item) const {
        Item next = {item.turn + step_.turn, item.other + step_.other, item.place + 1};
        if (next.place == role_.count) next = {item.turn, item.other + 1, 0};
        if (next.other >= others_) next = {next.turn + 1, next.other - others_, next.place};
        return next;
    }

    __device__ void go_to_first(RowCursor& at) const {
        at = {start_, after(start_), outgoing(start_), outgoing(after(start_)), 0};
    }

    __device__ void go_on(RowCursor& at) const {
        at.item = at.next_item;
        at.row = at.next_row;
        at.next_item = after(at.item);
        at.next_row = outgoing(at.next_item);  // not needed until the item after this one
        at.offset = 0;
    }

    __device__ void end_piece(RowCursor& at) const {
        at.offset += p_.pipeline.piece_bytes;
        if (at.offset >= p_.row_bytes) go_on(at);
    }

    // Goes to the next row that this pass needs; before it has begun, to the next that there is.
    __device__ bool find(RowCursor& at) const {
        for (; at.item.turn < num_turns_; go_on(at)) {
            if (at.row.row >= 0 && (pass_ < 0 || slot_of(p_, at.row.token, pass_) >= 0)) return true;
        }
        return false;
    }

    const CombineParams& p_;
    const Plan& plan_;
    const Role role_;
    const int others_;
    // Lane r:
    int first_ = 0, end_ = 0;    // the rows of x that came from rank r
    uint8_t* region_ = nullptr;  // of this rank, in the stage of rank r
    uint64_t* flags_ = nullptr;  // and its flags, a slot each
    int num_turns_;              // the most rows of any
    Item start_, step_;
    RowCursor loads_, stores_;
    int pass_ = -1;  // not known
    uint64_t tag_ = 0;
    // Of the row that is being stored:
    int slot_ = -1;
    uint8_t* to_ = nullptr;  // lane r: where it would begin in the stage of rank r
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
    const Copies copies = copies_of(p, out.row);
    for (int begin = 0; begin < p.row_bytes; begin += kChunkBytes) {
        const int at = begin + 16 * (threadIdx.x % 32);
        float sum[8];
        sum_copies(p, copies, at < p.row_bytes, at, sum);
        if (at >= p.row_bytes) continue;
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
        if (pump && plan.num_passes > 1) pump->discard();
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
        Rows rows(p, plan);
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
        Rows rows(p, plan);
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
