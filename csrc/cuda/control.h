// Memory that ranks, kernels and the host share: what lies at the start of every window, in this rank's own device
// memory, and in the host memory that kernels report to. Plain structures, the same to every compiler.
#pragma once

#include <cstdint>

namespace hpc_moe::cuda {

constexpr int kMaxRanks = 8;             // of a node
constexpr int kMaxLowLatencyRanks = 32;  // of low-latency calls: a lane of a warp, and a bit, each
constexpr int kMaxTopK = 32;             // experts per token: one lane of a warp each
constexpr int kMaxLocalExperts = 4096;   // of a rank
constexpr int kMaxSlots = 8192;          // rows of a source that a window can hold at a time
constexpr int kMaxFields = 10;           // values of a call that must agree
constexpr int kTextBytes = 384;          // of a message to the peers
constexpr int kMaxPasses = 1 << 20;      // of a call; a flag holds epoch * kMaxPasses + pass
constexpr int kLandingUnit = 128;        // bytes
constexpr int kMaxBlocks = 256;          // of a kernel that talks to peers

// In the order of Python's OPERATIONS.
enum class Operation : int32_t { kDispatch, kCombine, kLowLatencyDispatch, kLowLatencyCombine };

enum class EntryStatus : int32_t { kFine, kRejected, kBadValue, kTooSmall };

// Arrays of a dispatch's result, in the order of `landing`.
enum Array { kRows, kScales, kTopkIndex, kTopkWeights, kSourceIndex, kNumArrays };

// What a rank tells a peer when it enters a call. Small: one word a lane.
struct Entry {
    Operation operation;
    EntryStatus status;
    int32_t fields[kMaxFields];  // must be equal on all ranks
    int32_t num_tokens;          // of the rank that enters
    int32_t capacity;            // rows that its outputs have room for, -1: as many as come
    int32_t num_blocks;          // of its dispatch
    // Where, in units of kLandingUnit from the start of its window, the peers may put this call's results; [kRows] < 0:
    // nowhere.
    int32_t landing[kNumArrays];
    uint64_t detail;            // with kBadValue: see BadValue; with kTooSmall: rows that would come
    int32_t counts[kMaxRanks];  // rows that it sends to every rank (only in the exchange of an uncached dispatch)
};

constexpr int kEntryWords = sizeof(Entry) / 4;
static_assert(kEntryWords <= 32);

// An entry in a window. A word holds 4 bytes of it, and above them the low half of the epoch, so that whoever reads
// the epoch has the bytes. (What an entry permits is ordered by fence and acquire: device/protocol.cuh.)
struct PostedEntry {
    uint64_t words[kEntryWords];
    char text[kTextBytes];  // with kRejected; written before the words, which release it
};

// At the start of every window. All of it is written by peers, each in places of its own, and never cleaned: epochs and
// passes count up, and a value from an earlier call is smaller than what a wait wants (an entry's: different).
struct Control {
    PostedEntry entries[2][kMaxRanks];         // by parity of the epoch, and by the rank that enters
    uint64_t arrived[kMaxRanks][kMaxBlocks];   // epoch of the last call in which a source's block has sent everything
    uint64_t drained[kMaxRanks];               // epoch * kMaxPasses + passes that this peer has emptied of its window
    uint64_t row_flags[kMaxRanks][kMaxSlots];  // by source and slot: epoch * kMaxPasses + pass of the row in it
    int32_t expert_counts[2][kMaxRanks][kMaxLocalExperts];  // by parity and source: tokens for each local expert
};

// Bytes at the start of a window that hold `Control`; what follows is for rows.
constexpr int64_t kControlBytes = (sizeof(Control) + 4095) / 4096 * 4096;

// A wrong value found on the GPU: what is wrong in the upper 16 bits (the smallest is reported), where in the others.
enum class BadValue : int32_t { kOutOfRange = 1, kTwice, kInRank, kPerRank, kPerExpert, kNegativePerExpert };
constexpr uint64_t kNoBadValue = ~0ull;

// This rank's own device memory: what kernels of one rank remember from call to call.
struct LocalState {
    uint64_t epoch;                      // of the last call
    uint64_t bad_value;                  // found by the layout kernels, taken by the exchange
    uint64_t drained;                    // units of work of a multi-pass call that were drained
    uint64_t passes[2], last_passes[2];  // by operation
    uint32_t blocks_done;                // of the call under way
    uint32_t num_errors;                 // claimed so far, see ErrorRecord
    uint32_t gave_up;                    // a wait took too long: all further calls end at once
    uint32_t refused;                    // the last exchange ended without success: the dispatch behind it must not run
    uint32_t rows_needed;  // the last exchange found that many rows for outputs that are too small; 0: they fit
};

enum class ErrorKind : int32_t { kTimeout = 1, kRejected, kBadValue, kOperations, kFields, kCapacity };
enum class Missing : int32_t { kEntry, kRow, kArrival, kDrain };

// What went wrong, for Python to raise. There is room for one error: the first since the host acknowledged the last
// one.
struct ErrorRecord {
    uint32_t sequence;      // number of the error, from 1 on; written last
    uint32_t acknowledged;  // by the host: the number of the error that it has taken
    ErrorKind kind;
    Operation operation;  // of this rank
    int32_t peer;         // the rank that it is about
    Missing missing;      // kTimeout: what did not come
    uint64_t
        numbers[2];  // kTimeout: what came, what was waited for; kBadValue: [0]; kCapacity: rows needed, rows there
    Operation operations[kMaxLowLatencyRanks];        // kOperations
    int64_t fields[kMaxLowLatencyRanks][kMaxFields];  // kFields
    char text[kTextBytes];                            // kRejected
};

constexpr uint32_t kExchangeFailed = 0xffffffffu;  // in place of the rows of HostRecord::result

// Page-locked host memory, mapped into the device.
struct HostRecord {
    ErrorRecord error;
    ErrorRecord timeout;                   // has room of its own: there is one in the life of a buffer
    uint64_t started;                      // number of the last exchange that began
    uint64_t result;                       // its number << 32 | rows that this rank receives; written last
    int32_t num_recv_tokens;               // received tokens; other than rows in the grouped layout
    int32_t per_expert[kMaxLocalExperts];  // aligned counts of the local experts
};

}  // namespace hpc_moe::cuda
