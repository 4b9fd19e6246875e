// The summing half of combine.cu, and what it shares with the sending half.
//
// A summing warp takes one token after the other (of the last ones a quarter, so that all warps work to the end). When
// it has acquired the flags of all the token's rows, it adds them in the order of ranks, then the biases, in float32
// (two of them as bf16, for which one rounding is exact enough), and writes the result.
//
// Registers do this, not bulk copies: what counts is how many bytes a block has under way, and a dozen warps of loads
// have more than what shared memory could hold beside the rows that are sent.
#pragma once

#include <cuda_bf16.h>

#include "cuda/combine.h"
#include "cuda/device/bf16.cuh"
#include "cuda/device/protocol.cuh"
#include "cuda/device/rows.cuh"

namespace hpc_moe::cuda {
namespace {

constexpr int kSumParts = 4;      // warps that share one of the last tokens
constexpr int kChunkBytes = 512;  // of a row, 16 bytes a lane
// Chunks under way: as many as there are registers for.
constexpr int kQuadChunks = HPC_MOE_HAS_BULK_COPIES ? 4 : 3;
constexpr int kOctetChunks = HPC_MOE_HAS_BULK_COPIES ? 2 : 1;

// What a block knows once all ranks have entered.
struct Plan {
    Entry entries[kMaxRanks];
    int32_t first_own;  // where this rank's own rows begin in x
    int32_t num_passes;
    bool go;
};

__device__ uint8_t* slot_at(const CombineParams& p, int rank, int source, int slot) {
    return p.call.windows[rank] + p.stage.offset + source * p.stage.region_bytes + slot * p.stage.slot_bytes;
}

__device__ void add_bf16(float (&sum)[8], const uint4& row) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] += low_bf16(words[i]);
        sum[2 * i + 1] += high_bf16(words[i]);
    }
}

// A received token's copies in the grouped layout. The same in all lanes, but for `row`.
struct Copies {
    static constexpr int kAtOnce = 8;
    const uint8_t* at_once[kAtOnce];  // the first ones: all are loaded before they are added
    int num_at_once;
    uint32_t others;  // bit k: the copy of column k, too
    int64_t row;      // lane k: of x, -1: none
};

// All lanes.
__device__ Copies copies_of(const CombineParams& p, int64_t received) {
    const int lane = threadIdx.x % 32;
    Copies copies;
    copies.row = lane < p.top_k ? p.grouped_rows[received * p.top_k + lane] : -1;
    copies.others = __ballot_sync(~0u, copies.row >= 0);
    copies.num_at_once = min(__popc(copies.others), Copies::kAtOnce);
#pragma unroll
    for (int i = 0; i < Copies::kAtOnce; ++i) {
        const int64_t row = __shfl_sync(~0u, copies.row, max(__ffs(copies.others) - 1, 0));
        copies.at_once[i] = p.x + row * p.x_stride;
        copies.others &= copies.others - 1;
    }
    return copies;
}

// All lanes: their float32 sum, in the order of columns, of each lane's 8 channels from `channel_bytes` (of bf16) on;
// zero where these are not `wanted`.
__device__ void sum_copies(const CombineParams& p, const Copies& copies, bool wanted, int channel_bytes,
                           float (&sum)[8]) {
    uint4 values[Copies::kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < Copies::kAtOnce; ++i) {
        load_16_if(wanted && i < copies.num_at_once, copies.at_once[i] + channel_bytes, values[i]);
    }
#pragma unroll
    for (float& value : sum) value = 0.0f;
#pragma unroll
    for (int i = 0; i < Copies::kAtOnce; ++i) add_bf16(sum, values[i]);
    for (uint32_t left = copies.others; left != 0; left &= left - 1) {
        const int64_t row = __shfl_sync(~0u, copies.row, __ffs(left) - 1);
        if (wanted) add_bf16(sum, load_16(p.x + row * p.x_stride + channel_bytes));
    }
}

// --- tokens -------------------------------------------------------------------------------------------------------

// The rows of one of this rank's tokens, and the bytes of them that this warp adds. The same in all lanes.
struct Contributions {
    int token, slot;
    uint32_t ranks;  // a bit for each rank that sends a row
    int received;    // this rank's own row, -1: none
    int begin, end;  // bytes of a bf16 row
};

