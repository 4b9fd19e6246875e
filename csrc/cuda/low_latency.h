// Low-latency dispatch and combine: what their kernels are given, and what lies where in a rank's region.
//
// A region has, from its start on: the control words; *tagged areas*, of a fixed size; *plain areas*, whose sizes
// depend on the call; and at its end, the buffers of zero-copy combines. Of each area there are four: for each kind of
// call, by parity of its number. device/wire.cuh has the two forms in which rows travel.
#pragma once

#include "cuda/call.h"

namespace hpc_moe::cuda {

constexpr int kMaxLowLatencyTokens = 4096;  // M
// M * R, with M rounded up to a multiple of 32, and E: a block has a bit and a number of each in shared memory.
constexpr int kMaxComingTokens = 32768, kMaxLowLatencyExperts = 32768;
constexpr int kMaxLowLatencyTopK = 16;
constexpr int kLowLatencyBlocks = 132;   // of every kernel, where the GPU has as many SMs
constexpr int kLowLatencyThreads = 512;  // of a block: 15 warps for the chunks of a row of 7168 channels, and one more

enum LowLatencyKind { kLowLatencyDispatch, kLowLatencyCombine, kNumLowLatencyKinds };

// Which halves of a call a kernel does.
constexpr int kSendHalf = 1, kReceiveHalf = 2;

// How a row lies on the wire: in chunks, of which a warp moves one.
constexpr int kChunkBytes = 1024;      // of a row: two pieces of 16 bytes a lane
constexpr int kScalesAt = 1536;        // in a chunk on the wire, behind up to three words of 16 bytes a lane
constexpr int kWireChunkBytes = 1664;  // with 8 scales, tagged; a multiple of 128
constexpr int kDetailsBytes = 16 * kMaxLowLatencyTopK;  // in front of a packet's chunks

// Bytes of an area for tagged rows. Nothing else is ever written there, so that what looks like a tag is one.
constexpr int64_t kTaggedBytes = 8 << 20;
// Rows are tagged where a rank sends at most so many bytes to its peers, by kind of call. Tags take half as much again
// of the links, but need no fence and no flag, which cost some 3 us.
constexpr int64_t kMostTaggedBytes[kNumLowLatencyKinds] = {2 << 20, 3 << 19};

// At the start of a rank's region. Peers write it, each in places of its own, by parity of the call's number; nothing
// is ever cleaned. The number of a call, its epoch, counts the calls of its kind.
struct LowLatencyControl {
    PostedEntry entries[kNumLowLatencyKinds][2][kMaxLowLatencyRanks];
    uint64_t consumed[kNumLowLatencyKinds][kMaxLowLatencyRanks];  // epoch up to which this peer's calls have ended
    // From peers that put: epoch whose entry, or whose counts and bits, have come.
    uint64_t entry_flags[kNumLowLatencyKinds][2][kMaxLowLatencyRanks];
    uint64_t number_flags[2][kMaxLowLatencyRanks];
    // epoch << 32 | a bit for each token of the source that comes, and tokens of the source for a local expert
    uint64_t coming[2][kMaxLowLatencyRanks][kMaxLowLatencyTokens / 32];
    uint64_t counts[2][kMaxLowLatencyRanks][kMaxLocalExperts];
    // Epoch of the plain rows of a token: in a dispatch by its source, in a combine by the rank that sums.
    uint64_t packet_flags[2][kMaxLowLatencyRanks][kMaxLowLatencyTokens];
    uint64_t row_flags[2][kMaxLowLatencyRanks][kMaxLowLatencyTokens];
};

// What a rank writes into one of those, on its way to a rank that is reached by puts.
struct LowLatencyOutbox {
    PostedEntry entries[kNumLowLatencyKinds][2];
    uint64_t counts[2][kMaxLocalExperts];
    uint64_t coming[2][kMaxLowLatencyTokens / 32];
};

constexpr int64_t kLowLatencyControlBytes = (sizeof(LowLatencyControl) + 4095) / 4096 * 4096;
// What has to be zero at first: there is no call number 0.
constexpr int64_t kLowLatencyClearedBytes = kLowLatencyControlBytes + 2 * kNumLowLatencyKinds * kTaggedBytes;
// What does not depend on the sizes of calls: behind that, an outbox for every rank.
constexpr int64_t kLowLatencyFixedBytes =
    (kLowLatencyClearedBytes + kMaxLowLatencyRanks * sizeof(LowLatencyOutbox) + 4095) / 4096 * 4096;

// The way to a rank that is reached by puts.
struct Route {
    int pe;
    int queue;  // handle of a queue pair, if NVSHMEM lets its callers have some; the same one serves all PEs
};

// This rank's own device memory. Each block of a kernel keeps the same numbers for itself: so no block has to wait for
// the others before it ends. All kernels have the same number of blocks.
struct LowLatencyState {
    struct OfBlock {
        uint64_t sent[kNumLowLatencyKinds], received[kNumLowLatencyKinds];  // halves of calls that have ended
        uint64_t shape;                                                     // of the last call; 0: not known
        int32_t queue;                                                      // through which it puts, see Route
        int32_t unused[5];
    } of_block[kMaxBlocks];
    // Regions of all ranks, as this process sees them, and their PEs. (Parameters have the regions of the first ones:
    // they are sooner there.)
    uint8_t* regions[kMaxLowLatencyRanks];
    int32_t pes[kMaxLowLatencyRanks];
    uint32_t masked;      // ranks that calls go on without, a bit each
    uint64_t present[2];  // where ranks may be masked, by parity of a dispatch: epoch << 32 | ranks whose numbers came
};

// A token on its way: kDetailsBytes, with 16 bytes for each column of topk_idx, a Detail; then chunks.
struct PacketShape {
    int32_t row_bytes;
    int32_t scale_bytes;  // 4 or (UE8M0) 1 for each 128 channels; 0: none
    int32_t num_chunks;
    int32_t packet_bytes;
};

struct Detail {
    int32_t local_expert;  // -1: the expert is elsewhere, or there is none
    int32_t position;      // of the token among its source's for that expert
    float weight;          // 0 if weights do not travel
    uint32_t tag;          // the epoch
};

// Where the rows of a kind of call lie in a region, in bytes from its start: at even epochs, and how far behind it at
// odd ones.
struct Area {
    int64_t begin, parity_bytes;
};

// What dispatch and combine have in common.
struct LowLatencyCall {
    Call call;        // windows: the regions of the first ranks, each of which starts with a LowLatencyControl
    uint8_t* region;  // of this rank
    LowLatencyState* state;
    int32_t halves;
    int32_t num_tokens;         // T of this rank
    int32_t num_max_tokens;     // M
    int32_t hidden;             // H
    int32_t top_k;              // K
    int32_t num_local_experts;  // L
    bool weighted;              // weights travel with the dispatch
    bool may_mask;              // a rank that does not come is masked, and the call goes on without it
    bool begins_early;          // for the launch: see Grid
    Area tagged, plain;
    int32_t tagged_capacity;  // tokens of a part of the tagged area; the launch sets it
    // Ranks that are reached by puts (device/transport.cuh), a bit each; and where, in this rank's region, packets or
    // rows for the first of them are put together, at even epochs, how far behind it at odd ones, and for the next
    // rank.
    uint32_t put_ranks;
    uint8_t* outboxes;
    int64_t outbox_parity_bytes, outbox_bytes;
    int64_t most_tagged_bytes;  // see kMostTaggedBytes
    uint64_t shape;             // differs where the layout of areas does; not 0
};

// What a dispatch tells the combine of its handle.
struct Arrivals {
    static constexpr int kCallFailed = -1;
    int32_t num_tokens;  // that came, or kCallFailed
    int32_t from_peers;  // of these
    int32_t end;         // above the indices that they have at their sources
    int32_t unused;
};

// The piece of memory that all results of a dispatch share but its rows and their scales: where in it each begins, in
// bytes, at multiples of 16. Arrivals are at its start.
struct RoutingParts {
    int64_t layout_range, recv_count, recv_src_idx, tokens, token_rows, token_weights, end;
};

struct LowLatencyDispatchParams {
    LowLatencyCall call;
    PacketShape packet;
    bool round_scale, use_ue8m0;  // with scale_bytes > 0, that is, e4m3
    // This rank's tokens; owned by the caller, as all that follows.
    const uint8_t* x;           // [T, H] bf16
    int64_t x_stride;           // bytes
    const int64_t* topk_index;  // [T, K]
    const float* topk_weights;  // [T, K] or null
    // Results.
    uint8_t* recv_rows;     // [L, M*R, H] bf16 or e4m3
    void* recv_scales;      // [L, H/128, M*R] float32 or [L, H/512, M*R] int32, or null
    int32_t* recv_count;    // [L]
    int32_t* recv_src_idx;  // [L, M*R]
    int64_t* layout_range;  // [L, R]
    int32_t* recv_stats;    // [L], added to, or null
    int64_t* wait_stats;    // [R], cycles, added to, or null
    Arrivals* arrivals;
    int32_t* tokens;       // [R*M], as many as arrived: source * M + token, in the order in which they are dealt
    int32_t* token_rows;   // [R*M, K]: of that token; row of recv_rows, -1: none
    float* token_weights;  // [R*M, K], or null
};

struct LowLatencyCombineParams {
    LowLatencyCall call;
    int32_t num_chunks;  // of a row; the launch sets it
    bool use_logfmt;     // rows travel in the logarithmic format, and plain
    // What this rank's experts made of what came; owned by the caller, as all that follows.
    const uint8_t* x;          // [L, M*R, H] bf16
    const Arrivals* arrivals;  // of the dispatch, as what follows
    const int32_t* tokens;
    const int32_t* token_rows;
    const float* token_weights;  // null: a row for each expert is sent
    // This rank's tokens.
    const int64_t* topk_index;  // [T, K]
    const float* topk_weights;  // [T, K]
    // Results.
    uint8_t* combined;    // [T, H] bf16
    int64_t* wait_stats;  // [R], cycles, added to, or null
};

inline RoutingParts lay_out_routing(const LowLatencyCall& call, int num_ranks) {
    const int64_t local = call.num_local_experts, rows = static_cast<int64_t>(call.num_max_tokens) * num_ranks;
    const int64_t columns = rows * call.top_k;
    int64_t end = sizeof(Arrivals);
    const auto place = [&end](int64_t bytes) {
        const int64_t begin = end;
        end += (bytes + 15) / 16 * 16;
        return begin;
    };
    RoutingParts parts{};
    parts.layout_range = place(8 * local * num_ranks);
    parts.recv_count = place(4 * local);
    parts.recv_src_idx = place(4 * local * rows);
    parts.tokens = place(4 * rows);
    parts.token_rows = place(4 * columns);
    parts.token_weights = place(call.weighted ? 4 * columns : 0);
    parts.end = end;
    return parts;
}

constexpr int num_chunks(int row_bytes) { return (row_bytes + kChunkBytes - 1) / kChunkBytes; }

constexpr PacketShape shape_packet(int hidden, int scale_bytes) {
    const int row_bytes = scale_bytes > 0 ? hidden : 2 * hidden, chunks = num_chunks(row_bytes);
    return {row_bytes, scale_bytes, chunks, kDetailsBytes + chunks * kWireChunkBytes};
}

// Lays out the areas of a call whose sizes are known (M, H, K, R, and the ranks that are reached by puts), and says how
// it differs from others. Returns how many bytes a region needs for it.
inline int64_t lay_out(LowLatencyCall& call, LowLatencyKind kind) {
    const auto whole_pages = [](int64_t bytes) { return (bytes + 4095) / 4096 * 4096; };
    const int64_t tokens = call.num_max_tokens, ranks = call.call.num_ranks;
    const int64_t packet = shape_packet(call.hidden, 0).packet_bytes;  // of bf16: others are smaller
    const int64_t row = num_chunks(2 * call.hidden) * static_cast<int64_t>(kWireChunkBytes);
    const int64_t dispatch = whole_pages(tokens * ranks * packet);
    const int64_t combine = whole_pages(tokens * (ranks > call.top_k ? ranks : call.top_k) * row);
    call.tagged = {kLowLatencyControlBytes + 2 * kind * kTaggedBytes, kTaggedBytes};
    call.plain = {kLowLatencyFixedBytes + (kind == kLowLatencyDispatch ? 0 : 2 * dispatch),
                  kind == kLowLatencyDispatch ? dispatch : combine};
    call.shape = static_cast<uint64_t>(call.num_max_tokens) << 40 | static_cast<uint64_t>(call.hidden) << 8 |
                 static_cast<uint64_t>(call.top_k);
    int64_t end = kLowLatencyFixedBytes + 2 * (dispatch + combine);
    // Of a token, one packet goes to a peer, and back as many rows as it has experts there.
    const int64_t packets = whole_pages(tokens * packet), rows = whole_pages(tokens * call.top_k * row);
    call.outbox_parity_bytes = kind == kLowLatencyDispatch ? packets : rows;
    call.outboxes = call.region + end + (kind == kLowLatencyDispatch ? 0 : 2 * packets);
    call.outbox_bytes = 2 * (packets + rows);
    for (uint32_t left = call.put_ranks; left != 0; left &= left - 1) end += call.outbox_bytes;
    return end;
}

void launch_low_latency_dispatch(LowLatencyDispatchParams params, int num_blocks, cudaStream_t stream);
void launch_low_latency_combine(LowLatencyCombineParams params, int num_blocks, cudaStream_t stream);
void launch_low_latency_reject(const LowLatencyCall& call, LowLatencyKind kind, const char* text, int num_blocks,
                               cudaStream_t stream);

// Those of one module. `prepare` loads the kernels.
struct LowLatencyLaunchers {
    void (*dispatch)(LowLatencyDispatchParams params, int num_blocks, cudaStream_t stream);
    void (*combine)(LowLatencyCombineParams params, int num_blocks, cudaStream_t stream);
    void (*reject)(const LowLatencyCall& call, LowLatencyKind kind, const char* text, int num_blocks,
                   cudaStream_t stream);
    void (*prepare)();
    int most_ranks;
};
const LowLatencyLaunchers& low_latency_launchers();

// Masks `ranks`, a bit each, from the next kernel on.
void launch_mask_ranks(LowLatencyState* state, uint32_t ranks, cudaStream_t stream);
// masked: [num_ranks], 1 for a masked one.
void launch_query_masks(const LowLatencyState* state, int num_ranks, int32_t* masked, cudaStream_t stream);
// Calls of all kinds go on from number `epoch`, without the ranks `masked`. `own`: of this rank's region.
void launch_restart(LowLatencyState* state, LowLatencyControl* own, int num_ranks, uint64_t epoch, uint32_t masked,
                    cudaStream_t stream);
void prepare_low_latency_dispatch();
void prepare_low_latency_combine();
void prepare_low_latency_reject();
void prepare_low_latency_masks();

}  // namespace hpc_moe::cuda
