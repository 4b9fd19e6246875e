// The logarithmic wire format of low-latency combine: hpc_moe/testing/logfmt.py, in a layout that suits warps.
//
// A group is 128 channels, in 16 neighbouring lanes with 8 channels (16 bytes of bf16) each. It travels as 10 bits a
// channel: a sign above 9 bits of log2 magnitude. Code 0 is zero, code c is 2^(log_min + (c - 1) * step). A group with
// a magnitude of 1 or more, or with a NaN, travels as bf16.
//
// A row on the wire, for a row of bf16 of row_bytes = 2 * hidden bytes:
//
//   offset                      bytes  of
//   256 * group                   256  a group as bf16, 16 bytes a lane, as in the row of bf16; or, if it is encoded:
//   256 * group                   128  the low 8 bits of the codes, 8 bytes a lane
//   256 * group + 128              32  bit 8 of the codes, then the signs, a byte of each a lane
//   256 * group + 160              96  nothing; neither written nor read
//   row_bytes + 8 * group           8  the header: float32 log_min and step; step is NaN where the group is bf16
//
// and up to a multiple of 16 bytes nothing (log_row_bytes). So an encoded group moves 168 bytes, one of bf16 264.
// Headers come last so that groups stay aligned. The CPU runtime has a packed layout; the two never meet.
//
// What is equal to the reference. There is no function of a mathematical library here, for exp2f and log2f differ
// between GPU and CPU; only integers and IEEE operations of float64 and float32, whose multiply-adds are written out,
// so that no compiler may choose. Hence a GPU and the host have the same bits, and against the reference, which has
// float64 logarithms:
//
// - whether a group is encoded, log_min and step: equal, bit for bit, for every pair of magnitudes.
// - codes: equal, but where the logarithm of a value lies within 2^-31 of that of the middle between two codes. There
//   the other neighbour may be chosen, whose error is the same but for one part in 2^31 of the value. Of 3 * 10^9
//   random channels, 7 were such.
// - decoded values, from the same header and code: the same real number, here with a relative error below 2^-50, then
//   rounded to float32, denormal results included. So they are equal, bit for bit, but where that number lies so close
//   to the middle between two floats (2^-26 of their distance) that float64 cannot tell; then they may differ by one
//   unit in the last place. Of 2 * 10^8 random values, none did.
//
// So errors stay within LogFormat.error_bound(), and its slack for float32 logarithms is not needed. The CPU runtime
// does need it: it computes in float32, and its values differ from the reference's, and from these, by up to 2^-16 of
// the value, and by a code more often.
//
// float64 has half the speed of float32 on sm_80, sm_90 and sm_100 (but far less on some of their relatives, where this
// is slow). A lane takes 24 float64 operations and 8 look-ups to encode its 8 channels, and 15 and 2 for its group; 88
// operations to decode them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// The tests compile this file without CUDA, too.
#ifdef __CUDACC__
#define HPC_MOE_HOST_DEVICE __host__ __device__
#else
#define HPC_MOE_HOST_DEVICE
#endif
#ifdef __CUDA_ARCH__
#define HPC_MOE_UNROLL _Pragma("unroll")
#else
#define HPC_MOE_UNROLL
#endif

