// Entering a call, waiting with a limit, and leaving a call. Every kernel that talks to peers goes through these.
//
// 1. *Enter.* Block 0 writes this rank's Entry into every window (its own too), plain stores, then the epoch with
//    release. The place is chosen by the epoch's parity: a peer that enters epoch n + 2 has seen this rank enter n +
//    1, which it did after all its blocks had read the entries of n.
// 2. *Meet.* Every block acquires all entries of the epoch. That a peer has entered means that all its earlier calls
//    have ended (they run in one order), so it has drained its window: this is the permission to write there. All
//    ranks see the same entries, and so agree on whether the call goes on.
// 3. *Leave.* Every thread's stores are done; a barrier of the block; a counter with acq_rel. The last block has
//    then seen all of them: it tells the peers, where the call wants that, with release, and advances the epoch.
//
// A wait that takes too long sets `gave_up`, writes HostRecord::timeout, and everything ends: nothing traps.
#pragma once

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
    error.operation = call.operation;
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
    for (int polls = 1; (got = load_acquire_sys(word)) < wanted; ++polls) {
        if (polls % 64 != 0) continue;
        if (load_relaxed_gpu(&call.state->gave_up)) return false;
        if (nanoseconds() - begin > call.timeout) {
            give_up(call, missing, peer, got, wanted);
            return false;
        }
    }
    return true;
}

// The number of this call; the same in every thread of the kernel, for only the last block advances it.
__device__ inline uint64_t begin_epoch(const Call& call) { return call.state->epoch + 1; }

// What a flag says of this pass: larger than all flags of earlier passes and calls.
__device__ inline uint64_t pass_tag(uint64_t epoch, int pass) { return epoch * kMaxPasses + pass; }

// One warp: announces this rank to all. `counts` and `text` may be null.
__device__ inline void enter(const Call& call, uint64_t epoch, EntryStatus status, const int32_t* counts,
                             uint64_t detail, const char* text) {
    const int lane = threadIdx.x % 32;
    stress_sleep(call);
    if (lane < call.num_ranks) {
        Entry& entry = control_of(call, lane)->entries[epoch & 1][call.rank];
        entry.operation = call.operation;
        entry.status = status;
#pragma unroll
        for (int i = 0; i < kMaxFields; ++i) entry.fields[i] = call.fields[i];
        entry.num_tokens = call.num_tokens;
        entry.capacity = call.capacity;
        for (int i = 0; i < kNumArrays; ++i) entry.landing[i] = call.landing[i];
        for (int r = 0; r < call.num_ranks; ++r) entry.counts[r] = counts ? counts[r] : 0;
        entry.detail = detail;
        for (int i = 0; text && i < kTextBytes; ++i) entry.text[i] = text[i];
        store_release_sys(&entry.epoch, epoch);
    }
    __syncwarp();
}

__device__ inline const Entry& entry_of(const Call& call, uint64_t epoch, int rank) {
    return control_of(call, call.rank)->entries[epoch & 1][rank];
}

// One warp: waits until all ranks have entered.
__device__ inline bool wait_for_entries(const Call& call, uint64_t epoch) {
    const int lane = threadIdx.x % 32;
    bool here = true;
    if (lane < call.num_ranks) here = wait_for(call, &entry_of(call, epoch, lane).epoch, epoch, Missing::kEntry, lane);
    here = __all_sync(~0u, here);
    __syncwarp();  // what one lane has acquired, all have
    return here;
}

// What the entries say about going on: kind 0 if nothing speaks against it.
struct Objection {
    int kind;  // of ErrorKind
    int peer;
};

// One warp, after wait_for_entries: all ranks come to the same kind of objection. Values found wrong on a GPU are one
// only if `values_matter`.
__device__ inline Objection find_objection(const Call& call, uint64_t epoch, bool values_matter) {
    const int lane = threadIdx.x % 32;
    bool rejects = false, has_bad_value = false, is_too_small = false, calls_other = false, differs = false;
    if (lane < call.num_ranks) {
        const Entry& entry = entry_of(call, epoch, lane);
        rejects = entry.status == EntryStatus::kRejected;
        has_bad_value = values_matter && entry.status == EntryStatus::kBadValue;
        is_too_small = entry.status == EntryStatus::kTooSmall;
        calls_other = entry.operation != call.operation;
        int64_t theirs[kMaxFields];  // all loads first: one after the other they would take microseconds
#pragma unroll
        for (int i = 0; i < kMaxFields; ++i) theirs[i] = entry.fields[i];
#pragma unroll
        for (int i = 0; i < kMaxFields; ++i) differs |= theirs[i] != call.fields[i];
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
__device__ inline void report_objection(const Call& call, uint64_t epoch, const Objection& objection) {
    const int lane = threadIdx.x % 32;
    const bool claimed = __shfl_sync(~0u, lane == 0 ? claim_error(call) : false, 0);
    if (!claimed) return;
    ErrorRecord& error = call.host->error;
    if (lane < call.num_ranks) {
        const Entry& entry = entry_of(call, epoch, lane);
        error.operations[lane] = entry.operation;
        for (int i = 0; i < kMaxFields; ++i) error.fields[lane][i] = entry.fields[i];
    }
    const Entry& blamed = entry_of(call, epoch, objection.peer);
    for (int i = lane; i < kTextBytes; i += 32) error.text[i] = blamed.text[i];
    __threadfence_system();
    __syncwarp();
    if (lane == 0) {
        error.kind = static_cast<ErrorKind>(objection.kind);
        error.operation = call.operation;
        error.peer = objection.peer;
        error.numbers[0] = blamed.detail;
        error.numbers[1] = blamed.capacity;
        publish_error(call);
    }
    __syncwarp();
}

// Warp 0 of every block: announces (block 0), waits for all, decides. True: the call goes on.
__device__ inline bool meet(const Call& call, uint64_t epoch) {
    if (blockIdx.x == 0) {
        const uint32_t rows_needed = call.behind_exchange ? call.state->rows_needed : 0;
        enter(call, epoch, rows_needed ? EntryStatus::kTooSmall : EntryStatus::kFine, nullptr, rows_needed, nullptr);
    }
    if (breaks(call, Mutation::kSendWithoutEntries) && epoch > 2) return true;  // there are older entries
    if (!wait_for_entries(call, epoch)) return false;
    const Objection objection = find_objection(call, epoch, false);
    if (objection.kind != 0 && blockIdx.x == 0) report_objection(call, epoch, objection);
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

// All threads: counts the block as done. True in the last block, which then knows what all others did.
__device__ inline bool is_last_block(const Call& call) {
    __shared__ uint32_t order;
    stress_sleep(call);
    __syncthreads();
    if (threadIdx.x == 0) order = add_acq_rel_gpu(&call.state->blocks_done, 1);
    __syncthreads();
    return order == gridDim.x - 1;
}

// One thread of the last block: for Buffer.stats.
__device__ inline void count_passes(const Call& call, int num_passes) {
    const int operation = static_cast<int>(call.operation);
    call.state->passes[operation] += num_passes;
    call.state->last_passes[operation] = num_passes;
}

// All threads of the last block: makes the state ready for the next call.
__device__ inline void end_epoch(const Call& call, uint64_t epoch) {
    __syncthreads();
    if (threadIdx.x == 0) {
        call.state->blocks_done = 0;
        call.state->drained = 0;
        call.state->epoch = epoch;
    }
}

}  // namespace hpc_moe::cuda