// A summing warp's tokens of a pass, or parts of tokens, one after the other.
class SummedTokens {
   public:
    __device__ SummedTokens(const CombineParams& p, const Plan& plan, int pass)
        : p_(p), plan_(plan), role_(drainer_role(p.pipeline)) {
        // Alone, a rank has no stage, and takes all tokens at once.
        const int per_pass = p.call.num_ranks > 1 ? p.stage.num_slots : p.num_tokens;
        first_ = pass * per_pass;
        const int tokens = max(0, min(p.num_tokens - first_, per_pass));
        num_whole_ = max(0, tokens - role_.count / 2);
        num_units_ = num_whole_ + (tokens - num_whole_) * kSumParts;
        unit_ = role_.index;
        position_ = load_position(unit_);
        next_position_ = load_position(unit_ + role_.count);
    }

    __device__ bool is_at_end() const { return unit_ >= num_units_; }
    // Of all summing warps.
    __device__ int num_units() const { return num_units_; }

    __device__ Contributions get() const {
        Contributions found;
        found.slot = slot_of_unit(unit_);
        found.token = first_ + found.slot;
        found.ranks = __ballot_sync(~0u, position_ >= 0);
        found.received = __shfl_sync(~0u, position_, p_.call.rank);
        if (found.received >= 0) found.received += plan_.first_own;
        const bool is_whole = unit_ < num_whole_;
        const int part_bytes = is_whole ? p_.row_bytes : (p_.row_bytes / kSumParts + 127) / 128 * 128;
        found.begin = is_whole ? 0 : min((unit_ - num_whole_) % kSumParts * part_bytes, p_.row_bytes);
        found.end = min(found.begin + part_bytes, p_.row_bytes);
        return found;
    }

    __device__ void go_on() {
        unit_ += role_.count;
        position_ = next_position_;
        next_position_ = load_position(unit_ + role_.count);  // not needed until the token after this one
    }

   private:
    __device__ int slot_of_unit(int unit) const {
        return unit < num_whole_ ? unit : num_whole_ + (unit - num_whole_) / kSumParts;
    }

    // Lane r: the token's index among those for rank r, -1 if it did not go there.
    __device__ int load_position(int unit) const {
        const int lane = threadIdx.x % 32;
        if (lane >= p_.call.num_ranks || unit >= num_units_) return -1;
        return p_.send_position[static_cast<int64_t>(first_ + slot_of_unit(unit)) * p_.call.num_ranks + lane];
    }

    const CombineParams& p_;
    const Plan& plan_;
    const Role role_;
    int first_, num_whole_, num_units_, unit_;
    int position_, next_position_;
};

// Where the row from `rank` lies.
__device__ const uint8_t* row_from(const CombineParams& p, const Contributions& from, int rank) {
    return rank == p.call.rank ? p.x + from.received * p.x_stride : slot_at(p, p.call.rank, rank, from.slot);
}

// All lanes: the token's rows have come from all other ranks. Lane r sees to rank r.
__device__ bool wait_for_rows(const CombineParams& p, const Contributions& from, uint64_t tag) {
    const int lane = threadIdx.x % 32;
    bool there = true;
    if ((from.ranks >> lane & 1u) && lane != p.call.rank && !breaks(p.call, Mutation::kRowsWithoutFlag)) {
        const uint64_t* flag = &control_of(p.call, p.call.rank)->row_flags[lane][from.slot];
        there = wait_for(p.call, flag, tag, Missing::kRow, lane);
    }
    there = __all_sync(~0u, there);
    __syncwarp();  // what one lane has acquired, all have
    return there;
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

// Stress builds: nobody may read these bytes of the token's rows again.
__device__ void poison_rows(const CombineParams& p, const Contributions& from) {
#ifdef HPC_MOE_STRESS
    const int scale = p.grouped ? 2 : 1;
    for (uint32_t left = from.ranks & ~(1u << p.call.rank); left != 0; left &= left - 1) {
        poison(slot_at(p, p.call.rank, __ffs(left) - 1, from.slot) + scale * from.begin,
               scale * (from.end - from.begin), threadIdx.x % 32);
    }
#endif
}

// --- additions ----------------------------------------------------------------------------------------------------

// The sum of two bf16 values rounded once, that is, no worse than through float32.
__device__ uint32_t add_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 sum =
        __hadd2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&sum);
}

// The sum of rows, 8 channels of each.
template <int kRows>
__device__ uint4 add_rows(const uint4 (&rows)[kRows]) {
    if constexpr (kRows == 1) {
        return rows[0];
    } else if constexpr (kRows == 2) {
        return make_uint4(add_pairs(rows[0].x, rows[1].x), add_pairs(rows[0].y, rows[1].y),
                          add_pairs(rows[0].z, rows[1].z), add_pairs(rows[0].w, rows[1].w));
    } else {
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < kRows; ++i) add_bf16(sum, rows[i]);
        return to_bf16(sum);
    }
}

__device__ int num_biases(const CombineParams& p) { return (p.biases[0] ? 1 : 0) + (p.biases[1] ? 1 : 0); }

