// How rows of low-latency calls lie on the wire: in chunks of 1024 bytes, of which a warp moves one. A lane has up to
// two pieces of a chunk, 16 bytes each; piece i of lane l is at 512 * i + 16 * l. Two forms:
//
// - *Plain*: as in the row. A flag says that it has come.
// - *Tagged*: words of 16 bytes, 12 of the row and 4 that hold the call's epoch. A word is stored and loaded at once,
//   so whoever finds the epoch has the rest: no flag, no fence. Word i of lane l is at 512 * i + 16 * l.
//
// Scales lie behind the words: 8 of them (float32, or a byte each in UE8M0) belong to a chunk of e4m3.
#pragma once

#include "cuda/device/protocol.cuh"
#include "cuda/low_latency.h"

namespace hpc_moe::cuda {

constexpr int kPieces = 2;  // of a lane, in a chunk

// A lane's part of a chunk.
struct Pieces {
    uint4 of[kPieces];
};

// The same in words as they travel; a plain chunk has one less.
struct Words {
    uint4 of[kPieces + 1];
};

constexpr int kPieceStep = 512;  // bytes: a piece of each lane
constexpr int kScalesOfChunk = 8;

// How many pieces of a row's chunk there are, in any lane.
__device__ inline int count_pieces(int row_bytes, int chunk) {
    return min(kPieces, (row_bytes - chunk * kChunkBytes + kPieceStep - 1) / kPieceStep);
}

// Where, in a row, a lane's piece begins; past the row's end if the lane has none.
__device__ inline int piece_at(int chunk, int piece) {
    return chunk * kChunkBytes + piece * kPieceStep + 16 * static_cast<int>(threadIdx.x % 32);
}

__device__ inline Words to_words(const Pieces& pieces, uint32_t tag) {
    const uint4 &a = pieces.of[0], &b = pieces.of[1];
    return {{{a.x, a.y, a.z, tag}, {a.w, b.x, b.y, tag}, {b.z, b.w, 0, tag}}};
}

__device__ inline Pieces to_pieces(const Words& words) {
    const uint4 &a = words.of[0], &b = words.of[1], &c = words.of[2];
    return {{{a.x, a.y, a.z, b.x}, {b.y, b.z, c.x, c.y}}};
}

// All lanes: stores a chunk. `tag` 0: plain.
__device__ inline void store_chunk(uint8_t* to, const Pieces& pieces, int num_pieces, uint32_t tag) {
    const int at = 16 * (threadIdx.x % 32);
    if (tag == 0) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            if (i < num_pieces) store_16(to + i * kPieceStep + at, pieces.of[i]);
        }
        return;
    }
    const Words words = to_words(pieces, tag);
#pragma unroll
    for (int i = 0; i < kPieces + 1; ++i) {
        if (i <= num_pieces) store_relaxed_16(to + i * kPieceStep + at, words.of[i]);
    }
}

// All lanes: starts loading a chunk, if it is `wanted`.
__device__ inline void load_chunk(const uint8_t* from, int num_pieces, bool is_tagged, bool wanted, Words& words) {
    const int at = 16 * (threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kPieces + 1; ++i) {
        if (!wanted || i >= num_pieces + (is_tagged ? 1 : 0)) continue;
        words.of[i] = is_tagged ? load_relaxed_16(from + i * kPieceStep + at) : load_16(from + i * kPieceStep + at);
    }
}

// Whether all words of a tagged chunk have come.
__device__ inline bool is_complete(const Words& words, int num_pieces, uint32_t tag) {
    bool complete = true;
#pragma unroll
    for (int i = 0; i < kPieces + 1; ++i) complete &= i > num_pieces || words.of[i].w == tag;
    return complete;
}

__device__ inline Pieces pieces_of(const Words& words, bool is_tagged) {
    return is_tagged ? to_pieces(words) : Pieces{{words.of[0], words.of[1]}};
}

}  // namespace hpc_moe::cuda
