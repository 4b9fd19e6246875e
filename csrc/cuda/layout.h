// Where this rank's tokens go: counts, flags, and each token's position among those for the same rank or expert.
#pragma once

#include "cuda/call.h"

namespace hpc_moe::cuda {

struct LayoutParams {
    LocalState* state;
    HostRecord* host;
    int32_t num_tokens;
    int32_t num_ranks;
    int32_t num_experts;
    int32_t top_k;             // 0: no indices, is_token_in_rank is given
    int32_t tokens_per_chunk;  // a warp's share
    bool report;               // a wrong value goes to the host at once, not into the exchange
    const int64_t* topk_idx;   // [T, K]
    // What the caller gave, or null: compared with what is computed.
    const uint8_t* given_in_rank;     // [T, R]; with top_k 0 it is what is counted
    const int32_t* given_per_rank;    // [R]
    const int32_t* given_per_expert;  // [E]; with top_k 0 it is taken as it is
    // Results.
    uint8_t* in_rank;          // [T, R] bool
    int32_t* send_position;    // [T, R]: index among this rank's tokens for that rank, -1: not sent there
    int32_t* expert_position;  // [T, K]: index among this rank's tokens for it, -1: none; null: not wanted
    int32_t* per_rank;         // [R]
    int32_t* per_expert;       // [E]
    int32_t* chunk_counts;     // scratch, [num_chunks, R + E]
};

// How many tokens a warp takes: at most 128 chunks, so that summing over chunks stays cheap.
int layout_tokens_per_chunk(int64_t num_tokens);
int layout_num_chunks(int64_t num_tokens);
void launch_layout(const LayoutParams& params, cudaStream_t stream);
// Loads the kernels, so that none is loaded behind one that spins.
void prepare_layout();

}  // namespace hpc_moe::cuda
