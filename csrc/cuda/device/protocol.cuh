// Entering a call, waiting with a limit, and leaving a call. Every kernel that talks to peers goes through these.
//
// 1. *Enter.* Block 0 writes this rank's Entry into every window (its own too): fence.acq_rel.sys, then words that each
//    carry the epoch, and so need no order among themselves; fence and words are a release of what this rank did
//    before. The place is chosen by the epoch's parity: a peer that enters epoch n + 2 has seen this rank enter n + 1,
//    which it did after all its blocks had read the entries of n.
// 2. *Meet.* Every block acquires all entries of the epoch, into its shared memory. That a peer has entered means that
//    all its earlier calls have ended (they run in one order), so it has drained its window: this is the permission to
//    write there. All ranks see the same entries, and so agree on whether the call goes on.
// 3. *Leave.* Every thread's stores are done; a barrier of the block; a counter with acq_rel. The last block has
//    then seen all of them, and advances the epoch.
//
// A wait that takes too long sets `gave_up`, writes HostRecord::timeout, and everything ends: nothing traps.
#pragma once

#include <cstddef>

#include "cuda/call.h"
#include "cuda/device/memory.cuh"
#include "cuda/device/stress.cuh"

namespace hpc_moe::cuda {

__device__ inline Control* control_of(const Call& call, int rank) {
    return reinterpret_cast<Control*>(call.windows[rank]);
}

// One thread: claims the error record, if the host has taken the error before. publish_error ends what it begins.
__device__ inline bool claim_error(const Call& call) {
    const uint32_t taken = *const_cast<volatile uint32_t*>(&call.host->error.acknowledged);
    return atomicCAS(&call.state->num_errors, taken, taken + 1) == taken;
}

__device__ inline void publish_error(const Call& call) {
    __threadfence_system();
    *const_cast<volatile uint32_t*>(&call.host->error.sequence) = call.state->num_errors;
    __threadfence_system();
}

// One thread: records that a wait took too long, and makes all others give up. Only the first one reports, so there is
// nothing to claim, and no other error can hide this one.
__device__ inline void give_up(const Call& call, Missing missing, int peer, uint64_t got, uint64_t wanted) {
    if (atomicExch(&call.state->gave_up, 1u) != 0u) return;
    ErrorRecord& error = call.host->timeout;
    error.kind = ErrorKind::kTimeout;
    error.operation = call.entry.operation;
    error.peer = peer;
    error.missing = missing;
    error.numbers[0] = got;
    error.numbers[1] = wanted;
    __threadfence_system();
    *const_cast<volatile uint32_t*>(&error.sequence) = 1;
    __threadfence_system();
}

// One thread: waits until a word that a peer writes is at least `wanted` (acquire). False: the call gave up.
__device__ inline bool wait_for(const Call& call, const uint64_t* word, uint64_t wanted, Missing missing, int peer) {
    stress_sleep(call);
    uint64_t got = load_acquire_sys(word);
    if (got >= wanted) return true;
    const uint64_t begin = nanoseconds();
    for (uint32_t polls = 1; (got = load_acquire_sys(word)) < wanted; ++polls) {
        if (polls % 64 != 0) continue;
        if (load_relaxed_gpu(&call.state->gave_up)) return false;
        if (nanoseconds() - begin > call.timeout) {
            give_up(call, missing, peer, got, wanted);
            return false;
        }
    }
    return true;
}

// All warps, first thing in a kernel: each reads another part of the parameters, so that these are in the constant
// cache when they are needed. One after the other, each part takes half a microsecond.
template <typename Params>
__device__ inline void fetch_parameters(const Params& params) {
    constexpr int kLine = 64;
    const int at = static_cast<int>(threadIdx.x / 32) * kLine;
    if (at >= static_cast<int>(sizeof(Params))) return;
    asm volatile("" ::"r"(*reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(&params) + at)));
}

// The number of this call; the same in every thread of the kernel, for only the last block advances it.
__device__ inline uint64_t begin_epoch(const Call& call) { return call.state->epoch + 1; }

// What a flag says of this pass: larger than all flags of earlier passes and calls.
__device__ inline uint64_t pass_tag(uint64_t epoch, int pass) { return epoch * kMaxPasses + pass; }

// This lane's word of the entry that announces this rank. `counts` may be null.
__device__ inline uint32_t entry_word(const Call& call, EntryStatus status, const int32_t* counts, uint64_t detail) {
    const int lane = threadIdx.x % 32;
    uint32_t word = lane < kEntryWords ? reinterpret_cast<const uint32_t*>(&call.entry)[lane] : 0;
    const int from_counts = lane - static_cast<int>(offsetof(Entry, counts) / 4);
    if (lane == offsetof(Entry, status) / 4) word = static_cast<uint32_t>(status);
    if (lane == offsetof(Entry, detail) / 4) word = static_cast<uint32_t>(detail);
    if (lane == offsetof(Entry, detail) / 4 + 1) word = static_cast<uint32_t>(detail >> 32);
    if (counts && from_counts >= 0 && from_counts < call.num_ranks) word = counts[from_counts];
    return word;
}

