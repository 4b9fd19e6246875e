// What low-latency kernels do at their start and end.
//
// 1. *Ended calls.* A kernel begins by saying at every peer how many calls of each kind this rank has ended
//    (Control::consumed, released): kernels run one after the other, so all that the kernels before it did is done.
//    This costs the calls themselves nothing.
// 2. *Permission.* A call may write into the areas that its epoch's parity names when each peer has ended the call of
//    its kind two before (acquired); where the layout of areas has changed since, or is not known, all calls before it.
//    Each rank enters each call at every peer.
// 3. *Entries.* The last block of a send half posts an entry at every rank, which says what must agree, in which form
//    this rank's rows travel, how its areas are laid out, and whether it rejects the call. It releases nothing: what it
//    has to say is in its words, which carry the epoch. A receive half begins with everybody's entries, and all ranks
//    come to the same decision on going on.
// 4. *End.* Each block counts the half for itself, when all its threads are done.
// 5. *Masks.* Where ranks may be masked (LowLatencyCall::may_mask), nobody waits for a rank that is, or sends it
//    anything; a wait that takes too long masks the rank, in place of giving up. Which ranks' numbers a dispatch counts
//    has to be the same in all blocks: the first one decides, and tells the others (LowLatencyState::present).
#pragma once

#include "cuda/device/protocol.cuh"
#include "cuda/device/transport.cuh"
#include "cuda/low_latency.h"

namespace hpc_moe::cuda {

__device__ inline LowLatencyControl* own_region(const LowLatencyCall& call) {
    return reinterpret_cast<LowLatencyControl*>(call.region);
}

__device__ inline LowLatencyControl* region_of(const LowLatencyCall& call, int rank) {
    return reinterpret_cast<LowLatencyControl*>(region_at(call, rank));
}

__device__ inline LowLatencyOutbox& outbox_of(const LowLatencyCall& call, int rank) {
    return reinterpret_cast<LowLatencyOutbox*>(call.region + kLowLatencyClearedBytes)[rank];
}

// Where this rank writes what is for another one's region: there, or into what is put there. Three kinds of it.
__device__ inline PostedEntry& entry_for(const LowLatencyCall& call, int rank, LowLatencyKind kind, uint64_t epoch) {
    return is_put(call, rank) ? outbox_of(call, rank).entries[kind][epoch & 1]
                              : region_of(call, rank)->entries[kind][epoch & 1][call.call.rank];
}

__device__ inline uint64_t* counts_for(const LowLatencyCall& call, int rank, uint64_t epoch) {
    return is_put(call, rank) ? outbox_of(call, rank).counts[epoch & 1]
                              : region_of(call, rank)->counts[epoch & 1][call.call.rank];
}

__device__ inline uint64_t* coming_for(const LowLatencyCall& call, int rank, uint64_t epoch) {
    return is_put(call, rank) ? outbox_of(call, rank).coming[epoch & 1]
                              : region_of(call, rank)->coming[epoch & 1][call.call.rank];
}

__device__ inline uint64_t tagged(uint64_t epoch, uint32_t value) { return epoch << 32 | value; }

// What this block knows of earlier calls; the same in all blocks.
__device__ inline LowLatencyState::OfBlock& counters_of(const LowLatencyCall& call) {
    return call.state->of_block[blockIdx.x];
}

// Ranks that this call goes on without, a bit each; it may become more at any time.
__device__ inline uint32_t masked_ranks(const LowLatencyCall& call) {
    return call.may_mask ? load_relaxed_gpu(&call.state->masked) : 0;
}

// The same, alike in all lanes of the warp that calls it.
__device__ inline uint32_t masked_for_warp(const LowLatencyCall& call) {
    return call.may_mask ? __shfl_sync(~0u, masked_ranks(call), 0) : 0;
}

// The limit of a wait that polls. A lane each; all lanes of a warp together.
class Patience {
   public:
    // `masked`: as the call knew it when it began.
    __device__ explicit Patience(uint32_t masked) : masked_(masked) {}

