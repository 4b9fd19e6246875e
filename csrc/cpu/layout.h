// Which token goes where: counts and flags computed from the experts that the tokens selected.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hpc_moe {

struct LayoutArguments {
    const int64_t* topk_index;  // [num_tokens, num_topk], -1: no expert
    int64_t num_tokens;
    int64_t num_topk;
    int64_t num_experts;
    int64_t num_ranks;
    const std::vector<int>* node_of_rank;
    int64_t num_nodes;
};

struct LayoutResults {
    int32_t* num_tokens_per_rank;    // [num_ranks]
    int32_t* num_tokens_per_node;    // [num_nodes], may be null
    int32_t* num_tokens_per_expert;  // [num_experts]
    bool* is_token_in_rank;          // [num_tokens, num_ranks]
};

// Fills the results. Returns an empty string, or what is wrong with which element of topk_index (out of range, or one
// expert twice in a token); the results are unspecified then.
std::string compute_layout(const LayoutArguments& arguments, const LayoutResults& results);

}  // namespace hpc_moe
