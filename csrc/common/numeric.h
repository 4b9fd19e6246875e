// Conversions between float32 and the narrow formats that travel: bf16, e4m3 (fp8) and UE8M0.
//
// All are branch-free, so that loops over them vectorise, and all round to nearest even, as IEEE 754 does. The file is
// compiled without fast-math: what a sender casts must be the same bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>

// Functions so marked are compiled once per instruction set and chosen at load time, so that one build runs on the
// login node and uses the wide vectors of the compute node. Levels, not single extensions: the loops want the byte and
// word forms too (AVX-512BW), and "arch=" with a vendor's name would never match another vendor's processor. Sanitizers
// cannot run in the resolvers that this needs.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(HPC_MOE_SANITIZE)
#if __GNUC__ >= 12
#define HPC_MOE_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HPC_MOE_MULTIVERSION __attribute__((target_clones("default", "avx2")))
#endif
#else
#define HPC_MOE_MULTIVERSION
#endif

namespace hpc_moe {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bf16_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could turn a NaN into an infinity
    return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// Largest finite e4m3 value.
constexpr float kFp8Max = 448.0f;

// Saturating: values beyond +-448, infinities included, become +-448. NaN stays NaN.
inline uint8_t float_to_e4m3(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 24) & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    const bool is_nan = magnitude > 0x7f800000u;
    const uint32_t largest = float_bits(kFp8Max);
    magnitude = magnitude > largest ? largest : magnitude;
    // Normal numbers (from 2^-6): keep 3 of 23 mantissa bits, and move the exponent's bias from 127 to 7.
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    // Subnormal numbers are multiples of 2^-9, which is the spacing of floats from 2^14 on: the addition rounds.
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 16384.0f) - float_bits(16384.0f);
    const uint32_t finite = magnitude < float_bits(0x1p-6f) ? subnormal : normal;
    return static_cast<uint8_t>(sign | (is_nan ? 0x7fu : finite));
}

}  // namespace hpc_moe