// One warp: announces this rank to all. `counts` may be null. A fence.acq_rel.sys comes before it in program
// order: with the stores here it is a release of what this rank did before.
__device__ inline void enter(const Call& call, uint64_t epoch, EntryStatus status, const int32_t* counts,
                             uint64_t detail) {
    const int lane = threadIdx.x % 32;
    const uint32_t word = entry_word(call, status, counts, detail);
    stress_sleep(call);
    for (int r = 0; lane < kEntryWords && r < call.num_ranks; ++r) {
        store_relaxed_sys(&control_of(call, r)->entries[epoch & 1][call.rank].words[lane], epoch << 32 | word);
    }
}

// One warp: waits until all ranks have entered, and writes what they say to `entries` [R], in shared memory. Acquires
// what they did before. `takes_stale`: for kSendWithoutEntries and kCountsWithoutEntries.
__device__ inline bool wait_for_entries(const Call& call, uint64_t epoch, Entry* entries, bool takes_stale = false) {
    const int lane = threadIdx.x % 32;
    const PostedEntry* posted = control_of(call, call.rank)->entries[epoch & 1];
    const auto tag = static_cast<uint32_t>(epoch);
    stress_sleep(call);
    uint64_t begin = 0;
    for (uint32_t polls = 0;; ++polls) {
        uint64_t found[kMaxRanks];
#pragma unroll
        for (int r = 0; r < kMaxRanks; ++r) {
            if (lane < kEntryWords && r < call.num_ranks) found[r] = load_relaxed_sys(&posted[r].words[lane]);
        }
        int late = -1;
        if (lane < call.num_ranks && load_acquire_sys(&posted[lane].words[0]) >> 32 != tag) late = lane;
#pragma unroll
        for (int r = 0; r < kMaxRanks; ++r) {
            if (lane >= kEntryWords || r >= call.num_ranks) continue;
            reinterpret_cast<uint32_t*>(&entries[r])[lane] = static_cast<uint32_t>(found[r]);
            if (found[r] >> 32 != tag) late = r;
        }
        if (takes_stale || __all_sync(~0u, late < 0)) break;
        if (polls % 64 != 0) continue;
        if (begin == 0) begin = nanoseconds();
        const bool took_too_long = late >= 0 && nanoseconds() - begin > call.timeout;
        if (took_too_long) give_up(call, Missing::kEntry, late, 0, epoch);
        if (__any_sync(~0u, took_too_long || load_relaxed_gpu(&call.state->gave_up))) return false;
    }
    __syncwarp();  // what one lane has acquired and written, all have
    return true;
}

// What the entries say about going on: kind 0 if nothing speaks against it.
struct Objection {
    int kind;  // of ErrorKind
    int peer;
};

// One warp, after wait_for_entries: all ranks come to the same kind of objection. Values found wrong on a GPU are one
// only if `values_matter`.
__device__ inline Objection find_objection(const Call& call, const Entry* entries, bool values_matter) {
    const int lane = threadIdx.x % 32;
    bool rejects = false, has_bad_value = false, is_too_small = false, calls_other = false, differs = false;
    if (lane < call.num_ranks) {
        const Entry& entry = entries[lane];
        rejects = entry.status == EntryStatus::kRejected;
        has_bad_value = values_matter && entry.status == EntryStatus::kBadValue;
        is_too_small = entry.status == EntryStatus::kTooSmall;
        calls_other = entry.operation != call.entry.operation;
#pragma unroll
        for (int i = 0; i < kMaxFields; ++i) differs |= entry.fields[i] != call.entry.fields[i];
    }
    const uint32_t rejecting = __ballot_sync(~0u, rejects), bad = __ballot_sync(~0u, has_bad_value);
    const uint32_t other = __ballot_sync(~0u, calls_other), differing = __ballot_sync(~0u, differs);
    if (rejecting) return {static_cast<int>(ErrorKind::kRejected), __ffs(rejecting) - 1};
    if (other) return {static_cast<int>(ErrorKind::kOperations), __ffs(other) - 1};
    if (differing) return {static_cast<int>(ErrorKind::kFields), __ffs(differing) - 1};
    const uint32_t too_small = __ballot_sync(~0u, is_too_small);
    if (too_small) return {static_cast<int>(ErrorKind::kCapacity), __ffs(too_small) - 1};
    if (bad) return {static_cast<int>(ErrorKind::kBadValue), __ffs(bad) - 1};
    return {0, 0};
}

