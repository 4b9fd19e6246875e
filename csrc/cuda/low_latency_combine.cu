// Low-latency combine: the way back of a low-latency dispatch.
//
// Send half, when the peers permit it (device/low_latency.cuh):
// 1. A block takes a token that came; a warp a chunk of it (device/wire.cuh). Where weights came with the token, the
//    rows of its experts here are added up, times their weights, in the order of columns, in float32, before the peers
//    permit anything; their sum is sent to the token's rank as bf16. Else each expert's row is sent. The place is the
//    token's, in the part of this rank (of the column). *Tagged*, words say that they have come. *Plain*, the block
//    meets, and the flagging warp releases (fence, then store) the token's flag at its rank, the epoch. In the
//    logarithmic format (device/logfmt.cuh, a chunk as a row of its own) rows are plain.
//
// Receive half:
// 2. A warp takes a chunk of one of this rank's tokens, from all ranks that hold one of its experts: it waits for their
//    words, or acquires their flags. It adds the ranks' sums in the order of ranks, or the experts' rows, times their
//    weights, in the order of columns, in float32.
//
// A combine of a dispatch that did not go on sends nothing, and waits for entries only. Sending never waits for a row;
// all blocks are resident at once.
#include "cuda/device/bf16.cuh"
#include "cuda/device/logfmt.cuh"
#include "cuda/device/low_latency.cuh"
#include "cuda/device/wire.cuh"
#include "cuda/launch.h"

namespace hpc_moe::cuda {
namespace {

__device__ int64_t slot_bytes(const LowLatencyCombineParams& p) {
    return p.num_chunks * static_cast<int64_t>(kWireChunkBytes);
}

// Where, in `rank`'s region, the row for its token lies.
__device__ uint8_t* slot_at(const LowLatencyCombineParams& p, uint64_t epoch, bool is_tagged, int rank, int part,
                            int token) {
    const LowLatencyCall& call = p.call;
    if (is_put(call, rank)) {  // this rank's, on its way there
        const int64_t place = (call.weighted ? 0 : part) * static_cast<int64_t>(call.num_max_tokens) + token;
        return outbox_for(call, rank, epoch) + place * slot_bytes(p);
    }
    const Area& area = is_tagged ? call.tagged : call.plain;
    const int64_t capacity = is_tagged ? call.tagged_capacity : call.num_max_tokens;
    return region_at(call, rank) + area.begin + (epoch & 1) * area.parity_bytes +
           (part * capacity + token) * slot_bytes(p);
}

__device__ void add_scaled(float (&sum)[8], const uint4& piece, float weight) {
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(low_bf16(words[i]), weight, sum[2 * i]);
        sum[2 * i + 1] = fmaf(high_bf16(words[i]), weight, sum[2 * i + 1]);
    }
}

// --- sending -------------------------------------------------------------------------------------------------------

// What a dispatch has noted of a token that came; a lane for each column.
struct Noted {
    int at, row;
    float weight;
};

// A warp: begins to read that of the i-th token.
__device__ Noted load_noted(const LowLatencyCombineParams& p, int i) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32;
    Noted noted = {-1, -1, 0.0f};
    if (i >= call.call.num_ranks * call.num_max_tokens) return noted;
    const int64_t index = static_cast<int64_t>(i) * call.top_k + lane;
    noted.at = p.tokens[i];
    if (lane < call.top_k) noted.row = p.token_rows[index];
    if (call.weighted && lane < call.top_k) noted.weight = p.token_weights[index];
    return noted;
}

// A token that came, and the rows of x that its experts here made.
struct Token {
    int source, token;  // source -1: there is no such token
    // Lane k: of column k, null: none.
    const uint8_t* row;
    float weight;
    uint32_t columns;  // that have one; the same in all lanes
};

// A warp. After a dispatch that gave up, what it should have noted may be anything.
__device__ Token token_of(const LowLatencyCombineParams& p, const Noted& noted, bool is_there) {
    const LowLatencyCall& call = p.call;
    const int most = call.num_max_tokens, all = most * call.call.num_ranks;
    Token token = {-1, 0, nullptr, noted.weight, 0};
    if (is_there && noted.at >= 0 && noted.at < all) token.source = noted.at / most, token.token = noted.at % most;
    const bool has_row = token.source >= 0 && noted.row >= 0 && noted.row < call.num_local_experts * all;
    if (has_row) token.row = p.x + static_cast<int64_t>(noted.row) * 2 * call.hidden;
    token.columns = __ballot_sync(~0u, has_row);
    return token;
}

// Of how many rows loads are under way at a time: of those that are added up, and of those that are sent. More take
// longer.
constexpr int kRowsToAdd = 2, kRowsToSend = 4;

