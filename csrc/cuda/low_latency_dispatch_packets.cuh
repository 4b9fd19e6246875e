// The packets of low_latency_dispatch.cu: tokens, cast on the way, as they are sent and as they arrive.
#pragma once

#include "cuda/device/fp8.cuh"
#include "cuda/device/wire.cuh"
#include "cuda/low_latency_dispatch_numbers.cuh"

namespace hpc_moe::cuda {
namespace {

// The packet of a token of `source` in `rank`'s region.
__device__ uint8_t* packet_at(const LowLatencyDispatchParams& p, uint64_t epoch, bool is_tagged, int rank, int source,
                              int token) {
    const LowLatencyCall& call = p.call;
    if (is_put(call, rank)) {  // this rank's, on its way there
        return outbox_for(call, rank, epoch) + static_cast<int64_t>(token) * p.packet.packet_bytes;
    }
    const Area& area = is_tagged ? call.tagged : call.plain;
    const int64_t capacity = is_tagged ? call.tagged_capacity : call.num_max_tokens;
    return region_at(call, rank) + area.begin + (epoch & 1) * area.parity_bytes +
           (source * capacity + token) * p.packet.packet_bytes;
}

// Whether this rank's rows are tagged.
__device__ bool sends_tagged(const LowLatencyDispatchParams& p) {
    const LowLatencyCall& call = p.call;
    if (Net::kPuts && call.put_ranks != 0) return false;
    const int64_t row = p.packet.num_chunks * static_cast<int64_t>(kChunkBytes);
    return call.num_tokens <= call.tagged_capacity &&
           call.num_tokens * min(call.call.num_ranks - 1, call.top_k) * row <= call.most_tagged_bytes;
}

// --- sending -------------------------------------------------------------------------------------------------------

// A token's experts. Lane k: that of column k, -1: none. The same in all warps.
struct Experts {
    int own;
    uint32_t ranks;  // that the token goes to, a bit each; the same in all lanes of a warp
};

// `own`: of this lane's column, or -1.
__device__ Experts experts_of(const LowLatencyCall& call, int own) {
    Experts experts = {own, 0};
    experts.ranks = __reduce_or_sync(~0u, experts.own >= 0 ? 1u << (experts.own / call.num_local_experts) : 0u);
    return experts;
}

// A wrong index counts as none. The host hears of it.
__device__ __noinline__ void report_bad_index(const LowLatencyDispatchParams& p, int token, int own) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32;
    const bool is_column = lane < call.top_k;
    const int64_t index = is_column ? p.topk_index[static_cast<int64_t>(token) * call.top_k + lane] : -1;
    const uint32_t unknown = __ballot_sync(~0u, is_column && own < 0 && index != -1);
    const uint32_t alike = __match_any_sync(~0u, own);
    const uint32_t twice = __ballot_sync(~0u, own >= 0 && (alike & (alike - 1)) != 0);
    if ((unknown | twice) == 0 || lane != 0 || !claim_error(call.call)) return;
    const BadValue kind = unknown ? BadValue::kOutOfRange : BadValue::kTwice;
    ErrorRecord& error = call.call.host->error;
    error.kind = ErrorKind::kBadValue;
    error.operation = call.call.entry.operation;
    error.peer = call.call.rank;
    error.numbers[0] = static_cast<uint64_t>(kind) << 48 | static_cast<uint64_t>(token);
    publish_error(call.call);
}

// A warp: where the token's row lies among those of its experts, `position` in lane k, to each of `ranks`.
__device__ void send_details(const LowLatencyDispatchParams& p, uint64_t epoch, bool is_tagged, int token,
                             const Experts& experts, uint32_t ranks, float weight, int position) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32;
    const bool is_column = lane < call.top_k;
#pragma unroll 1
    for (uint32_t left = ranks; left != 0 && is_column; left &= left - 1) {
        const int rank = __ffs(left) - 1, local = experts.own - rank * call.num_local_experts;
        const bool is_here = experts.own >= 0 && local >= 0 && local < call.num_local_experts;
        uint8_t* packet = packet_at(p, epoch, is_tagged, rank, call.call.rank, token);
        store_relaxed_16(packet + 16 * lane, make_uint4(is_here ? local : -1, position, __float_as_uint(weight),
                                                        static_cast<uint32_t>(epoch)));
    }
    __syncwarp();
    report_bad_index(p, token, experts.own);
}

