#include "reduce.h"

#include <algorithm>
#include <cstring>

#include "../common/numeric.h"

namespace hpc_moe {

namespace {

// Channels summed at a time: the accumulators stay in the first-level cache.
constexpr int64_t kBlock = 1024;

HPC_MOE_MULTIVERSION void load_bf16(const uint16_t* row, int64_t count, float weight, float* sums) {
    if (weight == 1.0f) {
        for (int64_t i = 0; i < count; ++i) sums[i] = bf16_to_float(row[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) sums[i] = weight * bf16_to_float(row[i]);
    }
}

HPC_MOE_MULTIVERSION void add_bf16(const uint16_t* row, int64_t count, float weight, float* sums) {
    if (weight == 1.0f) {
        for (int64_t i = 0; i < count; ++i) sums[i] += bf16_to_float(row[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) sums[i] += weight * bf16_to_float(row[i]);
    }
}

HPC_MOE_MULTIVERSION void load_float(const float* row, int64_t count, float weight, float* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] = weight * row[i];
}

HPC_MOE_MULTIVERSION void add_float(const float* row, int64_t count, float weight, float* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += weight * row[i];
}

HPC_MOE_MULTIVERSION void store_bf16(const float* sums, int64_t count, uint16_t* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = float_to_bf16(sums[i]);
}

// Two rows per token are a common case, and need no accumulators in memory.
HPC_MOE_MULTIVERSION void add_pair(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = float_to_bf16(bf16_to_float(a[i]) + bf16_to_float(b[i]));
}

void accumulate(const Term& term, int64_t column, int64_t count, bool is_first, float* sums) {
    const uint8_t* row = term.row + column * element_bytes(term.element);
    if (term.element == Element::kBf16) {
        const auto* values = reinterpret_cast<const uint16_t*>(row);
        is_first ? load_bf16(values, count, term.weight, sums) : add_bf16(values, count, term.weight, sums);
    } else {
        const auto* values = reinterpret_cast<const float*>(row);
        is_first ? load_float(values, count, term.weight, sums) : add_float(values, count, term.weight, sums);
    }
}

void sum_row(const Term* terms, int64_t num_terms, int64_t hidden, Element element, uint8_t* target) {
    if (num_terms == 0) {
        std::memset(target, 0, hidden * element_bytes(element));
        return;
    }
    auto plain = [&](int64_t t) { return terms[t].element == Element::kBf16 && terms[t].weight == 1.0f; };
    if (element == Element::kBf16 && num_terms == 1 && plain(0)) {
        std::memcpy(target, terms[0].row, hidden * 2);
        return;
    }
    if (element == Element::kBf16 && num_terms == 2 && plain(0) && plain(1)) {
        add_pair(reinterpret_cast<const uint16_t*>(terms[0].row), reinterpret_cast<const uint16_t*>(terms[1].row),
                 hidden, reinterpret_cast<uint16_t*>(target));
        return;
    }
    float block[kBlock];
    for (int64_t column = 0; column < hidden; column += kBlock) {
        const int64_t count = std::min(kBlock, hidden - column);
        float* sums = element == Element::kFloat32 ? reinterpret_cast<float*>(target) + column : block;
        for (int64_t t = 0; t < num_terms; ++t) accumulate(terms[t], column, count, t == 0, sums);
        if (element == Element::kBf16) store_bf16(sums, count, reinterpret_cast<uint16_t*>(target) + column);
    }
}

// Terms of all tokens, one list after the other: token i has terms [begin[i], begin[i + 1]).
struct TermLists {
    std::vector<Term> terms;
    std::vector<int64_t> begin{0};
    void end_token() { begin.push_back(static_cast<int64_t>(terms.size())); }
};

void add_biases(const CombineOutput& output, int64_t token, TermLists& lists) {
    for (const uint16_t* bias : output.biases) {
        lists.terms.push_back({reinterpret_cast<const uint8_t*>(bias + token * output.hidden), Element::kBf16, 1.0f});
    }
}

void sum_all(const TermLists& lists, int64_t num_tokens, const CombineOutput& output, int num_threads) {
    const int64_t row_bytes = output.hidden * element_bytes(output.element);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_tokens > 8)
    for (int64_t token = 0; token < num_tokens; ++token) {
        sum_row(lists.terms.data() + lists.begin[token], lists.begin[token + 1] - lists.begin[token], output.hidden,
                output.element, output.rows + token * row_bytes);
    }
}

}  // namespace

void combine_by_flags(const std::vector<Contribution>& contributions, const bool* flags, int64_t flags_stride,
                      int64_t num_tokens, const CombineOutput& output, int num_threads) {
    TermLists lists;
    std::vector<int64_t> next(contributions.size(), 0);
    for (int64_t token = 0; token < num_tokens; ++token) {
        float* weights = output.topk_weights ? output.topk_weights + token * output.num_topk : nullptr;
        if (weights) std::fill_n(weights, output.num_topk, 0.0f);
        for (size_t c = 0; c < contributions.size(); ++c) {
            if (!flags[token * flags_stride + c]) continue;
            const Contribution& from = contributions[c];
            const int64_t row = next[c]++;
            lists.terms.push_back({from.rows + row * from.row_stride, from.element, 1.0f});
            if (!weights) continue;
            for (int64_t k = 0; k < output.num_topk; ++k) weights[k] += from.topk_weights[row * output.num_topk + k];
        }
        add_biases(output, token, lists);
        lists.end_token();
    }
    sum_all(lists, num_tokens, output, num_threads);
}

void combine_by_expert(const std::vector<Contribution>& contributions, const std::vector<bool>& skip,
                       const int64_t* topk_index, const float* topk_weights, int64_t num_tokens, int64_t num_topk,
                       int64_t experts_per_rank, const CombineOutput& output, int num_threads) {
    TermLists lists;
    std::vector<int64_t> next(contributions.size(), 0);
    for (int64_t token = 0; token < num_tokens; ++token) {
        for (int64_t k = 0; k < num_topk; ++k) {
            const int64_t expert = topk_index[token * num_topk + k];
            if (expert < 0 || skip[expert / experts_per_rank]) continue;
            const int64_t rank = expert / experts_per_rank;
            const Contribution& from = contributions[rank];
            lists.terms.push_back(
                {from.rows + next[rank]++ * from.row_stride, from.element, topk_weights[token * num_topk + k]});
        }
        lists.end_token();
    }
    sum_all(lists, num_tokens, output, num_threads);
}

void combine_grouped(const uint16_t* x, int64_t x_row_stride, const int32_t* grouped_rows, const float* token_weights,
                     int64_t begin, int64_t num_tokens, int64_t num_topk, const CombineOutput& output,
                     int num_threads) {
    TermLists lists;
    for (int64_t token = begin; token < begin + num_tokens; ++token) {
        for (int64_t k = 0; k < num_topk; ++k) {
            const int64_t row = grouped_rows[token * num_topk + k];
            if (row < 0) continue;
            const float weight = token_weights ? token_weights[token * num_topk + k] : 1.0f;
            lists.terms.push_back({reinterpret_cast<const uint8_t*>(x + row * x_row_stride), Element::kBf16, weight});
        }
        lists.end_token();
    }
    sum_all(lists, num_tokens, output, num_threads);
}

}  // namespace hpc_moe
