#include "rows.h"

#include <cstring>

namespace hpc_moe {

namespace {

// Below this many bytes starting threads costs more than the copy.
constexpr int64_t kParallelBytes = 1 << 16;

// Rows [0, num_rows) of `view` to `target` + row * row_bytes.
void copy_rows(const RowView& view, int64_t row_bytes, uint8_t* target, int num_threads) {
    if (!view.selection && view.row_stride == row_bytes && num_threads == 1) {
        if (view.num_rows) std::memcpy(target, view.rows, view.num_rows * row_bytes);
        return;
    }
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && view.num_rows * row_bytes > kParallelBytes)
    for (int64_t row = 0; row < view.num_rows; ++row) {
        std::memcpy(target + row * row_bytes, view.rows + view.at(row) * view.row_stride, row_bytes);
    }
}

void copy_scales(const RowView& view, int64_t row, int64_t num_scales, uint8_t* target, int64_t column_stride) {
    const uint8_t* source = view.scales + view.at(row) * view.scale_row_stride;
    for (int64_t column = 0; column < num_scales; ++column) {
        std::memcpy(target + column * column_stride, source + column * view.scale_column_stride, 4);
    }
}

uint8_t* scales_of_row(const DispatchOutput& output, int64_t row) {
    return output.scales + row / output.scale_block_rows * output.scale_block_stride +
           row % output.scale_block_rows * output.scale_row_stride;
}

// The index on this rank of the expert that the view's row selects in column k, or -1.
int64_t local_expert(const RowView& view, const DispatchOutput& output, int64_t row, int64_t k) {
    const int64_t expert = view.topk_index[view.at(row) * output.num_topk + k] - output.first_expert;
    return expert >= 0 && expert < output.num_local_experts ? expert : -1;
}

void deliver_token_layout(const PacketShape& shape, const RowView& view, const DispatchOutput& output, int64_t begin,
                          int num_threads) {
    copy_rows(view, shape.row_bytes, output.rows + begin * shape.row_bytes, num_threads);
    for (int64_t row = 0; row < view.num_rows; ++row) {
        if (shape.scale_bytes) {
            copy_scales(view, row, shape.scale_bytes / 4, scales_of_row(output, begin + row),
                        output.scale_column_stride);
        }
        if (!output.topk_index) continue;
        for (int64_t k = 0; k < output.num_topk; ++k) {
            const int64_t expert = local_expert(view, output, row, k);
            const int64_t at = (begin + row) * output.num_topk + k;
            output.topk_index[at] = expert;
            if (output.topk_weights) {
                output.topk_weights[at] = expert < 0 ? 0.0f : view.topk_weights[view.at(row) * output.num_topk + k];
            }
        }
    }
}

// Gives every (token, local expert) of the view its output row.
void assign_grouped_rows(const RowView& view, const DispatchOutput& output, int64_t begin, int64_t* next_row) {
    for (int64_t row = 0; row < view.num_rows; ++row) {
        for (int64_t k = 0; k < output.num_topk; ++k) {
            const int64_t expert = local_expert(view, output, row, k);
            const int64_t at = (begin + row) * output.num_topk + k;
            output.grouped_rows[at] = expert < 0 ? -1 : static_cast<int32_t>(next_row[expert]++);
            if (expert < 0) {
                if (output.token_topk_weights) output.token_topk_weights[at] = 0.0f;
                continue;
            }
            const int64_t target = output.grouped_rows[at];
            const float weight = view.topk_weights ? view.topk_weights[view.at(row) * output.num_topk + k] : 0.0f;
            if (output.topk_index) output.topk_index[target] = expert;
            if (output.topk_weights) output.topk_weights[target] = weight;
            if (output.token_topk_weights) output.token_topk_weights[at] = weight;
            if (output.row_source) {
                output.row_source[target] =
                    view.source_index ? view.source_index[view.at(row)] : static_cast<int32_t>(view.at(row));
            }
        }
    }
}

void deliver_grouped(const PacketShape& shape, const RowView& view, const DispatchOutput& output, int64_t begin,
                     int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && \
                                                          view.num_rows * shape.row_bytes > kParallelBytes)
    for (int64_t row = 0; row < view.num_rows; ++row) {
        for (int64_t k = 0; k < output.num_topk; ++k) {
            const int64_t target = output.grouped_rows[(begin + row) * output.num_topk + k];
            if (target < 0) continue;
            std::memcpy(output.rows + target * shape.row_bytes, view.rows + view.at(row) * view.row_stride,
                        shape.row_bytes);
            if (shape.scale_bytes) {
                copy_scales(view, row, shape.scale_bytes / 4, scales_of_row(output, target),
                            output.scale_column_stride);
            }
        }
    }
}

}  // namespace