// A warp: a chunk of some of a token's rows, in the order of columns.
template <int kRows>
struct Loaded {
    uint4 of[kRows][kPieces];

    // Begins to load the first rows of `columns`.
    __device__ void load(const Token& token, uint32_t columns, int row_bytes, int chunk) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const bool is_there = columns != 0;
            const auto* row = reinterpret_cast<const uint8_t*>(
                __shfl_sync(~0u, reinterpret_cast<uint64_t>(token.row), max(__ffs(columns) - 1, 0)));
            columns &= columns - 1;
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const int at = piece_at(chunk, piece);
                load_16_if(is_there && at < row_bytes, row + at, of[i][piece]);
            }
        }
    }

    // Adds them up, times their weights. Returns which columns are left.
    __device__ uint32_t add_to(float (&sums)[kPieces][8], const Token& token, uint32_t columns) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (columns == 0) break;
            const float weight = __shfl_sync(~0u, token.weight, __ffs(columns) - 1);
            columns &= columns - 1;
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) add_scaled(sums[piece], of[i][piece], weight);
        }
        return columns;
    }
};

// A warp: the weighted sum of a chunk of the rows, of which the first are loaded.
__device__ __forceinline__ Pieces sum_chunk(const Token& token, Loaded<kRowsToAdd>& loaded, int row_bytes, int chunk) {
    float sums[kPieces][8] = {};
    uint32_t left = token.columns;
#pragma unroll 1
    for (;;) {
        left = loaded.add_to(sums, token, left);
        if (left == 0) break;
        loaded.load(token, left, row_bytes, chunk);
    }
    Pieces pieces;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) pieces.of[piece] = to_bf16(sums[piece]);
    return pieces;
}

// A warp: stores a chunk in the logarithmic format.
__device__ void store_log_chunk(uint8_t* to, const Pieces& pieces, int num_pieces) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        if (i >= num_pieces) continue;
        const int at = piece_at(0, i);
        const uint32_t channels[4] = {pieces.of[i].x, pieces.of[i].y, pieces.of[i].z, pieces.of[i].w};
        const LogRange range = log_range_of_group(channels);
        const LogHeader header = log_header(range);
        if (at % kLogGroupBytes == 0) *reinterpret_cast<LogHeader*>(to + log_header_at(kChunkBytes, at)) = header;
        if (!is_encoded(range)) {
            store_16(to + at, pieces.of[i]);
            continue;
        }
        const LogLane codes = encode_lane(channels, log_encoder(header));
        *reinterpret_cast<uint2*>(to + log_low_at(at)) = make_uint2(codes.low[0], codes.low[1]);
        *reinterpret_cast<uint16_t*>(to + log_high_at(at)) = codes.high;
    }
}

// A warp: sends a chunk of what goes back for a token.
template <bool kLogFmt>
__device__ void store_row_chunk(const LowLatencyCombineParams& p, uint64_t epoch, bool is_tagged, const Token& token,
                                int part, int chunk, const Pieces& pieces) {
    const int num_pieces = count_pieces(2 * p.call.hidden, chunk);
    uint8_t* to = slot_at(p, epoch, is_tagged, token.source, part, token.token) + chunk * kWireChunkBytes;
    if constexpr (kLogFmt) {
        store_log_chunk(to, pieces, num_pieces);
    } else {
        store_chunk(to, pieces, num_pieces, is_tagged ? static_cast<uint32_t>(epoch) : 0);
    }
}

// A warp: sends a chunk of each expert's row.
template <bool kLogFmt>
__device__ void send_rows(const LowLatencyCombineParams& p, uint64_t epoch, bool is_tagged, const Token& token,
                          int chunk) {
#pragma unroll 1
    for (uint32_t left = token.columns; left != 0;) {
        Loaded<kRowsToSend> loaded;
        loaded.load(token, left, 2 * p.call.hidden, chunk);
#pragma unroll
        for (int i = 0; i < kRowsToSend; ++i) {
            if (left == 0) break;
            Pieces pieces;
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) pieces.of[piece] = loaded.of[i][piece];
            store_row_chunk<kLogFmt>(p, epoch, is_tagged, token, __ffs(left) - 1, chunk, pieces);
            left &= left - 1;
        }
    }
}

