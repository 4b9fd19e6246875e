// A packet: rows of one call on their way from one rank to another, in a window slot or in an MPI message.
//
// Layout: a header of 64 bytes (the number of rows, int64), then one array after the other, each 64-byte aligned and
// exactly as long as that many rows need: rows, scales, source token indices (int32), top-k expert indices (int64),
// top-k weights (float32), masks of local destination ranks (bits). Arrays that a call does not need have no bytes.
// Sender and receiver compute the same offsets from the same shape and row count.
#pragma once

#include <cstdint>
#include <cstring>

namespace hpc_moe {

// What one row of a packet consists of. Equal on all ranks of a call.
struct PacketShape {
    int64_t row_bytes = 0;    // one row of x
    int64_t scale_bytes = 0;  // its scales
    int64_t num_topk = 0;     // top-k expert indices, and weights where has_weights
    int64_t mask_bytes = 0;   // bits that say to which ranks of the node the row goes on
    bool has_source_index = false;
    bool has_topk_index = false;
    bool has_weights = false;
};

constexpr int64_t kPacketHeaderBytes = 64;

inline int64_t align_up(int64_t bytes, int64_t alignment = 64) {
    return (bytes + alignment - 1) / alignment * alignment;
}

// Where the arrays of a packet of `num_rows` rows lie.
class Packet {
   public:
    Packet(const PacketShape& shape, int64_t num_rows, uint8_t* base) : num_rows(num_rows) {
        auto take = [&](int64_t bytes_per_row) {
            uint8_t* array = base == nullptr ? nullptr : base + total_bytes;  // null: only the size is wanted
            total_bytes += align_up(bytes_per_row * num_rows);
            return array;
        };
        rows = take(shape.row_bytes);
        scales = take(shape.scale_bytes);
        source_index = reinterpret_cast<int32_t*>(take(shape.has_source_index ? 4 : 0));
        topk_index = reinterpret_cast<int64_t*>(take(shape.has_topk_index ? 8 * shape.num_topk : 0));
        topk_weights = reinterpret_cast<float*>(take(shape.has_weights ? 4 * shape.num_topk : 0));
        masks = take(shape.mask_bytes);
    }

    int64_t num_rows;
    uint8_t* rows;
    uint8_t* scales;
    int32_t* source_index;
    int64_t* topk_index;
    float* topk_weights;
    uint8_t* masks;
    int64_t total_bytes = kPacketHeaderBytes;
};

// Writes the header; the caller fills the arrays.
inline Packet begin_packet(const PacketShape& shape, int64_t num_rows, uint8_t* base) {
    std::memset(base, 0, kPacketHeaderBytes);
    std::memcpy(base, &num_rows, sizeof num_rows);
    return Packet(shape, num_rows, base);
}

inline int64_t packet_bytes(const PacketShape& shape, int64_t num_rows) {
    return Packet(shape, num_rows, nullptr).total_bytes;
}

// The most rows a packet of at most `bytes` bytes can carry.
inline int64_t packet_capacity(const PacketShape& shape, int64_t bytes) {
    int64_t low = 0, high = 1;
    if (packet_bytes(shape, 0) > bytes) return 0;
    while (packet_bytes(shape, high) <= bytes) high *= 2;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (packet_bytes(shape, middle) <= bytes ? low : high) = middle;
    }
    return low;
}

}  // namespace hpc_moe
