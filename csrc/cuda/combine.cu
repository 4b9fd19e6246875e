// Combine, inside a node.
//
// 1. All ranks meet (device/protocol.cuh): a peer that has entered has drained what was in its stage.
// 2. *Send.* A warp takes a received row and writes it into the stage of the rank that its token came from: region
//    of this rank, slot of the token. Rows for different ranks take turns, so all links are used all the time. Rows
//    that came from this rank itself stay where they are. Lane 0 moves rows by bulk copies; in the grouped layout
//    all lanes add up a token's copies, and write the float32 sum.
// 3. *Flags.* As in dispatch.cu, step 3: every few rows, lane 0 waits until its bulk copies are done, the warp
//    meets, and the lanes release the rows' flags (Control::row_flags, by source and slot), which the summing warps
//    acquire.
// 4. *Sum.* Four warps share a few tokens, a quarter of each row to a warp. Each waits for the flags of all ranks
//    that the tokens went to, and adds the rows in the order of ranks, then the biases, in float32. Sums begin while
//    later rows are on their way.
// 5. *Passes.* A pass takes as many tokens of every rank as a region has slots. The last summing warp of a pass
//    counts up (acq_rel) to what was expected, and releases Control::drained at all peers, which acquire it before
//    the next pass. A rank without tokens in a pass gets no rows in it, nor in later ones: nobody waits for it.
//
// The kernel ends when all sums are written, for which all rows had to come. Sending and summing is done by different
// warps of a block, all blocks are resident at once, and a sending warp never waits for a row.
#include <cuda_bf16.h>

#include "cuda/combine.h"
#include "cuda/device/protocol.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/mover.h"