    __device__ bool is_masked(int rank) const { return masked_ >> rank & 1u; }

    // `late`: a peer that this lane still waits for, or -1. True: look again, perhaps with more ranks masked. False:
    // the call gave up.
    __device__ bool goes_on(const LowLatencyCall& call, Missing missing, int late) {
        return ++polls_ % 64 != 0 || look_around(call, missing, late);
    }

   private:
    // Apart, so that loops that poll are short: most of a call's code runs once, and has to be fetched first.
    __device__ __noinline__ bool look_around(const LowLatencyCall& call, Missing missing, int late) {
        if (begin_ == 0) begin_ = nanoseconds();
        const bool took_too_long = late >= 0 && nanoseconds() - begin_ > call.call.timeout;
        if (took_too_long) {
            if (call.may_mask) {
                atomicOr(&call.state->masked, 1u << late);
            } else {
                give_up(call.call, missing, late, 0, 0);
            }
        }
        __syncwarp();
        masked_ = masked_for_warp(call);
        return !__any_sync(~0u, load_relaxed_gpu(&call.call.state->gave_up));
    }

    uint32_t masked_;
    uint32_t polls_ = 0;
    uint64_t begin_ = 0;
};

// A warp: a lane each waits until `word` is at least `wanted` (acquire), or `peer` is masked; null: it waits for
// nothing. False: the call gave up.
__device__ inline bool wait_for_words(const LowLatencyCall& call, Patience& patience, const uint64_t* word,
                                      uint64_t wanted, Missing missing, int peer) {
    stress_sleep(call.call);
    for (;;) {
        const bool waits = word != nullptr && !patience.is_masked(peer) && !has_come(call, word, wanted, peer);
        if (!__any_sync(~0u, waits)) break;
        if (!patience.goes_on(call, missing, waits ? peer : -1)) return false;
    }
    __syncwarp();  // what one lane has acquired, all have
    return true;
}

// The last warp of a block has no part in moving rows: it waits for permission, and raises flags.
constexpr int kChunkWarps = kLowLatencyThreads / 32 - 1;
__device__ inline bool is_flagging_warp() { return threadIdx.x / 32 == kChunkWarps; }

// The steps of a block that sends: in one, each warp has a chunk of the same token.
class Steps {
   public:
    __device__ explicit Steps(int num_chunks)
        : num_chunks_(num_chunks), per_token_((num_chunks + kChunkWarps - 1) / kChunkWarps) {}

    __device__ int token(int step) const { return blockIdx.x + step / per_token_ * gridDim.x; }
    __device__ int chunk(int step) const { return threadIdx.x / 32 + step % per_token_ * kChunkWarps; }
    __device__ bool has_chunk(int step) const { return !is_flagging_warp() && chunk(step) < num_chunks_; }
    __device__ bool begins_token(int step) const { return step % per_token_ == 0; }
    __device__ bool ends_token(int step) const { return step % per_token_ == per_token_ - 1; }

   private:
    const int num_chunks_, per_token_;
};

// All threads, first thing in a kernel: the last warp but one of the last block tells the peers.
__device__ inline void tell_ended_calls(const LowLatencyCall& call) {
    if (blockIdx.x != gridDim.x - 1 || threadIdx.x / 32 != kChunkWarps - 1) return;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < min(call.call.num_ranks, kServedRanks) * kNumLowLatencyKinds; i += 32) {
        const int rank = i / kNumLowLatencyKinds, kind = i % kNumLowLatencyKinds;
        if (rank == call.call.rank || (masked_ranks(call) >> rank & 1u)) continue;
        stress_sleep(call.call);
        const uint64_t ended = counters_of(call).received[kind];
        if (is_put(call, rank)) {
            const Route route = route_to(call, rank);
            Net::order(route);  // it comes behind what the kernels before have signalled there
            Net::signal(&own_region(call)->consumed[kind][call.call.rank], ended, route);
        } else {
            store_release_sys(&region_of(call, rank)->consumed[kind][call.call.rank], ended);
        }
    }
}