// One thread, after its block has met: the plain rows for a token are there for its rank.
__device__ void release_rows(const LowLatencyCombineParams& p, uint64_t epoch, const Token& token) {
    const LowLatencyCall& call = p.call;
    const int self = call.call.rank;
    fence_acq_rel_sys();
    if (!is_put(call, token.source)) {
        store_relaxed_sys(&region_of(call, token.source)->row_flags[epoch & 1][self][token.token], epoch);
        return;
    }
    const Route route = route_to(call, token.source);
#pragma unroll 1
    for (uint32_t left = call.weighted ? 1u << self : token.columns; left != 0; left &= left - 1) {
        const int part = __ffs(left) - 1;
        Net::put(slot_at(p, epoch, false, self, part, token.token),
                 slot_at(p, epoch, false, token.source, part, token.token), slot_bytes(p), route);
    }
    Net::order(route);
    Net::signal(&own_region(call)->row_flags[epoch & 1][self][token.token], epoch, route);
}

__device__ bool sends_tagged(const LowLatencyCombineParams& p, const Arrivals& arrivals) {
    const LowLatencyCall& call = p.call;
    if (p.use_logfmt || (Net::kPuts && call.put_ranks != 0)) return false;
    const int64_t rows_of_token = call.weighted ? 1 : min(call.top_k, call.num_local_experts);
    return arrivals.end <= call.tagged_capacity &&
           arrivals.from_peers * rows_of_token * 2 * call.hidden <= call.most_tagged_bytes;
}

// While one token is sent, the rows of the next are being loaded, and what there is to know of the one after that.
template <bool kWeighted, bool kLogFmt>
__device__ bool send(const LowLatencyCombineParams& p, uint64_t epoch) {
    const LowLatencyCall& call = p.call;
    Permission permission(call, kLowLatencyCombine);
    const Steps steps(p.num_chunks);
    const int row_bytes = 2 * call.hidden;
    const Noted first = load_noted(p, steps.token(0));
    Noted noted = load_noted(p, steps.token(1));
    const Arrivals arrivals = *p.arrivals;
    Token token = token_of(p, first, steps.token(0) < arrivals.num_tokens);
    Loaded<kRowsToAdd> loaded;
    if (kWeighted && steps.has_chunk(0)) loaded.load(token, token.columns, row_bytes, steps.chunk(0));
    const bool is_tagged = sends_tagged(p, arrivals);
    Token next = token_of(p, noted, steps.token(1) < arrivals.num_tokens);
    Pieces sum = {};
    if (kWeighted && steps.has_chunk(0)) sum = sum_chunk(token, loaded, row_bytes, steps.chunk(0));
    if (!permission.wait_and_enter(epoch, is_tagged)) return false;
#pragma unroll 1
    for (int step = 0; steps.token(step) < arrivals.num_tokens; ++step) {
        noted = load_noted(p, steps.token(step + 2));
        const bool sums_next = kWeighted && steps.has_chunk(step + 1);
        if (sums_next) loaded.load(next, next.columns, row_bytes, steps.chunk(step + 1));
        const bool is_wanted = token.source >= 0 && !(masked_for_warp(call) >> token.source & 1u);
        const bool flags = is_wanted && is_flagging_warp() && threadIdx.x % 32 == 0;
        if (flags && breaks(call.call, Mutation::kFlagBeforeRow)) release_rows(p, epoch, token);
        if (is_wanted && steps.has_chunk(step)) {
            const int chunk = steps.chunk(step);
            if constexpr (kWeighted) {
                store_row_chunk<kLogFmt>(p, epoch, is_tagged, token, call.call.rank, chunk, sum);
            } else {
                send_rows<kLogFmt>(p, epoch, is_tagged, token, chunk);
            }
        }
        if (!is_tagged && steps.ends_token(step)) {
            __syncthreads();
            // A warp that has found the rank masked has sent nothing; then it is found masked here, too.
            if (flags && !(masked_ranks(call) >> token.source & 1u)) release_rows(p, epoch, token);
        }
        stress_sleep(call.call);
        if (sums_next) sum = sum_chunk(next, loaded, row_bytes, steps.chunk(step + 1));
        token = next;
        next = token_of(p, noted, steps.token(step + 2) < arrivals.num_tokens);
    }
    return true;
}

// --- receiving -----------------------------------------------------------------------------------------------------

// What is added up for a token. A lane for each rank, or for each column.
struct Terms {
    int rank;  // that it comes from; -1: none
    float weight;
    uint32_t lanes;  // that have one; the same in all lanes
};

