// bf16 to e4m3, in groups of 128 channels with a scale each: the formulas of hpc_moe/fp8.py, with IEEE division.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/device/bf16.cuh"

namespace hpc_moe::cuda {

constexpr float kFp8Max = 448.0f;
constexpr float kFp8MinAmax = 1e-4f;

// 2^ceil(log2(value)) for a positive normal value.
__device__ inline float power_of_two_above(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffu) == 0 || bits >= 0x7f800000u) return value;
    return __uint_as_float((bits & 0x7f800000u) + 0x800000u);
}

// Eight neighbouring lanes share a group, 16 channels each: the largest magnitude (a NaN wins) as a float.
__device__ inline float amax_of_group(const uint4 (&x)[2]) {
    const uint32_t words[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        largest = max(largest, max((words[i] << 16) & 0x7fff0000u, words[i] & 0x7fff0000u));
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    return __uint_as_float(largest);
}

// The 16 channels of a lane in e4m3, and the group's scale.
__device__ inline uint4 cast_group(const uint4 (&x)[2], bool round_scale, float& scale) {
    float amax = amax_of_group(x);
    if (amax < kFp8MinAmax) amax = kFp8MinAmax;
    scale = __fdiv_rn(amax, kFp8Max);
    if (round_scale) scale = power_of_two_above(scale);
    // Dividing by a power of two and multiplying by its reciprocal give the same bits.
    const float factor = __fdiv_rn(round_scale ? 1.0f : kFp8Max, round_scale ? scale : amax);
    const uint32_t words[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
    uint32_t result[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t packed = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = words[2 * i + half];
            const float2 values = {__fmul_rn(low_bf16(pair), factor), __fmul_rn(high_bf16(pair), factor)};
            const __nv_fp8x2_storage_t q = __nv_cvt_float2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3);
            packed |= static_cast<uint32_t>(q) << (16 * half);
        }
        result[i] = packed;
    }
    return make_uint4(result[0], result[1], result[2], result[3]);
}

}  // namespace hpc_moe::cuda