// Adds the token's `count` rows and biases, at most kRows together. kAhead chunks are on their way at any time: when
// one has been added, a load behind the others takes its place.
template <int kRows, int kAhead>
__device__ void sum_rows(const CombineParams& p, const Contributions& from, int count) {
    const int64_t token_begin = static_cast<int64_t>(from.token) * p.row_bytes;
    const uint8_t* rows[kRows];
    uint32_t left = from.ranks;
    const uint8_t* bias = p.biases[0];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (left != 0) {
            rows[i] = row_from(p, from, __ffs(left) - 1);
            left &= left - 1;
        } else {
            rows[i] = bias + token_begin;
            bias = p.biases[1];
        }
    }
    const auto load = [&](uint4(&chunk)[kRows], int at) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) load_16_if(i < count && at < from.end, rows[i] + at, chunk[i]);
    };
    int at = from.begin + 16 * (threadIdx.x % 32);
    uint4 chunks[kAhead][kRows] = {};
#pragma unroll
    for (int c = 0; c < kAhead; ++c) load(chunks[c], at + c * kChunkBytes);
    while (at < from.end) {
#pragma unroll
        for (int c = 0; c < kAhead; ++c, at += kChunkBytes) {
            if (at < from.end) store_16(p.combined + token_begin + at, add_rows(chunks[c]));
            load(chunks[c], at + kAhead * kChunkBytes);
        }
    }
}

// Where what travels is float32, and this rank's own copies have yet to be added up. (Inlined, it would make sm_80
// spill.)
__device__ __noinline__ void sum_grouped_token(const CombineParams& p, const Contributions& from) {
    const int64_t token_begin = static_cast<int64_t>(from.token) * p.row_bytes;
    Copies own = {};
    if (from.received >= 0) own = copies_of(p, from.received);
    for (int begin = from.begin; begin < from.end; begin += kChunkBytes) {
        const int at = begin + 16 * (threadIdx.x % 32);
        const bool wanted = at < from.end;
        float sum[8] = {};
        for (uint32_t left = from.ranks; left != 0; left &= left - 1) {
            const int rank = __ffs(left) - 1;
            float part[8] = {};
            if (rank == p.call.rank) {
                sum_copies(p, own, wanted, at, part);
            } else if (wanted) {
                const uint8_t* row = slot_at(p, p.call.rank, rank, from.slot) + 2 * at;
                const uint4 low = load_16(row), high = load_16(row + 16);
                const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int c = 0; c < 8; ++c) part[c] = __uint_as_float(words[c]);
            }
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[c] += part[c];
        }
        if (!wanted) continue;
        for (int b = 0; b < num_biases(p); ++b) add_bf16(sum, load_16(p.biases[b] + token_begin + at));
        store_16(p.combined + token_begin + at, to_bf16(sum));
    }
}

template <bool kBulkCopies>
__device__ void sum_token(const CombineParams& p, const Contributions& from) {
    const int count = __popc(from.ranks) + num_biases(p);
    if (!kBulkCopies && p.grouped) {
        sum_grouped_token(p, from);
    } else if (count <= 1) {
        sum_rows<1, 4>(p, from, count);
    } else if (count == 2) {
        sum_rows<2, 7>(p, from, count);
    } else if (count <= 4) {
        sum_rows<4, kQuadChunks>(p, from, count);
    } else if (count <= 8) {
        sum_rows<8, kOctetChunks>(p, from, count);
    } else {
        sum_rows<kMaxRanks + 2, 1>(p, from, count);
    }
    if (from.begin == 0 && p.combined_weights) sum_weights(p, from);
    poison_rows(p, from);
    __syncwarp();
}

// A summing warp, pass by pass.
template <bool kBulkCopies>
__device__ void sum(const CombineParams& p, const Plan& plan, uint64_t epoch) {
    uint64_t expected = 0;
    for (int pass = 0; pass < plan.num_passes; ++pass) {
        SummedTokens tokens(p, plan, pass);
        expected += tokens.num_units();
        for (; !tokens.is_at_end(); tokens.go_on()) {
            const Contributions from = tokens.get();
            if (!wait_for_rows(p, from, pass_tag(epoch, pass))) return;
            stress_sleep(p.call);
            sum_token<kBulkCopies>(p, from);
            if (plan.num_passes > 1 && threadIdx.x % 32 == 0) count_drained(p.call, epoch, pass, expected);
        }
        // A token that went nowhere else can be summed at once: it must not be counted for the pass before it.
        if (pass + 1 < plan.num_passes && !wait_for_own_drain(p, expected)) return;
    }
}

}  // namespace
}  // namespace hpc_moe::cuda
