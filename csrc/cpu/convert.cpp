#include "convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/numeric.h"

namespace hpc_moe {

namespace {

// Magnitudes compare like their bits; a NaN is above everything, so it wins.
HPC_MOE_MULTIVERSION uint32_t largest_magnitude_bits(const uint16_t* x) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kGroup; ++i) largest = std::max<uint32_t>(largest, x[i] & 0x7fffu);
    return largest << 16;
}

HPC_MOE_MULTIVERSION void multiply_to_e4m3(const uint16_t* x, float factor, uint8_t* q) {
    for (int64_t i = 0; i < kGroup; ++i) q[i] = float_to_e4m3(bf16_to_float(x[i]) * factor);
}

HPC_MOE_MULTIVERSION void divide_to_e4m3(const uint16_t* x, float divisor, uint8_t* q) {
    for (int64_t i = 0; i < kGroup; ++i) q[i] = float_to_e4m3(bf16_to_float(x[i]) / divisor);
}

// 2^ceil(log2(value)) for a positive normal value: exact, unlike a logarithm in floating point.
float power_of_two_above(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffu) == 0 || bits >= 0x7f800000u) return value;
    return bits_float((bits & 0x7f800000u) + 0x800000u);
}

void cast_group(const Fp8Cast& cast, int64_t row, int64_t group) {
    const uint16_t* x = cast.x + row * cast.x_row_stride + group * kGroup;
    uint8_t* q = cast.q + row * cast.hidden + group * kGroup;
    float amax = bits_float(largest_magnitude_bits(x));
    if (amax < 1e-4f) amax = 1e-4f;
    float scale = amax / kFp8Max;
    if (cast.round_scale) {
        scale = power_of_two_above(scale);
        divide_to_e4m3(x, scale, q);
    } else {
        multiply_to_e4m3(x, kFp8Max / amax, q);
    }
    const int64_t at = row * (cast.hidden / kGroup) + group;
    if (cast.use_ue8m0) {
        static_cast<uint8_t*>(cast.scales)[at] = static_cast<uint8_t>(float_bits(scale) >> 23);
    } else {
        static_cast<float*>(cast.scales)[at] = scale;
    }
}

constexpr int64_t kCodeBits = 10;
constexpr int64_t kCodesBytes = kGroup * kCodeBits / 8;
constexpr int kLargestCode = 511;
constexpr float kDynamicRange = 32.0f;  // powers of two
constexpr int64_t kGroupHeaderBytes = 2 * sizeof(float);

float code_value(int code, float log_min, float step) {
    return code == 0 ? 0.0f : std::exp2(log_min + static_cast<float>(code - 1) * step);
}

// The code whose value is nearest to `magnitude`, in linear space.
int nearest_code(float magnitude, float log_min, float step) {
    if (magnitude == 0.0f) return 0;
    int below = 0;
    if (magnitude >= std::exp2(log_min)) {
        if (step == 0.0f) return 1;
        below = 1 + static_cast<int>((std::log2(magnitude) - log_min) / step);
        below = std::clamp(below, 1, kLargestCode);
        if (below == kLargestCode) return below;
    }
    const float under = magnitude - code_value(below, log_min, step);
    const float over = code_value(below + 1, log_min, step) - magnitude;
    return under <= over ? below : below + 1;
}

void encode_codes(const uint16_t* x, float log_min, float step, uint8_t* target) {
    std::memset(target, 0, kCodesBytes);
    for (int64_t i = 0; i < kGroup; ++i) {
        const uint32_t code =
            static_cast<uint32_t>(nearest_code(bf16_to_float(x[i] & 0x7fffu), log_min, step)) | (x[i] >> 15) << 9;
        const int64_t bit = i * kCodeBits;
        const uint32_t shifted = code << (bit % 8);  // at most 16 bits: ten and a shift of up to six
        target[bit / 8] |= static_cast<uint8_t>(shifted);
        target[bit / 8 + 1] |= static_cast<uint8_t>(shifted >> 8);
    }
}

uint8_t* encode_group(const uint16_t* x, uint8_t* target) {
    float largest = 0.0f, smallest = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < kGroup; ++i) {
        const float magnitude = bf16_to_float(x[i] & 0x7fffu);
        if (!(magnitude < 1.0f)) {  // NaN too
            const float header[2] = {0.0f, std::numeric_limits<float>::quiet_NaN()};
            std::memcpy(target, header, sizeof header);
            std::memcpy(target + kGroupHeaderBytes, x, kGroup * 2);
            return target + kGroupHeaderBytes + kGroup * 2;
        }
        largest = std::max(largest, magnitude);
        if (magnitude > 0.0f) smallest = std::min(smallest, magnitude);
    }
    float header[2] = {0.0f, 0.0f};
    if (largest > 0.0f) {
        const float log_max = std::log2(largest);
        header[0] = std::max(std::log2(smallest), log_max - kDynamicRange);
        header[1] = (log_max - header[0]) / static_cast<float>(kLargestCode - 1);
    }
    std::memcpy(target, header, sizeof header);
    encode_codes(x, header[0], header[1], target + kGroupHeaderBytes);
    return target + kGroupHeaderBytes + kCodesBytes;
}

const uint8_t* decode_group(const uint8_t* encoded, float* values) {
    float header[2];
    std::memcpy(header, encoded, sizeof header);
    encoded += kGroupHeaderBytes;
    if (std::isnan(header[1])) {
        for (int64_t i = 0; i < kGroup; ++i) {
            uint16_t value;
            std::memcpy(&value, encoded + 2 * i, sizeof value);
            values[i] = bf16_to_float(value);
        }
        return encoded + kGroup * 2;
    }
    for (int64_t i = 0; i < kGroup; ++i) {
        const int64_t bit = i * kCodeBits;
        const uint32_t pair = encoded[bit / 8] | static_cast<uint32_t>(encoded[bit / 8 + 1]) << 8;
        const uint32_t code = pair >> (bit % 8);
        const float magnitude = code_value(static_cast<int>(code & 0x1ffu), header[0], header[1]);
        values[i] = code >> 9 & 1u ? -magnitude : magnitude;
    }
    return encoded + kCodesBytes;
}

}  // namespace

void cast_to_fp8(const Fp8Cast& cast, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && cast.num_rows > 8)
    for (int64_t row = 0; row < cast.num_rows; ++row) {
        for (int64_t group = 0; group < cast.hidden / kGroup; ++group) cast_group(cast, row, group);
    }
}

int64_t logfmt_row_bytes_limit(int64_t hidden) { return hidden / kGroup * (kGroupHeaderBytes + kGroup * 2); }

int64_t encode_logfmt(const uint16_t* x, int64_t x_row_stride, const int32_t* selection, int64_t num_rows,
                      int64_t hidden, uint8_t* target) {
    uint8_t* next = target;
    for (int64_t row = 0; row < num_rows; ++row) {
        const uint16_t* values = x + (selection ? selection[row] : row) * x_row_stride;
        for (int64_t group = 0; group < hidden / kGroup; ++group) next = encode_group(values + group * kGroup, next);
    }
    return next - target;
}

void decode_logfmt(const uint8_t* encoded, int64_t num_rows, int64_t hidden, float* rows) {
    for (int64_t group = 0; group < num_rows * (hidden / kGroup); ++group) {
        encoded = decode_group(encoded, rows + group * kGroup);
    }
}

}  // namespace hpc_moe