namespace hpc_moe::cuda {
namespace {

constexpr int kSumParts = 4;  // warps that share a token
constexpr int kTokensPerBatch = 32 / kMaxRanks;
constexpr int kChunkBytes = 512;  // of a row, 16 bytes a lane

// What a block knows once all ranks have entered.
struct Plan {
    int32_t num_tokens[kMaxRanks];  // of every rank
    int32_t first_from[kMaxRanks];  // where its rows begin in x
    int32_t rows_from[kMaxRanks];   // and how many there are
    int32_t most_rows;              // of another rank
    int32_t num_passes;
    bool go;
};

// Warp 0, before the peers have entered.
__device__ void begin_plan(const CombineParams& p, Plan& plan) {
    const int lane = threadIdx.x % 32, ranks = p.call.num_ranks;
    int rows = 0;
    if (lane < ranks) {
        const int first = lane > 0 ? p.rank_prefix_matrix[(lane - 1) * ranks + p.call.rank] : 0;
        rows = p.rank_prefix_matrix[lane * ranks + p.call.rank] - first;
        plan.first_from[lane] = first;
        plan.rows_from[lane] = rows;
        if (lane == p.call.rank) rows = 0;
    }
    rows = __reduce_max_sync(~0u, rows);
    if (lane == 0) plan.most_rows = rows;
    __syncwarp();
}

// Warp 0, after all ranks have entered.
__device__ void finish_plan(const CombineParams& p, uint64_t epoch, Plan& plan) {
    const int lane = threadIdx.x % 32, ranks = p.call.num_ranks;
    int passes = 1;
    if (lane < ranks) {
        plan.num_tokens[lane] = static_cast<int>(entry_of(p.call, epoch, lane).num_tokens);
        if (ranks > 1) passes = max(1, (plan.num_tokens[lane] + p.stage.num_slots - 1) / p.stage.num_slots);
    }
    passes = __reduce_max_sync(~0u, passes);
    if (lane == 0) plan.num_passes = passes;
    __syncwarp();
}

__device__ uint8_t* slot_at(const CombineParams& p, int rank, int source, int slot) {
    return p.call.windows[rank] + p.stage.offset + source * p.stage.region_bytes + slot * p.stage.slot_bytes;
}

// --- sending -----------------------------------------------------------------------------------------------------

// A piece of a received row on its way back. The same in all lanes.
struct Outgoing {
    int row = -1;  // of x, in the token layout; else the received token
    int piece = 0;
    int rank = 0;
    int slot = 0;
};

// The item of a sending warp: rows of the other ranks in turn. row -1: there is none, or not in this pass.
__device__ Outgoing outgoing_item(const CombineParams& p, const Plan& plan, int64_t item, int pass) {
    const int others = p.call.num_ranks - 1;
    Outgoing out;
    out.rank = (p.call.rank + 1 + static_cast<int>(item % others)) % p.call.num_ranks;
    const int index = static_cast<int>(item / others);
    if (index >= plan.rows_from[out.rank]) return out;
    const int row = plan.first_from[out.rank] + index;
    out.slot = p.recv_source_index[row] - pass * p.stage.num_slots;
    if (out.slot >= 0 && out.slot < p.stage.num_slots) out.row = row;
    return out;
}

__device__ void send_weights(const CombineParams& p, const Outgoing& out) {
    const int lane = threadIdx.x % 32;
    if (p.topk_weights == nullptr || lane >= p.top_k) return;
    int64_t at = static_cast<int64_t>(out.row) * p.top_k + lane;
    if (p.grouped) at = p.grouped_rows[at];
    const float weight = at >= 0 ? p.topk_weights[at] : 0.0f;
    reinterpret_cast<float*>(slot_at(p, out.rank, p.call.rank, out.slot) + p.slot_weights)[lane] = weight;
}

// Lane j: the rank may read the warp's j-th row when it has arrived.
__device__ void owe_flag(const CombineParams& p, const Outgoing& out, DueFlags& due) {
    if (out.piece != p.pipeline.pieces_per_row - 1) return;
    if (threadIdx.x % 32 == due.num_rows) due.flag = &control_of(p.call, out.rank)->row_flags[p.call.rank][out.slot];
    due.num_rows += 1;
}

// Sends a piece that was loaded.
__device__ void store_piece(const CombineParams& p, WarpPipeline& pipeline, const Outgoing& out, DueFlags& due) {
    const int offset = out.piece * p.pipeline.piece_bytes;
    if (threadIdx.x % 32 == 0) {
        pipeline.wait_filled();
        bulk_store(slot_at(p, out.rank, p.call.rank, out.slot) + offset, pipeline.filled(),
                   min(p.pipeline.piece_bytes, p.row_bytes - offset));
        commit_stores();
    }
    pipeline.num_emptied += 1;
    if (out.piece == 0) send_weights(p, out);
    owe_flag(p, out, due);
}

__device__ void send_by_bulk_copies(const CombineParams& p, const Plan& plan, WarpPipeline& pipeline, int pass,
                                    uint64_t tag) {
    const int64_t items = static_cast<int64_t>(plan.most_rows) * (p.call.num_ranks - 1);
    const Role role = sender_role(p.pipeline);
    Outgoing ahead;
    DueFlags due;
    for (int64_t item = role.index; item < items; item += role.count) {
        Outgoing next = outgoing_item(p, plan, item, pass);
        if (next.row < 0) continue;
        for (next.piece = 0; next.piece < p.pipeline.pieces_per_row; ++next.piece) {
            finish_stores(p.call, due, tag);  // of the piece before last, whose buffer this one takes
            const int offset = next.piece * p.pipeline.piece_bytes;
            if (threadIdx.x % 32 == 0) {
                pipeline.fill(p.x + next.row * p.x_stride + offset, min(p.pipeline.piece_bytes, p.row_bytes - offset));
            }
            pipeline.num_filled += 1;
            if (ahead.row >= 0) store_piece(p, pipeline, ahead, due);
            ahead = next;
        }
    }
    finish_stores(p.call, due, tag);
    if (ahead.row >= 0) store_piece(p, pipeline, ahead, due);
    finish_all_stores(p.call, due, tag);
}

__device__ void add_bf16(float (&sum)[8], const uint4& row) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] += __uint_as_float(words[i] << 16);
        sum[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
    }
}

// The float32 sum of a received token's copies, 8 channels from `channel_bytes` (of bf16) on.
__device__ void sum_copies(const CombineParams& p, int64_t received, int channel_bytes, float (&sum)[8]) {
#pragma unroll
    for (float& value : sum) value = 0.0f;
    for (int k = 0; k < p.top_k; ++k) {
        const int64_t row = p.grouped_rows[received * p.top_k + k];
        if (row >= 0) add_bf16(sum, load_16(p.x + row * p.x_stride + channel_bytes));
    }
}

__device__ uint4 float_bits_of(const float* values) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
}

