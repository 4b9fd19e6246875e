// bf16 in pairs, as rows hold it, and float32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace hpc_moe::cuda {

__device__ inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Each rounded once.
__device__ inline uint4 to_bf16(const float (&values)[8]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace hpc_moe::cuda