__device__ Terms terms_of(const LowLatencyCombineParams& p, int token) {
    const LowLatencyCall& call = p.call;
    const int lane = threadIdx.x % 32;
    const int64_t at = static_cast<int64_t>(token) * call.top_k + lane;
    int rank = -1;
    float weight = 1.0f;
    if (lane < call.top_k) {
        const int64_t expert = p.topk_index[at];
        const int64_t experts = static_cast<int64_t>(call.num_local_experts) * call.call.num_ranks;
        if (expert >= 0 && expert < experts) rank = static_cast<int>(expert) / call.num_local_experts;
        if (!call.weighted) weight = p.topk_weights[at];
    }
    if (call.weighted) {
        const uint32_t ranks = __reduce_or_sync(~0u, rank >= 0 ? 1u << rank : 0u);
        rank = ranks >> lane & 1u ? lane : -1;
    }
    return {rank, weight, __ballot_sync(~0u, rank >= 0)};
}

// A warp: acquires the flags of a token's plain rows. False: the call gave up.
__device__ bool wait_for_flags(const LowLatencyCombineParams& p, uint64_t epoch, const Meeting& meeting, int token,
                               int rank, Patience& patience) {
    const LowLatencyCall& call = p.call;
    const bool is_plain =
        rank >= 0 && (meeting.entries[rank].detail & 1) == 0 && !breaks(call.call, Mutation::kRowBeforeFlag);
    const uint64_t* flag = is_plain ? &own_region(call)->row_flags[epoch & 1][rank][token] : nullptr;
    return wait_for_words(call, patience, flag, epoch, Missing::kRow, max(rank, 0));
}

// A warp: the sum of a chunk of a token's terms, but for those of masked ranks. False: the call gave up.
__device__ bool take_chunk(const LowLatencyCombineParams& p, uint64_t epoch, const Meeting& meeting, int token,
                           const Terms& terms, int chunk, Patience& patience, Pieces& result) {
    constexpr int kAtOnce = 3;  // more take too many registers
    const LowLatencyCall& call = p.call;
    const int num_pieces = count_pieces(2 * call.hidden, chunk);
    const auto tag = static_cast<uint32_t>(epoch);
    float sums[kPieces][8] = {};
#pragma unroll 1
    for (uint32_t left = terms.lanes; left != 0;) {
        const int count = __popc(left);
        int parts[kAtOnce], ranks[kAtOnce];
        bool is_tagged[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            parts[i] = max(__ffs(left) - 1, 0);
            left &= left - 1;
            ranks[i] = max(__shfl_sync(~0u, terms.rank, parts[i]), 0);
            is_tagged[i] = (meeting.entries[ranks[i]].detail & 1) != 0;
        }
        const auto chunk_at = [&](int i) {
            return slot_at(p, epoch, is_tagged[i], call.call.rank, parts[i], token) + chunk * kWireChunkBytes;
        };
        Words words[kAtOnce];
        for (;;) {
            int late = -1;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) load_chunk(chunk_at(i), num_pieces, is_tagged[i], i < count, words[i]);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const bool counts = i < count && is_tagged[i] && !patience.is_masked(ranks[i]);
                if (counts && !is_complete(words[i], num_pieces, tag)) late = ranks[i];
            }
            if (__all_sync(~0u, late < 0) || breaks(call.call, Mutation::kWordWithoutTag)) break;
            if (!patience.goes_on(call, Missing::kRow, late)) return false;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const float weight = __shfl_sync(~0u, terms.weight, parts[i]);
            if (i >= count || patience.is_masked(ranks[i])) continue;
            const Pieces pieces = pieces_of(words[i], is_tagged[i]);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) add_scaled(sums[piece], pieces.of[piece], weight);
            poison(chunk_at(i), kWireChunkBytes, threadIdx.x % 32);
        }
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) result.of[piece] = to_bf16(sums[piece]);
    return true;
}

// A warp: the same of rows in the logarithmic format, when their flags have come.
__device__ void sum_log_chunk(const LowLatencyCombineParams& p, uint64_t epoch, int token, const Terms& terms,
                              int chunk, const Patience& patience, Pieces& result) {
    const int num_pieces = count_pieces(2 * p.call.hidden, chunk);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        float sum[8] = {};
        const int at = piece_at(0, i);
        for (uint32_t left = i < num_pieces ? terms.lanes : 0; left != 0; left &= left - 1) {
            const int part = __ffs(left) - 1;
            const float weight = __shfl_sync(~0u, terms.weight, part);
            if (patience.is_masked(__shfl_sync(~0u, terms.rank, part))) continue;
            const uint8_t* from = slot_at(p, epoch, false, p.call.call.rank, part, token) + chunk * kWireChunkBytes;
            const uint2 bits = *reinterpret_cast<const uint2*>(from + log_header_at(kChunkBytes, at));
            const LogHeader header = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
            if (!is_encoded(header)) {
                add_scaled(sum, load_16(from + at), weight);
                continue;
            }
            const uint2 low = *reinterpret_cast<const uint2*>(from + log_low_at(at));
            const uint16_t high = *reinterpret_cast<const uint16_t*>(from + log_high_at(at));
            float values[8];
            decode_lane({{low.x, low.y}, high}, log_decoder(header), values);
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[c] = fmaf(values[c], weight, sum[c]);
        }
        result.of[i] = to_bf16(sum);
    }
}

