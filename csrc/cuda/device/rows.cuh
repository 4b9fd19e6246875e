// Moving rows: by bulk copies through a warp's buffers in shared memory, with flags for who waits for them; and by
// registers.
#pragma once

#include "cuda/call.h"
#include "cuda/device/memory.cuh"
#include "cuda/device/stress.cuh"
#include "cuda/pipeline.h"

namespace hpc_moe::cuda {

// What a warp does: the how-manieth of how many that do the same.
struct Role {
    int index, count;
};

__device__ inline bool is_sender(const PipelineShape& shape) { return threadIdx.x / 32 < shape.num_send_warps; }

// The warp that raises the flags of rows that were sent by bulk copies.
__device__ inline bool is_flagger() { return threadIdx.x / 32 == kLastWarp; }

__device__ inline bool is_drainer(const PipelineShape& shape) {
    const int warp = static_cast<int>(threadIdx.x / 32) - shape.num_send_warps;
    return warp >= 0 && warp < shape.num_drain_warps;
}

// Neighbours in the order are on different SMs.
__device__ inline Role sender_role(const PipelineShape& shape) {
    return {static_cast<int>(blockIdx.x + gridDim.x * (threadIdx.x / 32)),
            static_cast<int>(gridDim.x * shape.num_send_warps)};
}

__device__ inline Role drainer_role(const PipelineShape& shape) {
    return {static_cast<int>(blockIdx.x + gridDim.x * (threadIdx.x / 32 - shape.num_send_warps)),
            static_cast<int>(gridDim.x * shape.num_drain_warps)};
}

// --- flags ---------------------------------------------------------------------------------------------------------

// Flags that a sending warp owes, for the flagging warp to raise: a fence takes more than a microsecond, in which a
// sending warp would hold up its rows, and one fence serves all that have arrived. The two hand the ring to each other:
// the flagging warp reads it between a phase of `given` and the one of `taken` that follows.
struct FlagRing {
    static constexpr uint32_t kSlots = 64;
    static constexpr uint32_t kFinished = 1u << 31;  // in num_ready: no more will come
    uint64_t* flags[kSlots];                         // in peers' windows
    uint64_t tags[kSlots];
    uint32_t first_ready, num_ready;  // flags from the one to before the other: their rows have arrived
    // Barriers. Those lanes of the sending warp arrive at `given` that send, each for what it sent and wrote here; at
    // `taken`, a lane of the flagging warp.
    uint64_t given, taken;
};

struct FlagRings {
    FlagRing of[kMaxSendWarps];
};

// The flagging warp, until all sending warps have finished; lane w sees to warp w. It only waits for its own block.
__device__ inline void raise_flags(const Call& call, const PipelineShape& shape, FlagRings& rings) {
    const int lane = threadIdx.x % 32;
    FlagRing& ring = rings.of[min(lane, kMaxSendWarps - 1)];
    bool finished = lane >= shape.num_send_warps;
    uint32_t num_taken = 0;
    while (!__all_sync(~0u, finished)) {
        const bool is_given = !finished && phase_is_complete(&ring.given, num_taken & 1u);
        const uint32_t first = is_given ? ring.first_ready : 0, state = is_given ? ring.num_ready : 0;
        const uint32_t ready = state & ~FlagRing::kFinished;
        if (__any_sync(~0u, first != ready)) fence_acq_rel_sys();  // with the stores that follow: a release of the rows
        if (is_given) {
            for (uint32_t i = first; i != ready; ++i) {
                store_relaxed_sys(ring.flags[i % FlagRing::kSlots], ring.tags[i % FlagRing::kSlots]);
            }
            finished = (state & FlagRing::kFinished) != 0;
            arrive(&ring.taken);
            num_taken += 1;
        }
        __syncwarp();
        stress_sleep(call);
    }
}

// The flags of a sending warp. The same in all lanes.
class OwedFlags {
   public:
    static constexpr int kLag = 2;
    static_assert((kLag + 1) * kMaxRanks <= FlagRing::kSlots);  // or there would never be room for more

