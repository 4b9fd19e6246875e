// Layout: two kernels, no communication, no cleaning, the same result every time.
//
// 1. count_chunk: a warp takes a chunk of consecutive tokens, one after another; lane k has the token's k-th expert,
//    lane r its r-th rank. It counts tokens per rank in registers and per expert in shared memory, so positions
//    inside the chunk come out in token order.
// 2. finish_chunk: a block per chunk adds the counts of all earlier chunks to its positions. The last one has the
//    totals.
//
// Wrong values are remembered in LocalState::bad_value (the smallest wins, so that the report does not depend on
// timing); the exchange, or step 2, takes them from there.
#include "cuda/check.h"
#include "cuda/device/protocol.cuh"
#include "cuda/layout.h"

namespace hpc_moe::cuda {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kMaxChunks = 128;

__device__ void note_bad_value(LocalState* state, BadValue kind, uint64_t where) {
    atomicMin(reinterpret_cast<unsigned long long*>(&state->bad_value),
              static_cast<unsigned long long>(kind) << 48 | where);
}

// Lane k's expert of the token; -1 where there is none or where it is not a valid choice.
__device__ int checked_expert(const LayoutParams& p, int token, int lane) {
    int64_t expert = -1;
    if (lane < p.top_k) expert = p.topk_idx[static_cast<int64_t>(token) * p.top_k + lane];
    if (expert < -1 || expert >= p.num_experts) {
        note_bad_value(p.state, BadValue::kOutOfRange, token);
        expert = -1;
    }
    const uint32_t same = __match_any_sync(~0u, static_cast<int>(expert));
    if (expert >= 0 && __popc(same) > 1) {
        note_bad_value(p.state, BadValue::kTwice, token);
        if (__ffs(same) - 1 != lane) expert = -1;
    }
    return static_cast<int>(expert);
}

__global__ void __launch_bounds__(32) count_chunk(const __grid_constant__ LayoutParams p) {
    extern __shared__ int32_t expert_counts[];  // [E]
    const int lane = threadIdx.x, first = blockIdx.x * p.tokens_per_chunk;
    const int last = min(first + p.tokens_per_chunk, p.num_tokens);
    const int experts_per_rank = p.num_experts / p.num_ranks;
    for (int e = lane; e < p.num_experts; e += 32) expert_counts[e] = 0;
    __syncwarp();
    int sent = 0;  // lane r: tokens for rank r so far
    for (int token = first; token < last; ++token) {
        bool goes;
        if (p.top_k > 0) {
            const int expert = checked_expert(p, token, lane);
            const int position = expert >= 0 ? expert_counts[expert]++ : -1;  // no two lanes have the same expert
            if (p.expert_position && lane < p.top_k) {
                p.expert_position[static_cast<int64_t>(token) * p.top_k + lane] = position;
            }
            const uint32_t ranks = __reduce_or_sync(~0u, expert >= 0 ? 1u << (expert / experts_per_rank) : 0u);
            goes = ranks >> lane & 1u;
        } else {
            goes = lane < p.num_ranks && p.given_in_rank[static_cast<int64_t>(token) * p.num_ranks + lane] != 0;
        }
        if (lane < p.num_ranks) {
            const int64_t at = static_cast<int64_t>(token) * p.num_ranks + lane;
            if (p.given_in_rank && (p.given_in_rank[at] != 0) != goes) {
                note_bad_value(p.state, BadValue::kInRank, token);
            }
            p.in_rank[at] = goes;
            if (p.send_position) p.send_position[at] = goes ? sent : -1;
            sent += goes;
        }
        __syncwarp();
    }
    int32_t* counts = p.chunk_counts + static_cast<int64_t>(blockIdx.x) * (p.num_ranks + p.num_experts);
    if (lane < p.num_ranks) counts[lane] = sent;
    for (int e = lane; e < p.num_experts; e += 32) counts[p.num_ranks + e] = expert_counts[e];
}

// The counts of all chunks before this one in column `column`.
__device__ int count_before(const LayoutParams& p, int column) {
    const int width = p.num_ranks + p.num_experts;
    int sum = 0;
#pragma unroll 8
    for (int chunk = 0; chunk < static_cast<int>(blockIdx.x); ++chunk) sum += p.chunk_counts[chunk * width + column];
    return sum;
}

__device__ void write_total(const LayoutParams& p, int column, int total) {
    const bool is_rank = column < p.num_ranks;
    const int index = is_rank ? column : column - p.num_ranks;
    const int32_t* given = is_rank ? p.given_per_rank : p.given_per_expert;
    if (!is_rank && p.top_k == 0) {
        total = given[index];
        if (total < 0) note_bad_value(p.state, BadValue::kNegativePerExpert, index);
    }
    if (given && given[index] != total) {
        note_bad_value(p.state, is_rank ? BadValue::kPerRank : BadValue::kPerExpert, index);
    }
    (is_rank ? p.per_rank : p.per_expert)[index] = total;
}

__global__ void __launch_bounds__(kFinishThreads) finish_chunk(const __grid_constant__ LayoutParams p) {
    extern __shared__ int32_t before[];  // [R + E]
    const int width = p.num_ranks + p.num_experts;
    const bool has_totals = blockIdx.x == gridDim.x - 1;
    const int columns = p.expert_position || has_totals ? width : p.num_ranks;
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        before[column] = count_before(p, column);
        const int own = p.chunk_counts[static_cast<int64_t>(blockIdx.x) * width + column];
        if (has_totals) write_total(p, column, before[column] + own);
    }
    __syncthreads();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * p.tokens_per_chunk;
    const int64_t last = min(first + p.tokens_per_chunk, static_cast<int64_t>(p.num_tokens));
    if (p.send_position && blockIdx.x > 0) {
        for (int64_t at = first * p.num_ranks + threadIdx.x; at < last * p.num_ranks; at += blockDim.x) {
            if (p.send_position[at] >= 0) p.send_position[at] += before[at % p.num_ranks];
        }
    }
    if (p.expert_position && blockIdx.x > 0) {
        for (int64_t at = first * p.top_k + threadIdx.x; at < last * p.top_k; at += blockDim.x) {
            if (p.expert_position[at] >= 0) p.expert_position[at] += before[p.num_ranks + p.topk_idx[at]];
        }
    }
    if (has_totals && p.report) {
        __syncthreads();
        if (threadIdx.x == 0 && p.state->bad_value != kNoBadValue) {
            Call call{};
            call.state = p.state;
            call.host = p.host;
            if (claim_error(call)) {
                p.host->error.kind = ErrorKind::kBadValue;
                p.host->error.operation = Operation::kDispatch;
                p.host->error.peer = -1;  // found without the peers
                p.host->error.numbers[0] = p.state->bad_value;
                publish_error(call);
            }
            p.state->bad_value = kNoBadValue;
        }
    }
}

