// Summing rows in float32: what combine does with the rows that come back.
#pragma once

#include <cstdint>
#include <vector>

#include "packet.h"

namespace hpc_moe {

enum class Element : int { kBf16 = 0, kFloat32 = 1 };

inline int64_t element_bytes(Element element) { return element == Element::kBf16 ? 2 : 4; }

// Rows that one rank (or one node) contributes, in the order of the tokens they belong to.
struct Contribution {
    const uint8_t* rows = nullptr;
    int64_t row_stride = 0;  // bytes
    Element element = Element::kBf16;
    const float* topk_weights = nullptr;  // [rows, num_topk], may be null
};

// One row to be added, times `weight`.
struct Term {
    const uint8_t* row;
    Element element;
    float weight;
};

struct CombineOutput {
    uint8_t* rows = nullptr;  // [tokens, hidden]
    Element element = Element::kBf16;
    float* topk_weights = nullptr;  // [tokens, num_topk], may be null
    int64_t num_topk = 0;
    int64_t hidden = 0;
    std::vector<const uint16_t*> biases;  // bf16, each [tokens, hidden]
};

// For each token i: the sum, without weights and in the order of `contributions`, of the next row of every
// contribution c with flags[i * flags_stride + c] set; then the biases; rounded once to the output's element.
// topk_weights are summed alike. Tokens without any row become the sum of the biases, or zero.
void combine_by_flags(const std::vector<Contribution>& contributions, const bool* flags, int64_t flags_stride,
                      int64_t num_tokens, const CombineOutput& output, int num_threads);

// For each token i: the sum over its experts k, in the order of the columns of topk_index, of topk_weights[i, k] times
// the next row of the contribution of the rank that holds the expert. Ranks with skip[rank] set contribute nothing.
void combine_by_expert(const std::vector<Contribution>& contributions, const std::vector<bool>& skip,
                       const int64_t* topk_index, const float* topk_weights, int64_t num_tokens, int64_t num_topk,
                       int64_t experts_per_rank, const CombineOutput& output, int num_threads);

// For each received token i in [begin, begin + num_tokens): the sum of x[grouped_rows[i, k]] over k, each times
// token_weights[i, k] if given. x_row_stride is in elements.
void combine_grouped(const uint16_t* x, int64_t x_row_stride, const int32_t* grouped_rows, const float* token_weights,
                     int64_t begin, int64_t num_tokens, int64_t num_topk, const CombineOutput& output, int num_threads);

}  // namespace hpc_moe
