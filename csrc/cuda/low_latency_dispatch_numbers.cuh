// The numbers of low_latency_dispatch.cu: how many tokens of a rank come for each of another's experts, and which. They
// are counted and told by a block for each rank, and taken by every block.
#pragma once

#include "cuda/device/low_latency.cuh"

namespace hpc_moe::cuda {
namespace {

// Shared memory of a block; what `numbers` points to is [R, L], and sized by the launch.
struct Shared {
    Meeting meeting;
    Coming coming;
    uint32_t told[kMaxLowLatencyTokens / 32];
    int32_t positions[2][kMaxLowLatencyTopK];  // of the block's tokens in turn: of each among those of its experts
};

__device__ int expert_at(const LowLatencyCall& call, const int64_t* topk_index, int64_t at) {
    const int64_t expert = topk_index[at], experts = static_cast<int64_t>(call.num_local_experts) * call.call.num_ranks;
    return expert >= 0 && expert < experts ? static_cast<int>(expert) : -1;
}

// A lane's part of the entries of topk_index from `first` on, a multiple of 32, which all warps but the flagging one
// look at together. Loading and counting are apart, so that loads are under way in between.
struct Entries {
    static constexpr int kMost = 3, kStep = 32 * kChunkWarps, kTogether = kStep * kMost;
    int64_t of[kMost];

    __device__ static int place(int first, int i) { return first + kStep * i + static_cast<int>(threadIdx.x % 32); }
    __device__ static int first_of_warp() { return static_cast<int>(threadIdx.x) / 32 * 32; }

    __device__ void load(const int64_t* topk_index, int first, int end) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) of[i] = place(first, i) < end ? topk_index[place(first, i)] : -1;
    }

    // All lanes: adds up, in `positions` [K], how many are `own`, of column k in lane k.
    __device__ void count_same(int own, int top_k, int32_t* positions) const {
#pragma unroll 1
        for (int k = 0; k < top_k; ++k) {
            const int expert = __shfl_sync(~0u, own, k);
#pragma unroll
            for (int i = 0; i < kMost; ++i) {
                if (expert >= 0 && of[i] == expert) atomicAdd(&positions[k], 1);
            }
        }
    }

    // Adds up, in `counts` [L], how many there are of each of a rank's experts, the first of which is `begin`; marks
    // their tokens in `coming`.
    __device__ void count_of_rank(const LowLatencyCall& call, int first, int begin, int32_t* counts,
                                  uint32_t* coming) const {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            if (of[i] < begin || of[i] >= begin + call.num_local_experts) continue;
            const int token = place(first, i) / call.top_k;
            atomicAdd(&counts[of[i] - begin], 1);
            atomicOr(&coming[token / 32], 1u << token % 32);
        }
    }
};

// All threads of a block: counts what comes for `rank`. `counts` [L]; `entries`: the first ones, loaded.
__device__ void count_numbers(const LowLatencyDispatchParams& p, int rank, Entries& entries, int32_t* counts,
                              uint32_t* coming) {
    const LowLatencyCall& call = p.call;
    const int experts = call.num_local_experts, words = (call.num_max_tokens + 31) / 32;
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += blockDim.x) coming[i] = 0;
    __syncthreads();
    const int end = call.num_tokens * call.top_k, begin = Entries::first_of_warp();
#pragma unroll 1
    for (int first = begin; !is_flagging_warp() && first < end; first += Entries::kTogether) {
        if (first != begin) entries.load(p.topk_index, first, end);
        entries.count_of_rank(call, first, rank * experts, counts, coming);
    }
    __syncthreads();
}

// All threads of a block: tells `rank`.
__device__ void tell_numbers(const LowLatencyDispatchParams& p, uint64_t epoch, int rank, const int32_t* counts,
                             const uint32_t* coming) {
    const LowLatencyCall& call = p.call;
    const int experts = call.num_local_experts, words = (call.num_max_tokens + 31) / 32;
    uint64_t *const counts_there = counts_for(call, rank, epoch), *const coming_there = coming_for(call, rank, epoch);
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
        store_relaxed_sys(&coming_there[i], tagged(epoch, coming[i]));
    }
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        store_relaxed_sys(&counts_there[e], tagged(epoch, counts[e]));
    }
    __syncthreads();
    if (!is_put(call, rank) || threadIdx.x != 0) return;
    LowLatencyControl* own = own_region(call);
    const int parity = epoch & 1, self = call.call.rank;
    fence_acq_rel_sys();
    Net::put(own->coming[parity][self], coming_there, words * sizeof(uint64_t), route_to(call, rank));
    put_with_flag(call, rank, own->counts[parity][self], counts_there, experts * sizeof(uint64_t),
                  &own->number_flags[parity][self], epoch);
}

// All threads of a block: tells this block's ranks, from `first` on, for which it has counted.
__device__ void tell_all(const LowLatencyDispatchParams& p, uint64_t epoch, int first, Entries& entries,
                         int32_t* counts, uint32_t* coming) {
#pragma unroll 1
    for (int rank = first; rank < p.call.call.num_ranks; rank += gridDim.x) {
        if (__syncthreads_and(masked_ranks(p.call) >> rank & 1u)) continue;
        if (rank != first) {
            entries.load(p.topk_index, Entries::first_of_warp(), p.call.num_tokens * p.call.top_k);
            count_numbers(p, rank, entries, counts, coming);
        }
        tell_numbers(p, epoch, rank, counts, coming);
    }
}