// A lane's part of a chunk, before it is cast.
struct Channels {
    uint4 of[kPieces][2];  // e4m3: 16 channels a piece; bf16: 8, in the first
};

__device__ void load_channels(const LowLatencyDispatchParams& p, int token, int chunk, Channels& channels) {
    const uint8_t* from = p.x + token * p.x_stride;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int at = piece_at(chunk, i);
        const bool is_there = at < p.packet.row_bytes;
        channels.of[i][0] = channels.of[i][1] = make_uint4(0, 0, 0, 0);
        load_16_if(is_there, from + (p.packet.scale_bytes > 0 ? 2 * at : at), channels.of[i][0]);
        load_16_if(is_there && p.packet.scale_bytes > 0, from + 2 * at + 16, channels.of[i][1]);
    }
}

// All lanes: the scales of a chunk as they travel, 16 bytes in each of the first three lanes (UE8M0: in the first).
// `scales`: of this lane's pieces, alike in eight neighbouring lanes.
__device__ uint4 pack_scales(const LowLatencyDispatchParams& p, const float (&scales)[kPieces], uint32_t tag) {
    const int lane = threadIdx.x % 32;
    // Lane j < 8: scale j of the chunk.
    float of_lane = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const float scale = __shfl_sync(~0u, scales[i], 8 * (lane % 4));
        if (lane / 4 == i) of_lane = scale;
    }
    uint32_t words[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (!p.use_ue8m0) {
            words[i] = __float_as_uint(__shfl_sync(~0u, of_lane, min(3 * lane + i, 31)));
            continue;
        }
        words[i] = 0;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            words[i] |= (__float_as_uint(__shfl_sync(~0u, of_lane, 4 * i + byte)) >> 23 & 0xffu) << 8 * byte;
        }
    }
    return make_uint4(words[0], words[1], words[2], tag);
}

__device__ int num_scale_words(const LowLatencyDispatchParams& p) {
    return p.packet.scale_bytes == 0 ? 0 : p.use_ue8m0 ? 1 : 3;
}

// A warp's chunk as it travels.
struct Cast {
    Pieces pieces;
    uint4 scale_word;
};

__device__ Cast cast_chunk(const LowLatencyDispatchParams& p, const Channels& channels, uint32_t tag) {
    Cast cast = {};
    if (p.packet.scale_bytes == 0) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) cast.pieces.of[i] = channels.of[i][0];
        return cast;
    }
    float scales[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) cast.pieces.of[i] = cast_group(channels.of[i], p.round_scale, scales[i]);
    cast.scale_word = pack_scales(p, scales, tag);
    return cast;
}

// A warp: a chunk of the token, to each of `ranks`.
__device__ void send_chunk(const LowLatencyDispatchParams& p, uint64_t epoch, bool is_tagged, int token, int chunk,
                           uint32_t ranks, const Cast& cast) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32, num_pieces = count_pieces(p.packet.row_bytes, chunk);
    const uint32_t tag = is_tagged ? static_cast<uint32_t>(epoch) : 0;
#pragma unroll 1
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
        uint8_t* packet = packet_at(p, epoch, is_tagged, __ffs(left) - 1, call.call.rank, token);
        uint8_t* to = packet + kDetailsBytes + chunk * kWireChunkBytes;
        store_chunk(to, cast.pieces, num_pieces, tag);
        if (lane < num_scale_words(p)) store_relaxed_16(to + kScalesAt + 16 * lane, cast.scale_word);
    }
}

// One thread, after a barrier of the block: the plain packet of a token is there for `rank`.
__device__ void release_packet(const LowLatencyDispatchParams& p, uint64_t epoch, int rank, int token) {
    const LowLatencyCall& call = p.call;
    const int self = call.call.rank;
    if (is_put(call, rank)) {
        put_with_flag(call, rank, packet_at(p, epoch, false, self, self, token),
                      packet_at(p, epoch, false, rank, self, token), p.packet.packet_bytes,
                      &own_region(call)->packet_flags[epoch & 1][self][token], epoch);
        return;
    }
    fence_acq_rel_sys();
    store_relaxed_sys(&region_of(call, rank)->packet_flags[epoch & 1][self][token], epoch);
}

// A token that a block sends, in steps: what a thread has of it.
class Token {
   public:
    __device__ explicit Token(const LowLatencyDispatchParams& p) : steps(p.packet.num_chunks), p_(p) {}

