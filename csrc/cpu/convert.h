// Casting rows for the low-latency mode: bf16 to fp8 with scales, and the logarithmic format.
#pragma once

#include <cstdint>

namespace hpc_moe {

// Channels that share a scale, in fp8 and in the logarithmic format.
constexpr int64_t kGroup = 128;

struct Fp8Cast {
    const uint16_t* x = nullptr;  // bf16 [num_rows, hidden]
    int64_t x_row_stride = 0;     // elements
    int64_t num_rows = 0, hidden = 0;
    bool round_scale = false;
    bool use_ue8m0 = false;  // with round_scale only
    uint8_t* q = nullptr;    // e4m3 [num_rows, hidden]
    void* scales = nullptr;  // float32 [num_rows, hidden / 128], or UE8M0: one byte each, [num_rows, hidden / 128]
};

// Per 128 channels: amax clamped at 1e-4, scale = amax / 448, q = saturate(x * (448 / amax)); with round_scale
// scale = 2^ceil(log2(amax / 448)), q = saturate(x / scale). A group with a NaN becomes NaN, scale included.
void cast_to_fp8(const Fp8Cast& cast, int num_threads);

// The logarithmic format, per group of 128 channels: the float32 pair (log_min, step), then 128 codes of 10 bits (a
// sign bit above 9 bits of log2 magnitude), little-endian bit order; code 0 is zero, code c stands for
// 2^(log_min + (c - 1) * step). Groups that do not fit (largest magnitude not below 1) carry a NaN step and 128 bf16.
//
// Encodes rows selection[0], selection[1], ... of bf16 x (null: the first `num_rows`), one after the other; returns the
// bytes written.
int64_t encode_logfmt(const uint16_t* x, int64_t x_row_stride, const int32_t* selection, int64_t num_rows,
                      int64_t hidden, uint8_t* target);

// The most bytes that encode_logfmt writes for a row.
int64_t logfmt_row_bytes_limit(int64_t hidden);

// Decodes rows to float32 [num_rows, hidden].
void decode_logfmt(const uint8_t* encoded, int64_t num_rows, int64_t hidden, float* rows);

}  // namespace hpc_moe