namespace hpc_moe::cuda {

// --- the layout; `at` is where a lane's 16 bytes lie in a row of bf16, and where they lie here if the group is bf16

constexpr int kLogGroupBytes = 256;

struct alignas(8) LogHeader {
    float log_min;
    float step;
};

HPC_MOE_HOST_DEVICE constexpr int log_row_bytes(int row_bytes) {
    return row_bytes + (row_bytes / kLogGroupBytes * static_cast<int>(sizeof(LogHeader)) + 15) / 16 * 16;
}

HPC_MOE_HOST_DEVICE constexpr int log_header_at(int row_bytes, int at) {
    return row_bytes + at / kLogGroupBytes * static_cast<int>(sizeof(LogHeader));
}

HPC_MOE_HOST_DEVICE constexpr int log_low_at(int at) {
    return at / kLogGroupBytes * kLogGroupBytes + at % kLogGroupBytes / 2;
}

HPC_MOE_HOST_DEVICE constexpr int log_high_at(int at) {
    return at / kLogGroupBytes * kLogGroupBytes + 128 + at % kLogGroupBytes / 8;
}

// The 8 codes of a lane.
struct LogLane {
    uint32_t low[2];  // byte i: the low 8 bits of code i
    uint16_t high;    // bit i: bit 8 of code i; bit 8 + i: its sign
};

// --- bits

// The same bits as another type of the same size.
template <typename To, typename From>
HPC_MOE_HOST_DEVICE inline To log_bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// --- the magnitudes of a group: bits of bf16 without the sign, which compare like what they stand for

constexpr uint32_t kLogOne = 0x3f80;  // 1.0

// The largest magnitude in the upper half, and in the lower one 0x8000 less the smallest that is not zero (0: all are
// zero): of both halves, the maximum counts, and zeros change nothing.
using LogRange = uint32_t;

HPC_MOE_HOST_DEVICE inline uint32_t max_of_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __vmaxu2(a, b);
#else
    const uint32_t upper = a >> 16 > b >> 16 ? a : b, lower = (a & 0xffffu) > (b & 0xffffu) ? a : b;
    return (upper & 0xffff0000u) | (lower & 0xffffu);
#endif
}

// Of a lane's 8 channels.
HPC_MOE_HOST_DEVICE inline LogRange log_range(const uint32_t (&x)[4]) {
    uint32_t largest = 0, smallest = 0;  // in each half
    HPC_MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = x[i] & 0x7fff7fffu;
        largest = max_of_halves(largest, pair);
        smallest = max_of_halves(smallest, (0x80008000u - pair) & 0x7fff7fffu);
    }
    return max_of_halves((largest & 0xffff0000u) | (smallest & 0xffffu), largest << 16 | smallest >> 16);
}

HPC_MOE_HOST_DEVICE inline bool is_encoded(LogRange range) { return range >> 16 < kLogOne; }
HPC_MOE_HOST_DEVICE inline bool is_encoded(const LogHeader& header) { return header.step == header.step; }

// --- logarithms of magnitudes

// Of the 128 mantissas 1 + m / 128 that a bf16 may have, computed by the compiler: log2(1 + x) = 2 / ln2 * artanh(s)
// with s = x / (2 + x), whose series ends where s^40 is lost in float64.
struct MantissaLogs {
    double exact[128];
    uint32_t rounded[128];  // in units of 2^-32

    constexpr MantissaLogs() : exact(), rounded() {
        for (int m = 0; m < 128; ++m) {
            const double s = m / (256.0 + m);
            double sum = 0.0;
            for (int i = 39; i > 0; i -= 2) sum = sum * (s * s) + 1.0 / i;
            exact[m] = 0x1.71547652b82fep+1 * s * sum;
            rounded[m] = static_cast<uint32_t>(exact[m] * 0x1p32 + 0.5);
        }
    }
};

#ifdef __CUDACC__
static __device__ constexpr MantissaLogs kMantissaLogsOnDevice{};
#endif
constexpr MantissaLogs kMantissaLogs{};

HPC_MOE_HOST_DEVICE inline const MantissaLogs& mantissa_logs() {
#ifdef __CUDA_ARCH__
    return kMantissaLogsOnDevice;
#else
    return kMantissaLogs;
#endif
}

struct LogParts {
    int exponent;  // zero has a very small one
    int mantissa;
};

HPC_MOE_HOST_DEVICE inline LogParts log_parts(uint32_t magnitude) {
    const bool is_normal = magnitude >= 0x80;  // else it is magnitude * 2^-133
    const uint32_t bits = is_normal ? magnitude << 16 : log_bits_as<uint32_t>(static_cast<float>(magnitude));
    return {static_cast<int>(bits >> 23) - (is_normal ? 127 : 127 + 133), static_cast<int>(bits >> 16 & 0x7fu)};
}