__device__ void write_row(const CombineParams& p, const Outgoing& out) {
    uint8_t* const slot = slot_at(p, out.rank, p.call.rank, out.slot);
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

__device__ void send_by_registers(const CombineParams& p, const Plan& plan, int pass, uint64_t tag) {
    const int64_t items = static_cast<int64_t>(plan.most_rows) * (p.call.num_ranks - 1);
    const Role role = sender_role(p.pipeline);
    for (int64_t item = role.index; item < items; item += role.count) {
        Outgoing out = outgoing_item(p, plan, item, pass);
        if (out.row < 0) continue;
        out.piece = p.pipeline.pieces_per_row - 1;
        DueFlags due;
        owe_flag(p, out, due);
        if (breaks(p.call, Mutation::kFlagBeforeRow)) due.raise(p.call, tag);
        write_row(p, out);
        send_weights(p, out);
        due.raise(p.call, tag);
    }
}

// Whether the lane's rank may get rows of this rank in a pass, and so must have drained the one before.
__device__ bool gets_rows(const CombineParams& p, const Plan& plan, int pass) {
    const int lane = threadIdx.x % 32;
    return lane < p.call.num_ranks && lane != p.call.rank && plan.num_tokens[lane] > pass * p.stage.num_slots;
}

template <bool kBulkCopies>
__device__ void send(const CombineParams& p, const Plan& plan, uint64_t epoch) {
    if (p.call.num_ranks == 1) return;
    WarpPipeline pipeline = pipeline_of_warp(p.pipeline, threadIdx.x / 32);
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        if (pass > 0 && !wait_for_drains(p.call, epoch, pass, gets_rows(p, plan, pass))) return;
        if constexpr (kBulkCopies) {
            send_by_bulk_copies(p, plan, pipeline, pass, pass_tag(epoch, pass));
        } else {
            send_by_registers(p, plan, pass, pass_tag(epoch, pass));
        }
    }
}

// --- summing -----------------------------------------------------------------------------------------------------

// Tokens that a warp sums one after the other, so that it waits for their flags at once: lane 8 j + r knows whether
// token j went to rank r, and as which of its rows.
struct Batch {
    int first_token, first_slot, num_tokens;
    int position;  // the lane's, as in send_position
};

// The rows of one token of a batch, the same in all lanes.
struct Contributions {
    int token, slot;
    uint32_t ranks;  // a bit for each rank that sends a row
    int received;    // this rank's own row, -1: none
};

__device__ Batch load_batch(const CombineParams& p, int first_token, int first_slot, int num_tokens) {
    const int lane = threadIdx.x % 32, token = lane / kMaxRanks, rank = lane % kMaxRanks;
    Batch batch{first_token, first_slot, num_tokens, -1};
    if (token < num_tokens && rank < p.call.num_ranks) {
        batch.position = p.send_position[static_cast<int64_t>(first_token + token) * p.call.num_ranks + rank];
    }
    return batch;
}

__device__ Contributions contributions_of(const CombineParams& p, const Plan& plan, const Batch& batch, int index) {
    Contributions found{batch.first_token + index, batch.first_slot + index, 0, -1};
    found.ranks = __ballot_sync(~0u, batch.position >= 0) >> (kMaxRanks * index) & ((1u << kMaxRanks) - 1);
    found.received = __shfl_sync(~0u, batch.position, kMaxRanks * index + p.call.rank);
    if (found.received >= 0) found.received += plan.first_from[p.call.rank];
    return found;
}

// Where the row from `rank` lies.
__device__ const uint8_t* row_from(const CombineParams& p, const Contributions& from, int rank) {
    return rank == p.call.rank ? p.x + from.received * p.x_stride : slot_at(p, p.call.rank, rank, from.slot);
}

// All lanes: the rows of the batch have come from all other ranks.
__device__ bool wait_for_rows(const CombineParams& p, const Batch& batch, uint64_t tag) {
    const int lane = threadIdx.x % 32, rank = lane % kMaxRanks;
    bool there = true;
    if (batch.position >= 0 && rank != p.call.rank && !breaks(p.call, Mutation::kRowsWithoutFlag)) {
        const uint64_t* flag = &control_of(p.call, p.call.rank)->row_flags[rank][batch.first_slot + lane / kMaxRanks];
        there = wait_for(p.call, flag, tag, Missing::kRow, rank);
    }
    there = __all_sync(~0u, there);
    __syncwarp();  // what one lane has acquired, all have
    return there;
}