    // Before a barrier, after which the flagging warp looks at the ring.
    __device__ explicit OwedFlags(FlagRing& ring) : ring_(ring) {
        if (threadIdx.x % 32 == 0) {
            init_barrier(&ring.given, kMaxRanks);
            init_barrier(&ring.taken);
        }
        __syncwarp();
    }

    // All lanes, before the row's last bulk copies start: each lane that `owes` adds a flag, at most kMaxRanks of them.
    __device__ void add(const Call& call, bool owes, uint64_t* flag, uint64_t tag) {
        const uint32_t owing = __ballot_sync(~0u, owes);
        while (num_added_ + kMaxRanks - num_raised_ > FlagRing::kSlots) {
            if (num_raised_ == handed_over_) {
                wait_until_stores_are_done<kLag - 1>();  // of the group under way, nothing is committed yet
                hand_over(added_[0]);
            }
            wait_taken();
        }
        if (owes) {
            const uint32_t at = num_added_ + __popc(owing & ((1u << threadIdx.x % 32) - 1));
            ring_.flags[at % FlagRing::kSlots] = flag;
            ring_.tags[at % FlagRing::kSlots] = tag;
        }
        num_added_ += __popc(owing);
        if (breaks(call, Mutation::kFlagBeforeStoresAreDone) && owing != 0) {
            wait_taken();
            hand_over(num_added_);
            stress_sleep(call);
        }
    }

    // All lanes, after each group of bulk copies: hands over the flags of rows before the last kLag groups, if the
    // flagging warp has taken those before. To wait for that, or for later groups, would hold up the warp.
    __device__ void hand_over_arrived() {
        const uint32_t arrived = added_[0];
#pragma unroll
        for (int i = 0; i + 1 < kLag; ++i) added_[i] = added_[i + 1];
        added_[kLag - 1] = num_added_;
        if (static_cast<int32_t>(arrived - handed_over_) <= 0 || !is_taken()) return;
        wait_until_stores_are_done<kLag>();
        hand_over(arrived);
    }

    // All lanes, at the end of a pass: waits until all that this warp has sent has arrived.
    __device__ void hand_over_all() {
        wait_until_stores_are_done<0>();
        if (num_added_ != handed_over_) {
            wait_taken();
            hand_over(num_added_);
        }
#pragma unroll
        for (uint32_t& added : added_) added = num_added_;
    }

    __device__ void finish() {
        wait_taken();
        hand_over(handed_over_ | FlagRing::kFinished);
    }

   private:
    __device__ bool is_taken() {
        const bool taken = num_given_ == 0 || phase_is_complete(&ring_.taken, (num_given_ - 1) & 1u);
        if (!__all_sync(~0u, taken)) return false;
        num_raised_ = handed_over_;
        return true;
    }
    __device__ void wait_taken() {
        while (!is_taken()) {
        }
    }
    __device__ void hand_over(uint32_t arrived) {
        __syncwarp();  // what other lanes wrote of the rows is released along with it
        if (threadIdx.x % 32 == 0) {
            ring_.first_ready = handed_over_;
            ring_.num_ready = arrived;
        }
        if (threadIdx.x % 32 < kMaxRanks) arrive(&ring_.given);
        handed_over_ = arrived;
        num_given_ += 1;
    }

    FlagRing& ring_;
    uint32_t num_given_ = 0;
    uint32_t num_added_ = 0, num_raised_ = 0, handed_over_ = 0;
    uint32_t added_[kLag] = {};  // num_added_ after each of the last groups, the earliest first
};

// All lanes, where rows pass through registers: releases the warp's row.
__device__ inline void raise_flag(const Call& call, bool owes, uint64_t* flag, uint64_t tag) {
    __syncwarp();
    if (owes) {
        fence_acq_rel_sys();
        store_relaxed_sys(flag, tag);
    }
    stress_sleep(call);
}

// --- bulk copies ---------------------------------------------------------------------------------------------------

// A sending warp's buffers in shared memory, filled by bulk copies and emptied in turn. When a piece is stored, the two
// behind it are being loaded. All lanes call these.
struct RowBuffers {
    static constexpr uint32_t kCount = kBuffersPerWarp;
    static constexpr uint32_t kAhead = 2;
    uint8_t* buffers;
    uint64_t* barriers;  // a load barrier each
    uint32_t buffer_bytes;
    uint32_t num_filled = 0, num_emptied = 0;

