#include "layout.h"

#include <algorithm>

namespace hpc_moe {

namespace {

std::string element(int64_t token, int64_t k) {
    return "element [" + std::to_string(token) + ", " + std::to_string(k) + "]";
}

}  // namespace

std::string compute_layout(const LayoutArguments& arguments, const LayoutResults& results) {
    const int64_t num_ranks = arguments.num_ranks;
    const int64_t experts_per_rank = arguments.num_experts / num_ranks;
    std::fill_n(results.num_tokens_per_rank, num_ranks, 0);
    std::fill_n(results.num_tokens_per_expert, arguments.num_experts, 0);
    std::fill_n(results.is_token_in_rank, arguments.num_tokens * num_ranks, false);
    if (results.num_tokens_per_node) std::fill_n(results.num_tokens_per_node, arguments.num_nodes, 0);
    std::vector<int64_t> last_token_of_node(arguments.num_nodes, -1);
    for (int64_t token = 0; token < arguments.num_tokens; ++token) {
        const int64_t* experts = arguments.topk_index + token * arguments.num_topk;
        bool* in_rank = results.is_token_in_rank + token * num_ranks;
        for (int64_t k = 0; k < arguments.num_topk; ++k) {
            const int64_t expert = experts[k];
            if (expert == -1) continue;
            if (expert < -1 || expert >= arguments.num_experts) {
                return element(token, k) + " is " + std::to_string(expert) + ", which is no expert of " +
                       std::to_string(arguments.num_experts);
            }
            if (std::find(experts, experts + k, expert) != experts + k) {
                return element(token, k) + " selects expert " + std::to_string(expert) + " a second time";
            }
            ++results.num_tokens_per_expert[expert];
            const int64_t rank = expert / experts_per_rank;
            if (in_rank[rank]) continue;
            in_rank[rank] = true;
            ++results.num_tokens_per_rank[rank];
            const int node = (*arguments.node_of_rank)[rank];
            if (results.num_tokens_per_node && last_token_of_node[node] != token) {
                last_token_of_node[node] = token;
                ++results.num_tokens_per_node[node];
            }
        }
    }
    return {};
}

}  // namespace hpc_moe