// One warp: this rank makes the call, or rejects it.
__device__ inline void post_entry(const LowLatencyCall& call, LowLatencyKind kind, uint64_t epoch, bool is_tagged) {
    const int lane = threadIdx.x % 32;
    const uint32_t word = entry_word(call.call, call.call.entry.status, nullptr, call.shape << 1 | is_tagged);
    const uint32_t masked = masked_ranks(call);
#pragma unroll 1
    for (int r = 0; lane < kEntryWords && r < call.call.num_ranks; ++r) {
        if (masked >> r & 1u) continue;
        store_relaxed_sys(&entry_for(call, r, kind, epoch).words[lane], epoch << 32 | word);
    }
    __syncwarp();
    if (lane < call.call.num_ranks && is_put(call, lane) && !(masked >> lane & 1u)) {
        LowLatencyControl* own = own_region(call);
        const int parity = epoch & 1, self = call.call.rank;
        put_with_flag(call, lane, &own->entries[kind][parity][self], &entry_for(call, lane, kind, epoch),
                      sizeof(PostedEntry), &own->entry_flags[kind][parity][self], epoch);
    }
}

// What the flagging warp waits for before the block writes to peers. Construct it early: it begins to look then.
class Permission {
   public:
    __device__ Permission(const LowLatencyCall& call, LowLatencyKind kind) : call_(call), kind_(kind) {
        if (!is_peer()) return;
        const LowLatencyControl* control = own_region(call);
        const int rank = threadIdx.x % 32;
        if (is_put(call, rank)) return;
        of_kind_ = load_acquire_sys(&control->consumed[kind][rank]);
        of_other_ = load_acquire_sys(&control->consumed[1 - kind][rank]);
    }

    // All threads of a block. False: the call gave up.
    __device__ bool wait(uint64_t epoch) { return __syncthreads_and(!is_flagging_warp() || wait_alone(epoch)); }

    // The same, and the last block posts this rank's entry.
    __device__ bool wait_and_enter(uint64_t epoch, bool is_tagged) {
        bool permitted = true;
        if (is_flagging_warp()) {
            permitted = wait_alone(epoch);
            if (permitted && blockIdx.x == gridDim.x - 1) post_entry(call_, kind_, epoch, is_tagged);
        }
        return __syncthreads_and(permitted);
    }

   private:
    __device__ bool wait_alone(uint64_t epoch) {
        const LowLatencyState::OfBlock& counters = counters_of(call_);
        const bool changed = counters.shape != call_.shape;
        const uint64_t lag = changed ? 1 : 2, of_other = changed ? counters.sent[1 - kind_] : 0;
        const bool is_free = breaks(call_.call, Mutation::kSendWithoutPermission);
        return wait_for(kind_, of_kind_, epoch > lag && !is_free ? epoch - lag : 0) &&
               wait_for(1 - kind_, of_other_, of_other);
    }

    __device__ bool is_peer() const {
        const int rank = threadIdx.x % 32;
        return is_flagging_warp() && rank < call_.call.num_ranks && rank != call_.call.rank;
    }

    // Until each peer has ended as many calls; `seen`: that it is known to have.
    __device__ bool wait_for(int kind, uint64_t seen, uint64_t wanted) {
        const int rank = threadIdx.x % 32;
        const LowLatencyControl* control = own_region(call_);
        Patience patience(masked_for_warp(call_));
        const bool waits = is_peer() && seen < wanted;
        return wait_for_words(call_, patience, waits ? &control->consumed[kind][rank] : nullptr, wanted,
                              Missing::kDrain, rank);
    }

    const LowLatencyCall& call_;
    const LowLatencyKind kind_;
    uint64_t of_kind_ = 0, of_other_ = 0;  // calls that the peer of this lane has ended
};