// Returns whether the call went on.
template <bool kLogFmt>
__device__ bool receive(const LowLatencyCombineParams& p, uint64_t epoch, Meeting& meeting) {
    const LowLatencyCall& call = p.call;
    const int chunks = p.num_chunks, row_bytes = 2 * call.hidden;
    const int64_t begin = clock64();
    const bool took_place = p.arrivals->num_tokens != Arrivals::kCallFailed;
    int unit = warp_of_grid();
    Terms terms = {};
    if (unit < call.num_tokens * chunks) terms = terms_of(p, unit / chunks);
    if (threadIdx.x < 32) meet_peers(call, kLowLatencyCombine, epoch, meeting);
    __syncthreads();
    if (meeting.refused) return false;
#pragma unroll 1
    for (; took_place && unit < call.num_tokens * chunks;) {
        const int token = unit / chunks, chunk = unit % chunks;
        stress_sleep(call.call);
        Pieces pieces;
        Patience patience(masked_for_warp(call));
        if (!wait_for_flags(p, epoch, meeting, token, terms.rank, patience)) return true;
        if constexpr (kLogFmt) {
            sum_log_chunk(p, epoch, token, terms, chunk, patience, pieces);
        } else if (!take_chunk(p, epoch, meeting, token, terms, chunk, patience, pieces)) {
            return true;
        }
        const uint32_t alike = __match_any_sync(~0u, terms.rank);  // columns of one rank
        const bool counts = terms.rank >= 0 && terms.rank != call.call.rank && threadIdx.x % 32 + 1 == __ffs(alike);
        if (p.wait_stats && unit == 0 && counts) {
            atomicAdd(reinterpret_cast<unsigned long long*>(&p.wait_stats[terms.rank]), clock64() - begin);
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int at = piece_at(chunk, i);
            if (at < row_bytes) store_16(p.combined + static_cast<int64_t>(token) * row_bytes + at, pieces.of[i]);
        }
        unit += warps_of_grid();
        if (unit < call.num_tokens * chunks) terms = terms_of(p, unit / chunks);
    }
    return true;
}

template <bool kWeighted, bool kLogFmt>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    low_latency_combine(const __grid_constant__ LowLatencyCombineParams p) {
    __shared__ Meeting meeting;
    const bool sends = p.call.halves & kSendHalf, receives = p.call.halves & kReceiveHalf;
    fetch_parameters(p);
    wait_for_earlier_kernels();
    let_next_kernel_begin();
    tell_ended_calls(p.call);
    const LowLatencyState::OfBlock& counters = counters_of(p.call);
    const uint64_t epoch = (sends ? counters.sent : counters.received)[kLowLatencyCombine] + 1;
    if (threadIdx.x == 0) meeting.refused = 0;
    bool goes_on = !sends || send<kWeighted, kLogFmt>(p, epoch), knows_shape = goes_on;
    if (receives && goes_on) {
        __syncthreads();
        goes_on = receive<kLogFmt>(p, epoch, meeting);
        knows_shape = goes_on || meeting.knows_shape;
    }
    end_halves(p.call, kLowLatencyCombine, epoch, goes_on, knows_shape);
}

auto kernel_of(bool weighted, bool use_logfmt) {
    if (weighted) return use_logfmt ? low_latency_combine<true, true> : low_latency_combine<true, false>;
    return use_logfmt ? low_latency_combine<false, true> : low_latency_combine<false, false>;
}

}  // namespace

void launch_low_latency_combine(LowLatencyCombineParams params, int num_blocks, cudaStream_t stream) {
    params.num_chunks = num_chunks(2 * params.call.hidden);
    const int parts = params.call.weighted ? params.call.call.num_ranks : params.call.top_k;
    params.call.tagged_capacity = static_cast<int32_t>(kTaggedBytes / parts / (params.num_chunks * kWireChunkBytes));
    launch_kernel("launching the low-latency combine kernel", kernel_of(params.call.weighted, params.use_logfmt),
                  {num_blocks, kLowLatencyThreads, 0, stream, params.call.begins_early}, params);
}

void prepare_low_latency_combine() {
    for (const bool weighted : {false, true}) {
        for (const bool use_logfmt : {false, true}) load_kernel(kernel_of(weighted, use_logfmt));
    }
}

}  // namespace hpc_moe::cuda
