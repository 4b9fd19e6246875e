// The launch-time shape of a kernel that moves rows: which warps of a block send, and which drain.
//
// Every block does both. Draining is limited by how fast instructions are issued, sending by the links: sharing an
// SM, each uses what the other leaves.
#pragma once

#include <cstdint>

namespace hpc_moe::cuda {

constexpr int kWarpsPerBlock = 16;
constexpr int kThreadsPerBlock = 32 * kWarpsPerBlock;
constexpr int kLastWarp = kWarpsPerBlock - 1;  // meets the peers, and raises the flags of rows sent by bulk copies
constexpr int kMinSendWarps = 1;
constexpr int kMaxSendWarps = 10;
constexpr int kBuffersPerWarp = 4;  // of a sending warp: two pieces of rows are loaded while two are stored
constexpr int kMaxPieceBytes = 8192;
constexpr int kBarrierBytes = 1024;          // at the start of shared memory: a load barrier for each buffer
constexpr int kMaxSharedBytes = 208 * 1024;  // of the 227 KiB of sm_90; the rest is for static shared memory

struct PipelineShape {
    int32_t num_send_warps;   // the first ones of a block
    int32_t num_drain_warps;  // the ones behind them
    int32_t pieces_per_row;   // that a sending warp moves at a time
    int32_t piece_bytes;      // of all pieces but the last, which may be shorter
    int32_t scale_bytes;      // that travel with the first piece, by bulk copies of their own
    int32_t buffer_bytes;     // for a piece and scales
};

// So many sending warps that, over all blocks, `bytes_in_flight` are being stored: fewer do not fill the links, more
// hold up everything else.
inline PipelineShape shape_pipeline(int row_bytes, int scale_bytes, int num_blocks, int bytes_in_flight,
                                    bool bulk_copies) {
    if (!bulk_copies) return {kWarpsPerBlock / 2, kWarpsPerBlock / 2, 1, row_bytes, 0, 0};
    PipelineShape shape;
    shape.pieces_per_row = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    const int even = (row_bytes + shape.pieces_per_row - 1) / shape.pieces_per_row;
    shape.piece_bytes = (even + 127) / 128 * 128;
    shape.scale_bytes = scale_bytes;
    shape.buffer_bytes = (shape.piece_bytes + shape.scale_bytes + 127) / 128 * 128;
    const int fits = (kMaxSharedBytes - kBarrierBytes) / (kBuffersPerWarp * shape.buffer_bytes);
    const int most = fits < kMaxSendWarps ? fits : kMaxSendWarps;
    const int stored = num_blocks * kBuffersPerWarp / 2 * shape.piece_bytes;
    const int wanted = (bytes_in_flight + stored - 1) / stored;
    shape.num_send_warps = wanted < kMinSendWarps ? kMinSendWarps : wanted > most ? most : wanted;
    shape.num_drain_warps = kWarpsPerBlock - 1 - shape.num_send_warps;
    return shape;
}

inline int shared_bytes(const PipelineShape& shape) {
    return kBarrierBytes + kBuffersPerWarp * shape.num_send_warps * shape.buffer_bytes;
}

}  // namespace hpc_moe::cuda