    __device__ bool is_there(int step) const { return steps.token(step) < p_.call.num_tokens; }

    // What can be read before the block is permitted to write, and computed: loads are under way in between.
    __device__ void load(int step) {
        const LowLatencyCall& call = p_.call;
        const int lane = threadIdx.x % 32;
        token_ = steps.token(step);
        if (steps.begins_token(step)) {
            own_ = -1;
            if (lane < call.top_k) {
                const int64_t at = static_cast<int64_t>(token_) * call.top_k + lane;
                own_ = expert_at(call, p_.topk_index, at);
                if (is_flagging_warp() && call.weighted) weight_ = p_.topk_weights[at];
            }
            if (!is_flagging_warp()) earlier_.load(p_.topk_index, Entries::first_of_warp(), token_ * call.top_k);
        }
        if (steps.has_chunk(step)) load_channels(p_, token_, steps.chunk(step), channels_);
    }

    __device__ void prepare(int step, uint64_t epoch, int32_t* positions) {
        if (steps.begins_token(step)) {
            experts_ = experts_of(p_.call, own_);
            const int end = token_ * p_.call.top_k, begin = Entries::first_of_warp();
#pragma unroll 1
            for (int first = begin; !is_flagging_warp() && first < end; first += Entries::kTogether) {
                if (first != begin) earlier_.load(p_.topk_index, first, end);
                earlier_.count_same(own_, p_.call.top_k, positions);
            }
        }
        if (steps.has_chunk(step)) cast_ = cast_chunk(p_, channels_, static_cast<uint32_t>(epoch));
    }

    // After a barrier of the block behind `prepare`. Leaves `positions` as zeros.
    __device__ void send(int step, uint64_t epoch, bool is_tagged, int32_t* positions) {
        const int lane = threadIdx.x % 32;
        ranks_ = experts_.ranks & ~masked_for_warp(p_.call);
        if (is_flagging_warp() && steps.begins_token(step)) {
            const int position = lane < p_.call.top_k ? positions[lane] : 0;
            __syncwarp();
            if (lane < kMaxLowLatencyTopK) positions[lane] = 0;
            send_details(p_, epoch, is_tagged, token_, experts_, ranks_, weight_, position);
        }
        if (steps.has_chunk(step)) send_chunk(p_, epoch, is_tagged, token_, steps.chunk(step), ranks_, cast_);
    }

    // After a barrier of the block behind the last `send` of a token, if rows are plain.
    __device__ void release(uint64_t epoch) const {
        const int lane = threadIdx.x % 32;
        // A warp that has found a rank masked has sent it nothing; then it is found masked here, too.
        const uint32_t ranks = ranks_ & ~masked_ranks(p_.call);
        if (!is_flagging_warp() || lane >= p_.call.call.num_ranks || !(ranks >> lane & 1u)) return;
        release_packet(p_, epoch, lane, token_);
    }

    const Steps steps;

   private:
    const LowLatencyDispatchParams& p_;
    int token_ = 0;
    int own_ = -1;     // the expert of this lane's column
    Entries earlier_;  // tokens
    Channels channels_;
    Experts experts_ = {-1, 0};
    uint32_t ranks_ = 0;   // that it is sent to
    float weight_ = 0.0f;  // lane k of the flagging warp: of column k
    Cast cast_ = {};
};

// --- receiving -----------------------------------------------------------------------------------------------------

// A packet's chunk as it has come.
struct Arrived {
    Words words;
    uint4 detail;  // lane k: of column k
    uint4 scales;  // of the first lanes
};

enum class Came { kYes, kNever, kGaveUp };