HPC_MOE_HOST_DEVICE inline double exact_log2(uint32_t magnitude) {
    const LogParts parts = log_parts(magnitude);
    return parts.exponent + mantissa_logs().exact[parts.mantissa];
}

// In units of 2^-32, and as a double whose last bit is one such unit: kLogUnits + log2(magnitude) * 2^32.
constexpr double kLogUnits = 0x1.8p52;

HPC_MOE_HOST_DEVICE inline double rounded_log2(uint32_t magnitude) {
    const LogParts parts = log_parts(magnitude);
    const uint32_t upper = 0x43380000u + static_cast<uint32_t>(parts.exponent);  // of kLogUnits, and the exponent
    return log_bits_as<double>(static_cast<uint64_t>(upper) << 32 | mantissa_logs().rounded[parts.mantissa]);
}

// --- encoding

constexpr int kLogLargestCode = 511;
constexpr double kLogMaxRange = 32.0;  // powers of two

HPC_MOE_HOST_DEVICE inline LogHeader log_header(LogRange range) {
    if (!is_encoded(range)) return {0.0f, log_bits_as<float>(0x7fc00000u)};
    if (range == 0) return {0.0f, 0.0f};
    const double log_max = exact_log2(range >> 16);
    const double smallest = exact_log2(0x8000u - (range & 0xffffu)), lowest = log_max - kLogMaxRange;
    const double log_min = smallest > lowest ? smallest : lowest;
    return {static_cast<float>(log_min), static_cast<float>((log_max - log_min) * (1.0 / (kLogLargestCode - 1)))};
}

// How the values of a group that is encoded become codes. Logarithms are as of rounded_log2.
struct LogEncoder {
    double base;  // of code 1, moved so that the nearer logarithm is that of the code nearer in linear space
    double zero;  // up to here, zero is nearer than code 1
    double codes_per_unit;
};

// The middle between the values of two codes has the logarithm log2((1 + 2^step) / 2) above the lower code, which is
// step / 2 and a little more: log2(cosh(step * ln2 / 2)), here the first two terms of its series, less 2^-37.
HPC_MOE_HOST_DEVICE inline LogEncoder log_encoder(const LogHeader& header) {
    const double step = header.step, square = step * step;
    const double more = fma(square, -0x1.c6b08d704a0cp-10, 0x1.62e42fefa39efp-4);  // ln2^3 / 192 and ln2 / 8
    const double base = fma(square, more, static_cast<double>(header.log_min));
    double inverse = 0.0;
    if (header.step > 0.0f) {  // a float is not enough; Newton's method doubles its digits
        inverse = 1.0f / header.step;
        inverse = fma(fma(-step, inverse, 1.0), inverse, inverse);
    }
    // The first sum rounds to a multiple of 2^-32; the second one is exact.
    return {kLogUnits + base * 0x1p32, kLogUnits + (header.log_min - 1.0) * 0x1p32, inverse * 0x1p-32};
}

// The 10 bits of a bf16. Between zero and code 1 the nearer one, by their exact middle 2^(log_min - 1), else the
// nearest code of 1 to 511: with codes_per_unit == 0, that is, one magnitude, code 1.
HPC_MOE_HOST_DEVICE inline uint32_t encode_channel(uint32_t bf16, const LogEncoder& encoder) {
    const double log = rounded_log2(bf16 & 0x7fffu);
    // Added to 2^52 and more, the number of the code is rounded, and stands in the last bits.
    const double number = fma(log - encoder.base, encoder.codes_per_unit, 0x1.8p52 + 1.0);
    const int nearest = static_cast<int>(static_cast<uint32_t>(log_bits_as<uint64_t>(number)));
    const int code = nearest < 1 ? 1 : nearest > kLogLargestCode ? kLogLargestCode : nearest;
    return (log <= encoder.zero ? 0u : static_cast<uint32_t>(code)) | (bf16 >> 6 & 0x200u);
}

