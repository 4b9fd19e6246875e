// Moving rows: from a rank's tokens into packets, and out of packets into the tensors that dispatch returns.
#pragma once

#include <cstdint>
#include <vector>

#include "packet.h"

namespace hpc_moe {

// Rows to be read, wherever they lie: this rank's own tokens, or the arrays of a packet that arrived.
struct RowView {
    int64_t num_rows = 0;
    const int32_t* selection = nullptr;  // row i is element selection[i] of the arrays; null: element i
    const uint8_t* rows = nullptr;
    int64_t row_stride = 0;  // bytes
    const uint8_t* scales = nullptr;
    int64_t scale_row_stride = 0, scale_column_stride = 0;  // bytes; every scale has 4 bytes
    const int32_t* source_index = nullptr;                  // null: the element's own index
    const int64_t* topk_index = nullptr;                    // [elements, num_topk], may be null
    const float* topk_weights = nullptr;                    // [elements, num_topk], may be null

    int64_t at(int64_t row) const { return selection ? selection[row] : row; }
};

RowView view_of_packet(const PacketShape& shape, const Packet& packet);

// Tokens from `first` up to `last` that go to at least one of `ranks`.
std::vector<int32_t> select_tokens(const bool* is_token_in_rank, int64_t num_ranks, const std::vector<int>& ranks,
                                   int64_t first, int64_t last);

// Rows of a packet whose mask has bit `bit`.
std::vector<int32_t> select_by_mask(const PacketShape& shape, const Packet& packet, int bit);

// Writes the rows of `view` as a packet to `base`; returns its bytes. Masks, if the shape has them, are left unset.
int64_t write_packet(const PacketShape& shape, const RowView& view, uint8_t* base, int num_threads);

// Sets bit j of row i's mask where its token goes to ranks[j].
void write_masks(const PacketShape& shape, const bool* is_token_in_rank, int64_t num_ranks,
                 const std::vector<int>& ranks, const std::vector<int32_t>& tokens, uint8_t* base);

// Where received rows go. In the grouped layouts a received token has one output row per local expert.
struct DispatchOutput {
    uint8_t* rows = nullptr;
    uint8_t* scales = nullptr;
    // Scale s of output row p lies, in bytes, at (p / block_rows) * block_stride + (p % block_rows) * row_stride + s *
    // column_stride: column-major within an expert's block in low-latency mode, row-major otherwise.
    int64_t scale_block_rows = INT64_MAX, scale_block_stride = 0, scale_row_stride = 0, scale_column_stride = 4;
    int64_t first_expert = 0, num_local_experts = 0;
    int64_t num_topk = 0;
    bool grouped = false;
    bool know_grouped_rows = false;       // grouped_rows is filled already (cached dispatch)
    int32_t* token_source = nullptr;      // [received tokens]
    int64_t* topk_index = nullptr;        // token layout: [received, num_topk]; grouped: [output rows]
    float* topk_weights = nullptr;        // like topk_index
    int32_t* grouped_rows = nullptr;      // [received, num_topk]
    float* token_topk_weights = nullptr;  // [received, num_topk], low-latency mode
    int32_t* row_source = nullptr;        // [output rows], low-latency mode
};

// How many of the view's rows select each local expert.
void count_local_experts(const RowView& view, int64_t num_topk, int64_t first_expert, int64_t num_local_experts,
                         int64_t* counts);

// Delivers the rows of `view` as received tokens `begin`, `begin + 1`, ... In the grouped layouts `next_row`
// ([num_local_experts]) holds the output row that the next token of each expert gets, and is advanced.
void deliver(const PacketShape& shape, const RowView& view, const DispatchOutput& output, int64_t begin,
             int64_t* next_row, int num_threads);

}  // namespace hpc_moe