size_t count_shared_bytes(const LayoutParams& p) { return sizeof(int32_t) * p.num_experts; }
size_t finish_shared_bytes(const LayoutParams& p) { return sizeof(int32_t) * (p.num_ranks + p.num_experts); }

}  // namespace

int layout_tokens_per_chunk(int64_t num_tokens) {
    const int64_t at_least = (num_tokens + kMaxChunks - 1) / kMaxChunks;
    return static_cast<int>(at_least < 32 ? 32 : at_least);
}

int layout_num_chunks(int64_t num_tokens) {
    const int per_chunk = layout_tokens_per_chunk(num_tokens);
    const int64_t chunks = (num_tokens + per_chunk - 1) / per_chunk;
    return static_cast<int>(chunks < 1 ? 1 : chunks);  // somebody must write the totals
}

void launch_layout(const LayoutParams& params, cudaStream_t stream) {
    const int chunks = layout_num_chunks(params.num_tokens);
    count_chunk<<<chunks, 32, count_shared_bytes(params), stream>>>(params);
    check(cudaGetLastError(), "launching the layout kernel");
    finish_chunk<<<chunks, kFinishThreads, finish_shared_bytes(params), stream>>>(params);
    check(cudaGetLastError(), "launching the layout kernel");
}

void prepare_layout() {
    const int most = sizeof(int32_t) * (kMaxLowLatencyRanks + kMaxRanks * kMaxLocalExperts);
    check(cudaFuncSetAttribute(count_chunk, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "loading a kernel");
    check(cudaFuncSetAttribute(finish_chunk, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "loading a kernel");
}

}  // namespace hpc_moe::cuda
