// The exchange of counts at the beginning of an uncached dispatch, and the part of a rank that rejects a call.
#pragma once

#include "cuda/call.h"

namespace hpc_moe::cuda {

struct ExchangeParams {
    Call call;
    uint32_t number;  // of this exchange, as the host counts them
    int32_t num_local_experts;
    int32_t expert_alignment;
    bool grouped;
    bool values_matter;         // a wrong value on any rank ends the call; else it counts as -1, and is reported
    const int32_t* per_rank;    // [R], of the layout
    const int32_t* per_expert;  // [E]
    // Results, in device memory that the caller owns.
    int32_t* rank_prefix_matrix;    // [R, R]
    int32_t* recv_rank_prefix_sum;  // [R]
    int32_t* aligned_per_expert;    // [L]
    int32_t* expert_ranges;         // [L, 2]: end of the expert's rows without and with padding, in the grouped layout
    int32_t* source_begin;          // [R, L]: first row of a source's tokens for an expert, in the grouped layout
};

void launch_exchange(const ExchangeParams& params, cudaStream_t stream);
// Takes part in a call that this rank rejects: `text` tells the peers why.
void launch_reject(const Call& call, const char* text, cudaStream_t stream);
void prepare_exchange();

}  // namespace hpc_moe::cuda