// What a block has found in everybody's entries, in shared memory.
struct Meeting {
    Entry entries[kServedRanks];
    volatile uint32_t refused;  // the call does not go on, or gave up
    // Whether the peers have laid out their areas as this rank has. If not, rows that nobody receives may be on their
    // way to places that now are others'.
    uint32_t knows_shape;
};

constexpr int kEntriesAtOnce = kMaxRanks;  // of which loads are under way

// The first warp: takes everybody's entries; a block-wide barrier follows. `rejects`: this rank knows that the call
// does not go on. What a masked rank may have said does not count.
__device__ inline void meet_peers(const LowLatencyCall& call, LowLatencyKind kind, uint64_t epoch, Meeting& meeting,
                                  bool rejects = false) {
    const int lane = threadIdx.x % 32;
    const PostedEntry* posted = own_region(call)->entries[kind][epoch & 1];
    Patience patience(masked_for_warp(call));
    bool goes_on = true;
    stress_sleep(call.call);
    const LowLatencyControl* own = own_region(call);
    for (;;) {
        bool has_flag = true;  // where there is one
        if (lane < call.call.num_ranks && is_put(call, lane) && !patience.is_masked(lane)) {
            has_flag = Net::has_come(&own->entry_flags[kind][epoch & 1][lane], epoch);
        }
        const uint32_t unflagged = Net::kPuts ? __ballot_sync(~0u, !has_flag) : 0;
        int late = -1;
#pragma unroll 1
        for (int first = 0; first < min(call.call.num_ranks, kServedRanks); first += kEntriesAtOnce) {
            uint64_t found[kEntriesAtOnce] = {};
#pragma unroll
            for (int i = 0; i < kEntriesAtOnce; ++i) {
                const bool is_there = lane < kEntryWords && first + i < call.call.num_ranks;
                if (is_there) found[i] = load_relaxed_sys(&posted[first + i].words[lane]);
            }
#pragma unroll
            for (int i = 0; i < kEntriesAtOnce; ++i) {
                const int r = first + i;
                if (lane >= kEntryWords || r >= call.call.num_ranks) continue;
                uint32_t word = static_cast<uint32_t>(found[i]);
                if (patience.is_masked(r)) {
                    word = entry_word(call.call, EntryStatus::kFine, nullptr, 0);
                } else if (found[i] >> 32 != static_cast<uint32_t>(epoch) || (unflagged >> r & 1u)) {
                    late = r;
                }
                reinterpret_cast<uint32_t*>(&meeting.entries[r])[lane] = word;
            }
        }
        if (__all_sync(~0u, late < 0)) break;
        goes_on = patience.goes_on(call, Missing::kEntry, late);
        if (!goes_on) break;
    }
    bool knows_shape = goes_on;
    __syncwarp();
    if (goes_on) {
        const uint64_t shape = lane < call.call.num_ranks ? meeting.entries[lane].detail >> 1 : 0;
        knows_shape = __all_sync(~0u, shape == 0 || shape == call.shape);
        const Objection objection = find_objection(call.call, meeting.entries, false);
        goes_on = objection.kind == 0;
        if (!goes_on && !rejects && blockIdx.x == 0) {
            fence_acq_rel_sys();  // acquires the text, which the entry released
            report_objection(call.call, posted, meeting.entries, objection);
        }
    }
    __syncwarp();
    if (threadIdx.x == 0) meeting.knows_shape = knows_shape;
    if (threadIdx.x == 0 && !goes_on) meeting.refused = 1;
}

// One thread, after its block has met: what this block has put is there. Where ranks are lost, that may never be so.
__device__ inline void complete_puts(const LowLatencyCall& call) {
    const uint32_t masked = masked_ranks(call);
    if (load_relaxed_gpu(&call.call.state->gave_up) || (masked != 0 && !Net::kCompletesRoutes)) return;
#pragma unroll 1
    for (uint32_t left = call.put_ranks & ~masked; left != 0; left &= left - 1) {
        Net::complete(route_to(call, __ffs(left) - 1));
    }
}