    // Loads a piece, and `scale_bytes` behind it, into the next buffer, when its last copies have read it: those after
    // them are the last group.
    __device__ void fill(const void* from, uint32_t bytes, const void* scales, uint32_t scale_bytes,
                         uint32_t scales_at) {
        wait_until_stores_are_read<kCount - kAhead - 1>();
        __syncwarp();  // of all lanes
        if (threadIdx.x % 32 == 0) {
            uint64_t* const barrier = barriers + num_filled % kCount;
            uint8_t* const buffer = buffers + num_filled % kCount * buffer_bytes;
            expect_bytes(barrier, bytes + scale_bytes);
            bulk_load(buffer, from, bytes, barrier);
            if (scale_bytes > 0) bulk_load(buffer + scales_at, scales, scale_bytes, barrier);
        }
        num_filled += 1;
    }

    // The buffer that was filled the longest ago, when it is full. emptied() follows.
    __device__ const uint8_t* filled() const {
        wait_for_load(barriers + num_emptied % kCount, num_emptied / kCount & 1u);
        return buffers + num_emptied % kCount * buffer_bytes;
    }

    // The copies out of that buffer have been started.
    __device__ void emptied() { num_emptied += 1; }
};

// All lanes of a sending warp, once.
__device__ inline RowBuffers buffers_of_warp(const PipelineShape& shape) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    const int warp = threadIdx.x / 32;
    RowBuffers buffers;
    buffers.buffers = shared_memory + kBarrierBytes + RowBuffers::kCount * warp * shape.buffer_bytes;
    buffers.barriers = reinterpret_cast<uint64_t*>(shared_memory) + RowBuffers::kCount * warp;
    buffers.buffer_bytes = shape.buffer_bytes;
    if (threadIdx.x % 32 == 0) {
        for (uint32_t i = 0; i < RowBuffers::kCount; ++i) init_barrier(buffers.barriers + i);
        publish_barriers();
    }
    __syncwarp();
    return buffers;
}

// A piece of a row that starts at `offset`.
__device__ inline int piece_size(const PipelineShape& shape, int row_bytes, int offset) {
    return min(shape.piece_bytes, row_bytes - offset);
}

// Keeps a sending warp to its share of what the links take, see pipeline.h.
class Pacer {
   public:
    // A call with few rows is over before anything can pile up.
    static constexpr int kMinRows = 4;  // of a warp
    // A warp that is late may catch up, but not by more.
    static constexpr int kMaxLatePieces = 4;

    __device__ Pacer() {}  // takes no time

    // For a warp's share of `num_rows`, each of which goes to `peers_per_row` on average. A piece may take the same
    // time wherever its row goes, and with a row more than another warp a little less: so all warps end at the same
    // time.
    __device__ Pacer(const PipelineShape& shape, const Role& role, int num_rows, float peers_per_row) {
        if (shape.pace == 0.0f || num_rows < kMinRows * role.count) return;
        const int own_rows = (num_rows - role.index + role.count - 1) / role.count;
        pace_ = shape.pace * peers_per_row * num_rows / own_rows;
        const float piece_takes = pace_ * shape.piece_bytes;
        begin_ = static_cast<uint32_t>(piece_takes * role.index / role.count);
        max_late_ = static_cast<uint32_t>(kMaxLatePieces * piece_takes);
    }