// A warp: takes a chunk of a packet, and the details, when they have come. kNever: its source is masked by now.
__device__ Came take_chunk(const LowLatencyDispatchParams& p, uint64_t epoch, bool is_tagged, int source, int token,
                           int chunk, const uint8_t* packet, Arrived& arrived) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32, num_pieces = count_pieces(p.packet.row_bytes, chunk);
    const auto tag = static_cast<uint32_t>(epoch);
    const uint8_t* from = packet + kDetailsBytes + chunk * kWireChunkBytes;
    const bool has_detail = lane < call.top_k, has_scales = lane < num_scale_words(p);
    Patience patience(0);
    if (!is_tagged && !breaks(call.call, Mutation::kRowBeforeFlag)) {
        const uint64_t* flag = &own_region(call)->packet_flags[epoch & 1][source][token];
        if (!wait_for_words(call, patience, lane == 0 ? flag : nullptr, epoch, Missing::kRow, source)) {
            return Came::kGaveUp;
        }
        if (patience.is_masked(source)) return Came::kNever;
    }
    stress_sleep(call.call);
    for (;;) {
        load_chunk(from, num_pieces, is_tagged, true, arrived.words);
        if (has_detail) arrived.detail = load_relaxed_16(packet + 16 * lane);
        if (has_scales) arrived.scales = load_relaxed_16(from + kScalesAt + 16 * lane);
        bool complete = !is_tagged || is_complete(arrived.words, num_pieces, tag);
        complete &= !is_tagged || !has_detail || arrived.detail.w == tag;
        complete &= !is_tagged || !has_scales || arrived.scales.w == tag;
        if (__all_sync(~0u, complete) || breaks(call.call, Mutation::kWordWithoutTag)) return Came::kYes;
        if (!patience.goes_on(call, Missing::kRow, complete ? -1 : source)) return Came::kGaveUp;
        if (patience.is_masked(source)) return Came::kNever;
    }
}

// A warp: a chunk's scales, to the rows of recv_rows that lanes have in `row` (-1: none). In recv_scales the last two
// dimensions are column-major.
__device__ void write_scales(const LowLatencyDispatchParams& p, int chunk, const uint4& scales, int row) {
    const int lane = threadIdx.x % 32, rows = p.call.num_max_tokens * p.call.call.num_ranks;
    // Lane j: the j-th word of the chunk.
    const int per_chunk = p.use_ue8m0 ? 2 : kScalesOfChunk, of_row = p.call.hidden / (p.use_ue8m0 ? 512 : 128);
    const int from = p.use_ue8m0 ? 0 : lane / 3 % 3;
    const uint32_t x = __shfl_sync(~0u, scales.x, from), y = __shfl_sync(~0u, scales.y, from);
    const uint32_t z = __shfl_sync(~0u, scales.z, from);
    const uint32_t word = lane % 3 == 0 ? x : lane % 3 == 1 ? y : z;
    const int at = chunk * per_chunk + lane;
    // Words from the start of recv_scales to the first one of the row.
    const int64_t begin = row < 0 ? -1 : static_cast<int64_t>(row / rows) * of_row * rows + row % rows;
#pragma unroll 1
    for (uint32_t left = __ballot_sync(~0u, row >= 0); left != 0; left &= left - 1) {
        const int64_t to = __shfl_sync(~0u, begin, __ffs(left) - 1);
        if (lane >= per_chunk || at >= of_row) continue;
        static_cast<uint32_t*>(p.recv_scales)[to + static_cast<int64_t>(at) * rows] = word;
    }
}

// A warp: writes a chunk of the i-th token that comes to each of the token's experts.
__device__ void write_chunk(const LowLatencyDispatchParams& p, bool is_tagged, int i, const Coming::Token& token,
                            int chunk, const Arrived& arrived, const int32_t* begins) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32, rows = call.num_max_tokens * call.call.num_ranks;
    int row = -1;
    if (lane < call.top_k) {
        const int local = static_cast<int>(arrived.detail.x);
        if (local >= 0 && local < call.num_local_experts) {
            const int at = begins[token.source * call.num_local_experts + local] + static_cast<int>(arrived.detail.y);
            row = local * rows + min(max(at, 0), rows - 1);  // an expert selected twice could reach further
        }
    }
    const Pieces pieces = pieces_of(arrived.words, is_tagged);
#pragma unroll 1
    for (uint32_t left = __ballot_sync(~0u, row >= 0); left != 0; left &= left - 1) {
        const int64_t to = __shfl_sync(~0u, row, __ffs(left) - 1);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const int at = piece_at(chunk, piece);
            if (at < p.packet.row_bytes) store_16(p.recv_rows + to * p.packet.row_bytes + at, pieces.of[piece]);
        }
    }
    if (p.packet.scale_bytes > 0) write_scales(p, chunk, arrived.scales, row);
    if (chunk != 0 || lane >= call.top_k) return;
    p.token_rows[static_cast<int64_t>(i) * call.top_k + lane] = row;
    if (p.token_weights) {
        p.token_weights[static_cast<int64_t>(i) * call.top_k + lane] = __uint_as_float(arrived.detail.z);
    }
    if (row >= 0) p.recv_src_idx[row] = token.token;
}

}  // namespace
}  // namespace hpc_moe::cuda
