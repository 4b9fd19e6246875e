// Low-latency dispatch.
//
// Send half. Everything that can be read and computed before the peers permit anything (device/low_latency.cuh) is.
// 1. *Numbers.* For each rank, a block tells it how many tokens come for each of its experts, and which: words that
//    carry the epoch, so that they need no flag. These blocks are the last ones, which have a token only if all have.
// 2. *Packets.* A block takes a token, which is cast, if asked for, and written once to each rank that holds one of its
//    experts: details (which experts, and as the how-manieth token of this rank for each) by the flagging warp, the row
//    and its scales in chunks (device/wire.cuh), by a warp each. The place is the token's, among those of this rank:
//    nothing has to be asked. *Tagged*, every word says itself that it has come. *Plain*, the block meets, and then a
//    lane of the flagging warp for each rank releases (fence, then store) the packet's flag, the epoch.
//
// Receive half:
// 3. Every block takes the entries and the numbers of all ranks. Sums over the ranks before a source say where its rows
//    begin in each expert: rows lie by source, then token.
// 4. A warp takes a chunk of a packet that comes: waits for its words and the details, or acquires the packet's flag,
//    and copies it to each of the token's experts. What a combine needs is noted by the warp of the first chunk.
//
// Sending never waits for a packet; all blocks are resident at once.
#include "cuda/launch.h"
#include "cuda/low_latency_dispatch_numbers.cuh"
#include "cuda/low_latency_dispatch_packets.cuh"

namespace hpc_moe::cuda {
namespace {

__device__ bool send(const LowLatencyDispatchParams& p, uint64_t epoch, Shared& shared, int32_t* numbers) {
    const LowLatencyCall& call = p.call;
    const bool is_tagged = sends_tagged(p);
    const int first_told = gridDim.x - 1 - blockIdx.x;  // a rank
    const bool tells = first_told < call.call.num_ranks;
    Entries all;
    if (tells) all.load(p.topk_index, Entries::first_of_warp(), is_flagging_warp() ? 0 : call.num_tokens * call.top_k);
    Token token(p);
    if (token.is_there(0)) token.load(0);
    Permission permission(call, kLowLatencyDispatch);
    if (threadIdx.x < 2 * kMaxLowLatencyTopK) (&shared.positions[0][0])[threadIdx.x] = 0;
    if (tells) count_numbers(p, first_told, all, numbers, shared.told);
    __syncthreads();
    int turn = 0;
#pragma unroll 1
    for (int step = 0; step == 0 || token.is_there(step); ++step) {
        if (step > 0) token.load(step);
        if (token.is_there(step)) token.prepare(step, epoch, shared.positions[turn]);
        if (step > 0) {
            __syncthreads();
        } else {
            if (!permission.wait_and_enter(epoch, is_tagged)) return false;
            if (tells) tell_all(p, epoch, first_told, all, numbers, shared.told);
            if (!token.is_there(0)) break;
        }
        token.send(step, epoch, is_tagged, shared.positions[turn]);
        if (token.steps.ends_token(step)) {
            turn ^= 1;
            if (!is_tagged) {
                __syncthreads();
                token.release(epoch);
            }
        }
        stress_sleep(call.call);
    }
    return true;
}

// All threads of the last block: how much a combine has to send; nothing, if the call does not go on.
__device__ void note_arrivals(const LowLatencyDispatchParams& p, const Shared& shared, bool goes_on) {
    const LowLatencyCall& call = p.call;
    __shared__ int end;
    if (threadIdx.x == 0) end = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; goes_on && i < Coming::num_words(call); i += blockDim.x) {
        const uint32_t word = shared.coming.word(i);
        if (word != 0) atomicMax(&end, 32 * Coming::place_of(call, i).word + 32 - __clz(word));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        *p.arrivals = goes_on ? Arrivals{shared.coming.total(), shared.coming.total_of_peers(call), end, 0}
                              : Arrivals{Arrivals::kCallFailed, 0, 0, 0};
    }
    if (goes_on) return;
#pragma unroll 1
    for (int e = threadIdx.x; e < call.num_local_experts; e += blockDim.x) p.recv_count[e] = 0;
    for (int i = threadIdx.x; i < call.num_local_experts * call.call.num_ranks; i += blockDim.x) p.layout_range[i] = 0;
}

// Returns whether the call went on.
__device__ bool receive(const LowLatencyDispatchParams& p, uint64_t epoch, Shared& shared, int32_t* numbers) {
    const LowLatencyCall& call = p.call;
    const bool goes_on = take_numbers(p, epoch, shared, numbers);
    if (blockIdx.x == gridDim.x - 1) note_arrivals(p, shared, goes_on);
    if (!goes_on) return false;
    const int num_chunks = p.packet.num_chunks, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int unit = warp_of_grid(); unit < shared.coming.total() * num_chunks; unit += warps_of_grid()) {
        const int i = unit / num_chunks, chunk = unit % num_chunks;
        const Coming::Token token = shared.coming.at(call, i);
        const bool is_tagged = (shared.meeting.entries[token.source].detail & 1) != 0;
        uint8_t* packet = packet_at(p, epoch, is_tagged, call.call.rank, token.source, token.token);
        if (chunk == 0 && lane == 0) p.tokens[i] = token.source * call.num_max_tokens + token.token;
        Arrived arrived;
        const Came came = take_chunk(p, epoch, is_tagged, token.source, token.token, chunk, packet, arrived);
        if (came == Came::kGaveUp) return true;
        if (came == Came::kNever) continue;  // a combine sends nothing to a masked rank
        write_chunk(p, is_tagged, i, token, chunk, arrived, numbers);
        poison(packet + kDetailsBytes + chunk * kWireChunkBytes, kWireChunkBytes, lane);
    }
    return true;
}