// Adds the biases to 8 channels, from byte `at` of the token's row on, rounds, and writes them.
__device__ void finish_sum(const CombineParams& p, int64_t token_begin, int at, float (&sum)[8]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        if (p.biases[b]) add_bf16(sum, load_16(p.biases[b] + token_begin + at));
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    store_16(p.combined + token_begin + at, make_uint4(words[0], words[1], words[2], words[3]));
}

// Bytes [begin, end) of the token's sum, of up to kRows rows. The additions are what takes the time, so nothing else is
// in the loop; and all loads of a step come before its first addition. A row that is not there adds zeros.
template <int kRows, int kUnroll>
__device__ void sum_rows(const CombineParams& p, const Contributions& from, int begin, int end) {
    const uint8_t* rows[kRows];
    const int count = __popc(from.ranks);
    uint32_t left = from.ranks;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        rows[i] = left ? row_from(p, from, __ffs(left) - 1) : nullptr;
        left &= left - 1;
    }
    const int64_t token_begin = static_cast<int64_t>(from.token) * p.row_bytes;
    for (int first = begin + 16 * (threadIdx.x % 32); first < end; first += kUnroll * kChunkBytes) {
        uint4 values[kUnroll][kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int at = first + u * kChunkBytes;
                values[u][i] = load_16_if(i < count && at < end, rows[i] + at);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float sum[8] = {};
#pragma unroll
            for (int i = 0; i < kRows; ++i) add_bf16(sum, values[u][i]);
            if (first + u * kChunkBytes < end) finish_sum(p, token_begin, first + u * kChunkBytes, sum);
        }
    }
}

__device__ void sum_token(const CombineParams& p, const Contributions& from, int begin, int end) {
    const int count = __popc(from.ranks);
    if (count <= 2) {
        sum_rows<2, 7>(p, from, begin, end);
    } else if (count <= 4) {
        sum_rows<4, 4>(p, from, begin, end);
    } else {
        sum_rows<8, 2>(p, from, begin, end);
    }
}

// The same where what travels is float32, and this rank's own copies have yet to be added up.
__device__ void sum_grouped_token(const CombineParams& p, const Contributions& from, int begin, int end) {
    for (int at = begin + 16 * (threadIdx.x % 32); at < end; at += kChunkBytes) {
        float sum[8] = {};
        for (uint32_t left = from.ranks; left != 0; left &= left - 1) {
            const int rank = __ffs(left) - 1;
            float part[8];
            if (rank == p.call.rank) {
                sum_copies(p, from.received, at, part);
            } else {
                const uint8_t* row = slot_at(p, p.call.rank, rank, from.slot) + 2 * at;
                const uint4 low = load_16(row), high = load_16(row + 16);
                const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int c = 0; c < 8; ++c) part[c] = __uint_as_float(words[c]);
            }
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[c] += part[c];
        }
        finish_sum(p, static_cast<int64_t>(from.token) * p.row_bytes, at, sum);
    }
}

__device__ void sum_weights(const CombineParams& p, const Contributions& from) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.top_k) return;
    float sum = 0.0f;
    for (uint32_t left = from.ranks; left != 0; left &= left - 1) {
        const int rank = __ffs(left) - 1;
        if (rank != p.call.rank) {
            sum += reinterpret_cast<const float*>(slot_at(p, p.call.rank, rank, from.slot) + p.slot_weights)[lane];
        } else {
            int64_t at = static_cast<int64_t>(from.received) * p.top_k + lane;
            if (p.grouped) at = p.grouped_rows[at];
            if (at >= 0) sum += p.topk_weights[at];
        }
    }
    p.combined_weights[static_cast<int64_t>(from.token) * p.top_k + lane] = sum;
}

// All lanes: this rank has drained the pass. Without a limit of its own: the waits for its rows have one.
__device__ bool wait_for_own_drain(const CombineParams& p, uint64_t expected) {
    bool drained = true;
    if (threadIdx.x % 32 == 0) {
        while (drained && load_acquire_sys(&p.call.state->drained) < expected) {
            drained = !load_relaxed_gpu(&p.call.state->gave_up);
        }
    }
    return __all_sync(~0u, drained);
}