    // Until it is time for the next piece.
    __device__ void wait() {
        if (pace_ == 0.0f) return;
        if (next_ == 0) next_ = nanoseconds() + begin_;  // not all warps at once
        while (nanoseconds() < next_) {
        }
    }

    // So many bytes of a row are on their way.
    __device__ void count(int bytes) {
        if (pace_ == 0.0f) return;
        next_ = max(next_, nanoseconds() - max_late_) + static_cast<uint64_t>(bytes * pace_);
    }

   private:
    float pace_ = 0.0f;                  // nanoseconds for a byte
    uint32_t begin_ = 0, max_late_ = 0;  // nanoseconds
    uint64_t next_ = 0;
};

// Moves what a `Source` names, piece by piece, by bulk copies. All lanes call these. A Source has
//     bool load_next(RowBuffers&)                   fills a buffer with the next piece; false: there is none
//     int store_next(const uint8_t*, OwedFlags&)    starts copies of the piece after the last one stored; how
//                                                   many bytes it has
//     Pacer pacer()                                 for its share of the rows
// Between the two lie up to three pieces; both go through the same ones.
template <typename Source>
class RowPump {
   public:
    __device__ RowPump(RowBuffers buffers, FlagRing& ring) : buffers_(buffers), flags_(ring) {}

    // Starts loading the first pieces: that takes a while, and nothing need be known of the peers.
    __device__ void prefetch(Source& source) {
        while (num_loaded() < RowBuffers::kAhead && source.load_next(buffers_)) {
        }
        pacer_ = source.pacer();
    }

    // Nobody wants what was prefetched.
    __device__ void discard() {
        for (; num_loaded() > 0; buffers_.emptied()) buffers_.filled();
    }

    // Moves the pieces of a pass, those that were prefetched first; returns when they have arrived.
    __device__ void move(const Call& call, Source& source) {
        bool more = true;
        for (;;) {
            if (more) more = source.load_next(buffers_);
            if (num_loaded() == 0) break;
            if (more && num_loaded() <= RowBuffers::kAhead) continue;
            const uint8_t* const buffer = buffers_.filled();
            pacer_.wait();
            const int num_bytes = source.store_next(buffer, flags_);
            commit_stores();
            pacer_.count(num_bytes);
            buffers_.emptied();
            flags_.hand_over_arrived();
            stress_sleep(call);  // of warps that send, too: others of the block end earlier
        }
        flags_.hand_over_all();
    }

    // Nothing will be moved any more.
    __device__ void finish() { flags_.finish(); }

   private:
    __device__ uint32_t num_loaded() const { return buffers_.num_filled - buffers_.num_emptied; }

    RowBuffers buffers_;
    OwedFlags flags_;
    Pacer pacer_;
};

// --- copies through registers --------------------------------------------------------------------------------------

// A warp copies [begin, end) of a row, in bytes, multiples of 16, to each non-null target. kAhead loads are on their
// way at any time: when one has been stored, a load behind the others takes its place.
template <int kTargets, int kAhead = kTargets == 1 ? 8 : 4>
__device__ inline void copy_row(const uint8_t* from, uint8_t* const (&to)[kTargets], int begin, int end) {
    constexpr int kStep = 16 * 32;
    uint4 values[kAhead] = {};
    int at = begin + 16 * (threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_16_if(at + i * kStep < end, from + at + i * kStep, values[i]);
    while (at < end) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i, at += kStep) {
#pragma unroll
            for (int target = 0; target < kTargets; ++target) {
                if (at < end && to[target] != nullptr) store_16(to[target] + at, values[i]);
            }
            load_16_if(at + kAhead * kStep < end, from + at + kAhead * kStep, values[i]);
        }
    }
}

// A warp fills [0, bytes) with zeros; bytes a multiple of 16.
__device__ inline void clear_row(uint8_t* row, int64_t bytes) {
    for (int64_t at = 16 * (threadIdx.x % 32); at < bytes; at += 16 * 32) store_16(row + at, make_uint4(0, 0, 0, 0));
}

}  // namespace hpc_moe::cuda