RowView view_of_packet(const PacketShape& shape, const Packet& packet) {
    RowView view;
    view.num_rows = packet.num_rows;
    view.rows = packet.rows;
    view.row_stride = shape.row_bytes;
    view.scales = packet.scales;
    view.scale_row_stride = shape.scale_bytes;
    view.scale_column_stride = 4;
    view.source_index = shape.has_source_index ? packet.source_index : nullptr;
    view.topk_index = shape.has_topk_index ? packet.topk_index : nullptr;
    view.topk_weights = shape.has_weights ? packet.topk_weights : nullptr;
    return view;
}

std::vector<int32_t> select_tokens(const bool* is_token_in_rank, int64_t num_ranks, const std::vector<int>& ranks,
                                   int64_t first, int64_t last) {
    std::vector<int32_t> tokens;
    for (int64_t token = first; token < last; ++token) {
        for (int rank : ranks) {
            if (is_token_in_rank[token * num_ranks + rank]) {
                tokens.push_back(static_cast<int32_t>(token));
                break;
            }
        }
    }
    return tokens;
}

std::vector<int32_t> select_by_mask(const PacketShape& shape, const Packet& packet, int bit) {
    std::vector<int32_t> rows;
    for (int64_t row = 0; row < packet.num_rows; ++row) {
        if (packet.masks[row * shape.mask_bytes + bit / 8] >> (bit % 8) & 1) rows.push_back(static_cast<int32_t>(row));
    }
    return rows;
}

int64_t write_packet(const PacketShape& shape, const RowView& view, uint8_t* base, int num_threads) {
    const Packet packet = begin_packet(shape, view.num_rows, base);
    copy_rows(view, shape.row_bytes, packet.rows, num_threads);
    for (int64_t row = 0; row < view.num_rows; ++row) {
        const int64_t from = view.at(row);
        if (shape.scale_bytes) {
            copy_scales(view, row, shape.scale_bytes / 4, packet.scales + row * shape.scale_bytes, 4);
        }
        if (shape.has_source_index) {
            packet.source_index[row] = view.source_index ? view.source_index[from] : static_cast<int32_t>(from);
        }
        if (shape.has_topk_index) {
            std::memcpy(packet.topk_index + row * shape.num_topk, view.topk_index + from * shape.num_topk,
                        8 * shape.num_topk);
        }
        if (shape.has_weights) {
            std::memcpy(packet.topk_weights + row * shape.num_topk, view.topk_weights + from * shape.num_topk,
                        4 * shape.num_topk);
        }
    }
    return packet.total_bytes;
}

void write_masks(const PacketShape& shape, const bool* is_token_in_rank, int64_t num_ranks,
                 const std::vector<int>& ranks, const std::vector<int32_t>& tokens, uint8_t* base) {
    const Packet packet(shape, static_cast<int64_t>(tokens.size()), base);
    std::memset(packet.masks, 0, packet.num_rows * shape.mask_bytes);
    for (int64_t row = 0; row < packet.num_rows; ++row) {
        for (size_t bit = 0; bit < ranks.size(); ++bit) {
            if (is_token_in_rank[tokens[row] * num_ranks + ranks[bit]]) {
                packet.masks[row * shape.mask_bytes + bit / 8] |= static_cast<uint8_t>(1u << (bit % 8));
            }
        }
    }
}

void count_local_experts(const RowView& view, int64_t num_topk, int64_t first_expert, int64_t num_local_experts,
                         int64_t* counts) {
    std::memset(counts, 0, num_local_experts * sizeof *counts);
    for (int64_t row = 0; row < view.num_rows; ++row) {
        for (int64_t k = 0; k < num_topk; ++k) {
            const int64_t expert = view.topk_index[view.at(row) * num_topk + k] - first_expert;
            if (expert >= 0 && expert < num_local_experts) ++counts[expert];
        }
    }
}

void deliver(const PacketShape& shape, const RowView& view, const DispatchOutput& output, int64_t begin,
             int64_t* next_row, int num_threads) {
    if (output.token_source) {
        for (int64_t row = 0; row < view.num_rows; ++row) {
            output.token_source[begin + row] =
                view.source_index ? view.source_index[view.at(row)] : static_cast<int32_t>(view.at(row));
        }
    }
    if (!output.grouped) return deliver_token_layout(shape, view, output, begin, num_threads);
    if (!output.know_grouped_rows) assign_grouped_rows(view, output, begin, next_row);
    deliver_grouped(shape, view, output, begin, num_threads);
}

}  // namespace hpc_moe