// Stress builds: nobody may read this part of the token's rows again.
__device__ void poison_rows(const CombineParams& p, const Contributions& from, int begin, int end) {
#ifdef HPC_MOE_STRESS
    const int scale = p.grouped ? 2 : 1;
    for (uint32_t left = from.ranks & ~(1u << p.call.rank); left != 0; left &= left - 1) {
        uint8_t* row = slot_at(p, p.call.rank, __ffs(left) - 1, from.slot);
        poison(row + scale * begin, scale * (end - begin), threadIdx.x % 32);
    }
#endif
}

// A summing warp's share of a batch, whose rows have come.
__device__ void sum_batch(const CombineParams& p, const Plan& plan, const Batch& batch, int part) {
    const int part_bytes = (p.row_bytes / kSumParts + 127) / 128 * 128;
    const int begin = min(part * part_bytes, p.row_bytes), end = min(begin + part_bytes, p.row_bytes);
    for (int index = 0; index < batch.num_tokens; ++index) {
        const Contributions from = contributions_of(p, plan, batch, index);
        if (p.grouped) {
            sum_grouped_token(p, from, begin, end);
        } else {
            sum_token(p, from, begin, end);
        }
        if (part == 0 && p.combined_weights) sum_weights(p, from);
        poison_rows(p, from, begin, end);
    }
    __syncwarp();
}

// A summing warp: its parts of this rank's tokens, pass by pass.
__device__ void sum(const CombineParams& p, const Plan& plan, uint64_t epoch) {
    const Role role = drainer_role(p.pipeline);
    // Alone, a rank has no stage, and takes all tokens at once.
    const int tokens_per_pass = p.call.num_ranks > 1 ? p.stage.num_slots : p.num_tokens;
    uint64_t expected = 0;
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        const int begin_token = pass * tokens_per_pass, tokens = min(tokens_per_pass, p.num_tokens - begin_token);
        const int units = max(0, (tokens + kTokensPerBatch - 1) / kTokensPerBatch) * kSumParts;
        expected += units;
        for (int unit = role.index; unit < units; unit += role.count) {
            const int slot = unit / kSumParts * kTokensPerBatch;
            const Batch batch = load_batch(p, begin_token + slot, slot, min(kTokensPerBatch, tokens - slot));
            if (!wait_for_rows(p, batch, pass_tag(epoch, pass))) return;
            stress_sleep(p.call);
            sum_batch(p, plan, batch, unit % kSumParts);
            if (plan.num_passes > 1 && threadIdx.x % 32 == 0) count_drained(p.call, epoch, pass, expected);
        }
        // A token that went nowhere else can be summed at once: it must not be counted for the pass before it.
        if (pass + 1 < plan.num_passes && !wait_for_own_drain(p, expected)) return;
    }
}

// --- the kernel ----------------------------------------------------------------------------------------------------

template <bool kBulkCopies>
__global__ void __launch_bounds__(kThreadsPerBlock, 1) combine(const __grid_constant__ CombineParams p) {
    if constexpr (kBulkCopies && !HPC_MOE_HAS_BULK_COPIES) return;  // never launched there
    __shared__ Plan plan;
    const uint64_t epoch = begin_epoch(p.call);
    if constexpr (kBulkCopies) init_pipelines();
    if (threadIdx.x < 32) {
        begin_plan(p, plan);
        const bool go = meet(p.call, epoch);
        if (go) finish_plan(p, epoch, plan);
        if (threadIdx.x == 0) plan.go = go;
    }
    __syncthreads();
    if (plan.go && is_sender(p.pipeline)) {
        send<kBulkCopies>(p, plan, epoch);
    } else if (plan.go) {
        sum(p, plan, epoch);
    }
    if (!is_last_block(p.call)) return;
    if (plan.go && threadIdx.x == 0) count_passes(p.call, plan.num_passes);
    end_epoch(p.call, epoch);
}

}  // namespace

void launch_combine(const CombineParams& params, const Launch& launch) {
    launch_mover(combine<true>, combine<false>, params, launch, "launching the combine kernel");
}

void prepare_combine() { prepare_mover(combine<true>, combine<false>); }

}  // namespace hpc_moe::cuda