__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    low_latency_dispatch(const __grid_constant__ LowLatencyDispatchParams p) {
    extern __shared__ int32_t numbers[];  // [R, L]
    __shared__ Shared shared;
    const bool sends = p.call.halves & kSendHalf, receives = p.call.halves & kReceiveHalf;
    fetch_parameters(p);
    wait_for_earlier_kernels();
    let_next_kernel_begin();
    tell_ended_calls(p.call);
    const LowLatencyState::OfBlock& counters = counters_of(p.call);
    const uint64_t epoch = (sends ? counters.sent : counters.received)[kLowLatencyDispatch] + 1;
    if (threadIdx.x == 0) shared.meeting.refused = 0;
    bool goes_on = !sends || send(p, epoch, shared, numbers), knows_shape = goes_on;
    if (receives) {
        __syncthreads();
        if (goes_on) {
            goes_on = receive(p, epoch, shared, numbers);
            knows_shape = goes_on || shared.meeting.knows_shape;
        } else if (blockIdx.x == gridDim.x - 1) {
            note_arrivals(p, shared, false);
        }
    }
    end_halves(p.call, kLowLatencyDispatch, epoch, goes_on, knows_shape);
}

}  // namespace

void launch_low_latency_dispatch(LowLatencyDispatchParams params, int num_blocks, cudaStream_t stream) {
    params.call.tagged_capacity =
        static_cast<int32_t>(kTaggedBytes / params.call.call.num_ranks / params.packet.packet_bytes);
    const size_t bytes = sizeof(int32_t) * params.call.num_local_experts * params.call.call.num_ranks;
    launch_kernel("launching the low-latency dispatch kernel", low_latency_dispatch,
                  {num_blocks, kLowLatencyThreads, bytes, stream, params.call.begins_early}, params);
}

void prepare_low_latency_dispatch() { load_kernel(low_latency_dispatch, sizeof(int32_t) * kMaxLowLatencyExperts); }

}  // namespace hpc_moe::cuda
