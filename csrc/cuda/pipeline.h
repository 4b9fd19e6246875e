// The launch-time shape of a kernel that moves rows: which warps of a block send, and which drain.
//
// Every block does both. Draining is limited by how fast instructions are issued, sending by the links: sharing an
// SM, each uses what the other leaves.
#pragma once

#include <cstdint>

namespace hpc_moe::cuda {

constexpr int kWarpsPerBlock = 16;
constexpr int kThreadsPerBlock = 32 * kWarpsPerBlock;
constexpr int kMinSendWarps = 3;
constexpr int kMaxSendWarps = 10;
constexpr int kMaxPieceBytes = 16384;
constexpr int kBarrierBytes = 1024;          // at the start of shared memory: two load barriers per sending warp
constexpr int kMaxSharedBytes = 216 * 1024;  // of the 227 KiB of sm_90; the rest is for static shared memory

struct PipelineShape {
    int32_t num_send_warps;  // the first ones of a block
    int32_t pieces_per_row;  // that a sending warp moves at a time
    int32_t piece_bytes;     // of all pieces but the last, which may be shorter; a warp has two buffers of this size
};

// So many sending warps that, over all blocks, `bytes_in_flight` are on their way: fewer do not fill the links, more
// hold up everything else.
inline PipelineShape shape_pipeline(int row_bytes, int num_blocks, int bytes_in_flight, bool bulk_copies) {
    PipelineShape shape;
    if (!bulk_copies) return {kWarpsPerBlock / 2, 1, row_bytes};
    shape.pieces_per_row = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    const int even = (row_bytes + shape.pieces_per_row - 1) / shape.pieces_per_row;
    shape.piece_bytes = (even + 127) / 128 * 128;
    const int fits = (kMaxSharedBytes - kBarrierBytes) / (2 * shape.piece_bytes);
    const int most = fits < kMaxSendWarps ? fits : kMaxSendWarps;
    const int wanted = (bytes_in_flight / num_blocks + shape.piece_bytes - 1) / shape.piece_bytes;
    shape.num_send_warps = wanted < kMinSendWarps ? kMinSendWarps : wanted > most ? most : wanted;
    return shape;
}

inline int shared_bytes(const PipelineShape& shape) {
    return kBarrierBytes + 2 * shape.num_send_warps * shape.piece_bytes;
}

}  // namespace hpc_moe::cuda