// One thread: waits for a word of a peer that carries the epoch in its upper half, or until the call is refused. 0 for
// a rank that is not `present`; that is given up by nobody but the first block, if ranks may be masked.
__device__ uint32_t take_number(const LowLatencyCall& call, const uint64_t* word, uint64_t epoch, int peer,
                                uint32_t present, Meeting& meeting) {
    if (!(present >> peer & 1u)) return 0;
    const uint64_t* flag = &own_region(call)->number_flags[epoch & 1][peer];
    uint64_t begin = 0;
    for (uint32_t polls = 1;; ++polls) {
        const uint64_t got = is_put(call, peer) && !Net::has_come(flag, epoch) ? 0 : load_relaxed_sys(word);
        if (got >> 32 == static_cast<uint32_t>(epoch)) return static_cast<uint32_t>(got);
        if (polls % 64 != 0) continue;
        if (meeting.refused || load_relaxed_gpu(&call.call.state->gave_up)) break;
        if (masked_ranks(call) >> peer & 1u) return 0;
        if (begin == 0) begin = nanoseconds();
        if (nanoseconds() - begin <= call.call.timeout) continue;
        if (call.may_mask) {
            atomicOr(&call.state->masked, 1u << peer);
        } else {
            give_up(call.call, Missing::kEntry, peer, 0, epoch);
        }
    }
    meeting.refused = 1;
    return 0;
}

// All threads of a block but the first one: which ranks' numbers the first block counts; all if none may be masked.
__device__ __noinline__ uint32_t take_present(const LowLatencyCall& call, uint64_t epoch, Meeting& meeting) {
    if (!call.may_mask) return ~0u;
    const uint64_t* word = &call.state->present[epoch & 1];
    const uint64_t begin = nanoseconds();
    for (;;) {
        const uint64_t got = load_acquire_sys(word);
        if (got >> 32 == static_cast<uint32_t>(epoch)) return static_cast<uint32_t>(got);
        // The first block masks one rank after the other, at worst.
        const bool took_too_long = nanoseconds() - begin > (call.call.num_ranks + 1) * call.call.timeout;
        if (load_relaxed_gpu(&call.call.state->gave_up) || took_too_long) break;
    }
    meeting.refused = 1;
    return 0;
}

// All threads of the first block: what it has of ranks that are masked by now does not count; tells the other blocks.
__device__ __noinline__ void decide_present(const LowLatencyCall& call, uint64_t epoch, Shared& shared,
                                            int32_t* numbers) {
    __shared__ uint32_t absent;
    if (threadIdx.x == 0) absent = masked_ranks(call);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < call.call.num_ranks * call.num_local_experts; i += blockDim.x) {
        if (absent >> (i / call.num_local_experts) & 1u) numbers[i] = 0;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < Coming::num_words(call); i += blockDim.x) {
        if (absent >> Coming::place_of(call, i).source & 1u) shared.coming.word(i) = 0;
    }
    if (threadIdx.x == 0) store_release_sys(&call.state->present[epoch & 1], tagged(epoch, ~absent));
    __syncthreads();
}

// All threads of a block: entries, numbers, and which tokens come. False: the call does not go on.
__device__ bool take_numbers(const LowLatencyDispatchParams& p, uint64_t epoch, Shared& shared, int32_t* numbers) {
    const LowLatencyCall& call = p.call;
    const int experts = call.num_local_experts, ranks = call.call.num_ranks;
    const LowLatencyControl* control = own_region(call);
    const int64_t begin = clock64();
    const uint32_t present = blockIdx.x == 0 ? ~masked_ranks(call) : take_present(call, epoch, shared.meeting);
    if (threadIdx.x < 32) {
        meet_peers(call, kLowLatencyDispatch, epoch, shared.meeting);
    } else {
        const int counts = ranks * experts;
#pragma unroll 1
        for (int i = threadIdx.x - 32; i < counts + Coming::num_words(call); i += blockDim.x - 32) {
            const bool is_count = i < counts;
            const Coming::Place at =
                is_count ? Coming::Place{i / experts, i % experts} : Coming::place_of(call, i - counts);
            const uint64_t* words =
                is_count ? control->counts[epoch & 1][at.source] : control->coming[epoch & 1][at.source];
            const uint32_t number = take_number(call, words + at.word, epoch, at.source, present, shared.meeting);
            (is_count ? reinterpret_cast<uint32_t&>(numbers[i]) : shared.coming.word(i - counts)) = number;
            if (i % experts == 0 && is_count && blockIdx.x == 0 && p.wait_stats && at.source != call.call.rank) {
                p.wait_stats[at.source] += clock64() - begin;
            }
        }
    }
    __syncthreads();
    if (call.may_mask && blockIdx.x == 0) decide_present(call, epoch, shared, numbers);
    if (shared.meeting.refused) return false;
    if (threadIdx.x < 32) shared.coming.count(call);
    const bool notes = blockIdx.x == gridDim.x - 1;    // the block that notes arrivals, too
    const int32_t most = call.num_max_tokens * ranks;  // more only where a token selects an expert twice
#pragma unroll 1
    for (int e = threadIdx.x - 32; e >= 0 && e < experts; e += blockDim.x - 32) {
        int32_t sum = 0;
#pragma unroll 1
        for (int rank = 0; rank < ranks; ++rank) {
            const int32_t count = min(numbers[rank * experts + e], most - sum);
            numbers[rank * experts + e] = sum;
            if (notes) {
                p.layout_range[e * ranks + rank] = static_cast<int64_t>(sum) << 32 | static_cast<uint32_t>(count);
            }
            sum += count;
        }
        if (notes) {
            p.recv_count[e] = sum;
            if (p.recv_stats) p.recv_stats[e] += sum;
        }
    }
    __syncthreads();
    return true;
}

}  // namespace
}  // namespace hpc_moe::cuda