// All threads of a block, at the end of a kernel. `knows_shape`: see Meeting.
__device__ inline void end_halves(const LowLatencyCall& call, LowLatencyKind kind, uint64_t epoch, bool went_on,
                                  bool knows_shape) {
    __syncthreads();  // all of the block are done with the counters
    if (threadIdx.x != 0) return;
    if (Net::kPuts && !went_on) complete_puts(call);  // nobody has received what is on its way
    LowLatencyState::OfBlock& counters = counters_of(call);
    if (call.halves & kSendHalf) counters.sent[kind] = epoch;
    if (call.halves & kReceiveHalf) counters.received[kind] = epoch;
    if (!knows_shape) {
        counters.shape = 0;
    } else if (call.halves & kSendHalf) {
        counters.shape = call.shape;
    }
}

// The tokens that come, or came, in the order in which they are dealt to warps. In shared memory.
class Coming {
   public:
    static constexpr int kMaxWords = kMaxComingTokens / 32;

    // Word i is about 32 tokens of a source; sources take turns, beginning behind this rank.
    struct Place {
        int source, word;
    };
    __device__ static Place place_of(const LowLatencyCall& call, int i) {
        const int ranks = call.call.num_ranks;
        return {(call.call.rank + 1 + i % ranks) % ranks, i / ranks};
    }
    __device__ static int num_words(const LowLatencyCall& call) {
        return (call.num_max_tokens + 31) / 32 * call.call.num_ranks;
    }

    __device__ uint32_t& word(int i) { return words_[i]; }
    __device__ uint32_t word(int i) const { return words_[i]; }

    // The first warp, when all words are there; a block-wide barrier follows.
    __device__ void count(const LowLatencyCall& call) {
        const int lane = threadIdx.x % 32, words = num_words(call);
        int total = 0;
#pragma unroll 1
        for (int first = 0; first < words; first += 32) {
            const int here = first + lane < words ? __popc(words_[first + lane]) : 0;
            int sum = here;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int lower = __shfl_up_sync(~0u, sum, step);
                if (lane >= step) sum += lower;
            }
            if (first + lane < words) before_[first + lane] = total + sum - here;
            total += __shfl_sync(~0u, sum, 31);
        }
        if (lane == 0) total_ = total;
    }

    __device__ int total() const { return total_; }

    // One thread.
    __device__ int total_of_peers(const LowLatencyCall& call) const {
        int own = 0;
#pragma unroll 1
        for (int i = call.call.num_ranks - 1; i < num_words(call); i += call.call.num_ranks) own += __popc(words_[i]);
        return total_ - own;
    }

    struct Token {
        int source, token;
    };

    // A warp: the i-th of them.
    __device__ Token at(const LowLatencyCall& call, int i) const {
        const int lane = threadIdx.x % 32;
        int low = 0, high = num_words(call);  // the word is in [low, high)
#pragma unroll 1
        while (high - low > 32) {
            const int middle = (low + high) / 2;
            (before_[middle] <= i ? low : high) = middle;
        }
        low += __popc(__ballot_sync(~0u, low + lane < high && before_[low + lane] <= i)) - 1;
        const uint32_t word = words_[low], below = __popc(word & ((1u << lane) - 1));
        const bool is_it = (word >> lane & 1u) && below == static_cast<uint32_t>(i - before_[low]);
        const Place place = place_of(call, low);
        return {place.source, 32 * place.word + __ffs(__ballot_sync(~0u, is_it)) - 1};
    }

   private:
    uint32_t words_[kMaxWords];
    int32_t before_[kMaxWords];  // tokens in the words before
    int32_t total_;
};

// Neighbours in the order are on different SMs.
__device__ inline int warp_of_grid() { return blockIdx.x + gridDim.x * (threadIdx.x / 32); }
__device__ inline int warps_of_grid() { return gridDim.x * (kLowLatencyThreads / 32); }

}  // namespace hpc_moe::cuda