// One warp: hands the objection to the host.
__device__ inline void report_objection(const Call& call, const PostedEntry* posted, const Entry* entries,
                                        const Objection& objection) {
    const int lane = threadIdx.x % 32;
    const bool claimed = __shfl_sync(~0u, lane == 0 ? claim_error(call) : false, 0);
    if (!claimed) return;
    ErrorRecord& error = call.host->error;
    if (lane < call.num_ranks) {
        error.operations[lane] = entries[lane].operation;
        for (int i = 0; i < kMaxFields; ++i) error.fields[lane][i] = entries[lane].fields[i];
    }
    const Entry& blamed = entries[objection.peer];
    const char* text = posted[objection.peer].text;
    for (int i = lane; i < kTextBytes; i += 32) error.text[i] = text[i];
    __threadfence_system();
    __syncwarp();
    if (lane == 0) {
        error.kind = static_cast<ErrorKind>(objection.kind);
        error.operation = call.entry.operation;
        error.peer = objection.peer;
        error.numbers[0] = blamed.detail;
        error.numbers[1] = blamed.capacity;
        publish_error(call);
    }
    __syncwarp();
}

// One warp of block 0, after a fence: announces that the rank makes the call.
__device__ inline void enter_call(const Call& call, uint64_t epoch) {
    const uint32_t rows_needed = call.behind_exchange ? call.state->rows_needed : 0;
    enter(call, epoch, rows_needed ? EntryStatus::kTooSmall : EntryStatus::kFine, nullptr, rows_needed);
}

// What the ranks posted into this rank's window.
__device__ inline const PostedEntry* posted_entries(const Call& call, uint64_t epoch) {
    return control_of(call, call.rank)->entries[epoch & 1];
}

// One warp of every block: waits until all ranks have entered, and decides. True: the call goes on.
__device__ inline bool meet(const Call& call, uint64_t epoch, Entry* entries) {
    if (breaks(call, Mutation::kSendWithoutEntries) && epoch > 2) {  // there are older entries
        return wait_for_entries(call, epoch, entries, true);
    }
    if (!wait_for_entries(call, epoch, entries)) return false;
    const Objection objection = find_objection(call, entries, false);
    if (objection.kind != 0 && blockIdx.x == 0) {
        report_objection(call, posted_entries(call, epoch), entries, objection);
    }
    return objection.kind == 0;
}

// Lane 0 of a warp that has drained a unit of work: the last one of a pass tells the peers. `expected` counts the units
// of this pass and of those before it.
__device__ inline void count_drained(const Call& call, uint64_t epoch, int pass, uint64_t expected) {
    stress_sleep(call);
    if (add_acq_rel_gpu(&call.state->drained, 1) + 1 != expected) return;
    for (int r = 0; r < call.num_ranks; ++r) {
        if (r == call.rank) continue;
        store_release_sys(&control_of(call, r)->drained[call.rank], pass_tag(epoch, pass + 1));
    }
}

// All lanes of a sending warp: the ranks that get rows in this pass (lane r: whether rank r does) have drained the one
// before.
__device__ inline bool wait_for_drains(const Call& call, uint64_t epoch, int pass, bool gets_rows) {
    const int lane = threadIdx.x % 32;
    bool drained = true;
    if (gets_rows && !breaks(call, Mutation::kPassWithoutDrain)) {
        const uint64_t* word = &control_of(call, call.rank)->drained[lane];
        drained = wait_for(call, word, pass_tag(epoch, pass), Missing::kDrain, lane);
    }
    drained = __all_sync(~0u, drained);
    __syncwarp();  // what one lane has acquired, all have
    return drained;
}

// One thread, after a barrier of its block: counts the block as done. True for the last block, which then knows what
// all others did.
__device__ inline bool is_last_block(const Call& call) {
    stress_sleep(call);
    return add_acq_rel_gpu(&call.state->blocks_done, 1) == gridDim.x - 1;
}

// One thread of the last block: for Buffer.stats.
__device__ inline void count_passes(const Call& call, int num_passes) {
    const int operation = static_cast<int>(call.entry.operation);
    call.state->passes[operation] += num_passes;
    call.state->last_passes[operation] = num_passes;
}

// One thread of the last block, after which nobody looks at the state (but at gave_up): makes it ready for the next
// call.
__device__ inline void end_epoch(const Call& call, uint64_t epoch) {
    call.state->blocks_done = 0;
    call.state->drained = 0;
    call.state->epoch = epoch;
}

}  // namespace hpc_moe::cuda
