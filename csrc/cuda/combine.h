// Combine: the rows of every token, from each rank that it went to, back to its own rank, summed there.
#pragma once

#include "cuda/call.h"
#include "cuda/pipeline.h"

namespace hpc_moe::cuda {

constexpr int kCombineBytesInFlight = 688 * 1000;  // see shape_pipeline

struct CombineParams {
    Call call;
    Stage stage;  // a slot holds a row (bf16; float32 in the grouped layout), then, from slot_weights on, its weights
    PipelineShape pipeline;
    int32_t slot_weights;  // bytes; -1: no weights
    int32_t num_tokens;    // T of this rank
    int32_t row_bytes;     // of a bf16 row
    int32_t top_k;
    bool has_weights;  // equal on all ranks, also on one without rows, whose pointers are null
    bool grouped;
    // What this rank's experts made; owned by the caller, as all that follows.
    const uint8_t* x;
    int64_t x_stride;                   // bytes
    const float* topk_weights;          // [N_recv, K], or one per row in the grouped layout; null: none
    const int32_t* recv_source_index;   // [N_recv]
    const int32_t* grouped_rows;        // [N_recv, K], in the grouped layout
    const int32_t* rank_prefix_matrix;  // [R, R]
    const int32_t* send_position;       // [T, R], of the dispatch
    const uint8_t* biases[2];           // [T, H] bf16 or null
    // Results.
    uint8_t* combined;        // [T, H] bf16
    float* combined_weights;  // [T, K] or null
};

void launch_combine(const CombineParams& params, const Launch& launch);
void prepare_combine(bool bulk_copies);

}  // namespace hpc_moe::cuda
