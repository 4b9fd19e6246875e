// The launch-time shape of a kernel that moves rows: which warps of a block send, and which drain; and how fast it
// sends.
//
// Every block does both. Draining is limited by how fast instructions are issued, sending by the links: sharing an
// SM, each uses what the other leaves. But more than the links take must not be on its way to them: stores that wait
// for a link hold up all else that their SM has under way, and the links themselves get slower. So sending warps keep
// to a rate that together the links just take (docs/gpu.md has the measurements).
#pragma once

#include <cstdint>

namespace hpc_moe::cuda {

constexpr int kWarpsPerBlock = 16;
constexpr int kThreadsPerBlock = 32 * kWarpsPerBlock;
constexpr int kLastWarp = kWarpsPerBlock - 1;  // meets the peers, and raises the flags of rows sent by bulk copies
constexpr int kMaxSendWarps = 10;
constexpr int kBuffersPerWarp = 4;  // of a sending warp: two pieces of rows are loaded while two are stored
constexpr int kMaxPieceBytes = 8192;
constexpr int kBarrierBytes = 1024;          // at the start of shared memory: a load barrier for each buffer
constexpr int kMaxSharedBytes = 208 * 1024;  // of the 227 KiB of sm_90; the rest is for static shared memory

// Bytes per nanosecond that all links of a GPU together take: what rows pushed to a peer reach on an H200 (18 links of
// NVLink 4) before they pile up, a little less. NVLink 5 is twice as fast; not measured.
constexpr int kNvlink4Rate = 365;
constexpr int kNvlink5Rate = 2 * kNvlink4Rate;

struct PipelineShape {
    int32_t num_send_warps;   // the first ones of a block
    int32_t num_drain_warps;  // the ones behind them
    int32_t piece_bytes;      // that a sending warp moves at a time; a row's last piece may be shorter
    int32_t scale_bytes;      // that travel with the first piece, by bulk copies of their own
    int32_t buffer_bytes;     // for a piece and scales
    float pace;               // nanoseconds for a byte that leaves this GPU; 0: any
};

// `link_rate`: bytes per nanosecond (GB/s) that leave this GPU at most; 0: do not care. So many sending warps that,
// over all blocks, at least `bytes_in_flight` can be under way: one warp does not reach more than about 8 GB/s.
inline PipelineShape shape_pipeline(int row_bytes, int scale_bytes, int num_blocks, int bytes_in_flight, int link_rate,
                                    bool bulk_copies) {
    if (!bulk_copies) return {kWarpsPerBlock / 2, kWarpsPerBlock / 2, row_bytes, 0, 0, 0.0f};
    PipelineShape shape;
    const int num_pieces = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    const int even = (row_bytes + num_pieces - 1) / num_pieces;
    shape.piece_bytes = (even + 127) / 128 * 128;
    shape.scale_bytes = scale_bytes;
    shape.buffer_bytes = (shape.piece_bytes + shape.scale_bytes + 127) / 128 * 128;
    const int fits = (kMaxSharedBytes - kBarrierBytes) / (kBuffersPerWarp * shape.buffer_bytes);
    const int most = fits < kMaxSendWarps ? fits : kMaxSendWarps;
    const int of_a_warp = num_blocks * kBuffersPerWarp / 2 * shape.piece_bytes;
    const int wanted = (bytes_in_flight + of_a_warp - 1) / of_a_warp;
    shape.num_send_warps = wanted < 1 ? 1 : wanted > most ? most : wanted;
    shape.num_drain_warps = kLastWarp - shape.num_send_warps;
    shape.pace = link_rate > 0 ? 1.0f / link_rate : 0.0f;
    return shape;
}

inline int shared_bytes(const PipelineShape& shape) {
    return kBarrierBytes + kBuffersPerWarp * shape.num_send_warps * shape.buffer_bytes;
}

}  // namespace hpc_moe::cuda
