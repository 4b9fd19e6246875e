// Dispatch: every token's row, scales and top-k data to each rank that holds one of its experts.
#pragma once

#include "cuda/call.h"
#include "cuda/pipeline.h"

namespace hpc_moe::cuda {

// Where the parts of a row lie in a slot of the stage, in bytes; the row itself comes first. -1: not sent.
struct DispatchSlot {
    int32_t scales, topk_index, topk_weights, source_index, positions;
};

constexpr int kDispatchBytesInFlight = 1370 * 1000;  // see shape_pipeline
// Where nothing has to be drained, so many warps of all blocks copy this rank's own rows: with more, those get in the
// way of the others'.
constexpr int kDispatchOwnRowWarps = 150;

struct DispatchParams {
    Call call;
    Stage stage;
    PipelineShape pipeline;
    DispatchSlot slot;
    int32_t num_tokens;  // T of this rank
    int32_t row_bytes;
    int32_t num_scales;  // of a token, 4 bytes each
    int32_t top_k;
    int32_t experts_per_rank;
    int32_t num_rows;  // of the results
    // Equal on all ranks, also on one without tokens, whose pointers are null.
    bool has_topk_index, has_topk_weights;
    bool grouped;
    bool cached;        // no top-k data, and in the grouped layout the rows are known
    bool marks_unused;  // num_rows may be more than what comes
    // This rank's tokens; owned by the caller, as all that follows.
    const uint8_t* x;
    int64_t x_stride;  // bytes
    const uint32_t* scales;
    int64_t scale_token_stride, scale_channel_stride;  // elements
    const int64_t* topk_index;                         // [T, K] or null
    const float* topk_weights;                         // [T, K] or null
    const int32_t* send_position;                      // [T, R], see LayoutParams
    const int32_t* expert_position;                    // [T, K]
    const int32_t* rank_prefix_matrix;                 // [R, R]
    const int32_t* source_begin;                       // [R, L], see ExchangeParams
    const int32_t* expert_ranges;                      // [L, 2]
    // Results; null: not wanted.
    uint8_t* recv_rows;
    uint32_t* recv_scales;
    int64_t* recv_topk_index;
    float* recv_topk_weights;
    int32_t* recv_source_index;
    int32_t* grouped_rows;  // [N_recv, K]; read if cached
};

void launch_dispatch(const DispatchParams& params, const Launch& launch);
void prepare_dispatch(bool bulk_copies);

}  // namespace hpc_moe::cuda