HPC_MOE_HOST_DEVICE inline LogLane encode_lane(const uint32_t (&x)[4], const LogEncoder& encoder) {
    uint32_t low[2] = {0, 0}, high = 0;
    HPC_MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const uint32_t code = encode_channel(x[i / 2] >> 16 * (i % 2) & 0xffffu, encoder);
        low[i / 4] |= (code & 0xffu) << 8 * (i % 4);
        high |= (code >> 8 & 1u) << i | code >> 9 << (8 + i);
    }
    return {{low[0], low[1]}, static_cast<uint16_t>(high)};
}

// --- decoding

// log_min and step of a group that is encoded, in units of 2^-40: a float step is at least log2(255 / 254) / 510, and
// log_min at most log2(255 / 256), so this is exact.
struct LogDecoder {
    int64_t log_min;
    int64_t step;
};

HPC_MOE_HOST_DEVICE inline LogDecoder log_decoder(const LogHeader& header) {
    return {static_cast<int64_t>(header.log_min * 0x1p40f), static_cast<int64_t>(header.step * 0x1p40f)};
}

// 2^x for x in [0, 1), with a relative error below 2^-51: 1 + x * P(x), P of the least largest error.
HPC_MOE_HOST_DEVICE inline double exp2_of_fraction(double x) {
    double p = 0x1.55600f50584d7p-27;
    p = fma(p, x, 0x1.96b7eac8b940fp-24);
    p = fma(p, x, 0x1.654f20ab05b9ep-20);
    p = fma(p, x, 0x1.ff88a84e40185p-17);
    p = fma(p, x, 0x1.430b4592de875p-13);
    p = fma(p, x, 0x1.5d87e7259d8e3p-10);
    p = fma(p, x, 0x1.3b2ab793d621ap-7);
    p = fma(p, x, 0x1.c6b08d6bdbd96p-5);
    p = fma(p, x, 0x1.ebfbdff83c95bp-3);
    p = fma(p, x, 0x1.62e42fefa38a8p-1);
    return fma(p, x, 1.0);
}

// The value of 10 bits.
HPC_MOE_HOST_DEVICE inline float decode_channel(uint32_t code, const LogDecoder& decoder) {
    const bool is_zero = (code & 0x1ffu) == 0;
    const uint32_t steps = is_zero ? 0 : (code & 0x1ffu) - 1;
    const int64_t log = decoder.log_min + static_cast<int64_t>(steps) * decoder.step;
    const uint64_t fraction = static_cast<uint64_t>(log) << 24 >> 12;  // as a mantissa
    const double mantissa = exp2_of_fraction(log_bits_as<double>(0x3ff0000000000000u | fraction) - 1.0);
    const uint64_t exponent = static_cast<uint64_t>(log >> 40) << 52;
    const float magnitude = static_cast<float>(log_bits_as<double>(log_bits_as<uint64_t>(mantissa) + exponent));
    return log_bits_as<float>((is_zero ? 0u : log_bits_as<uint32_t>(magnitude)) | (code & 0x200u) << 22);
}

HPC_MOE_HOST_DEVICE inline void decode_lane(const LogLane& lane, const LogDecoder& decoder, float (&values)[8]) {
    const uint32_t high = lane.high;
    HPC_MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const uint32_t code = lane.low[i / 4] >> 8 * (i % 4) & 0xffu;
        values[i] = decode_channel(code | (high >> i & 1u) << 8 | (high >> (8 + i) & 1u) << 9, decoder);
    }
}

// --- warps

#if defined(__CUDACC__) || defined(HPC_MOE_EMULATION)

// Of the group of 16 neighbouring lanes that this lane belongs to. All 32 lanes call it; lanes beyond the row, which
// are whole groups, with zeros.
__device__ inline LogRange log_range_of_group(const uint32_t (&x)[4]) {
    LogRange range = log_range(x);
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
        range = max_of_halves(range, __shfl_xor_sync(~0u, range, step));
    }
    return range;
}

#endif

}  // namespace hpc_moe::cuda
