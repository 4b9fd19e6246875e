// csrc/cuda/device/logfmt.cuh for tests/test_logfmt_device.py: on the host, lane by lane, in a library for ctypes.
// nvcc compiles it, too (-x cu), and then the kernel below as well, which is never run.
#include "cuda/device/logfmt.cuh"

#include <cstdint>
#include <cstring>

namespace hc = hpc_moe::cuda;

namespace {

void load_lane(const uint16_t* row, int at, uint32_t (&x)[4]) {
    std::memcpy(x, reinterpret_cast<const uint8_t*>(row) + at, sizeof x);
}

hc::LogRange range_of_group(const uint16_t* row, int at) {
    hc::LogRange range = 0;
    for (int lane = at; lane < at + hc::kLogGroupBytes; lane += 16) {
        uint32_t x[4];
        load_lane(row, lane, x);
        range = hc::max_of_halves(range, hc::log_range(x));
    }
    return range;
}

// Through pointers of the types that a GPU would use, so that a sanitizer sees what is not aligned.
template <typename T>
void put(uint8_t* row, int at, T value) {
    *reinterpret_cast<T*>(row + at) = value;
}

template <typename T>
T get(const uint8_t* row, int at) {
    return *reinterpret_cast<const T*>(row + at);
}

}  // namespace

extern "C" {

int row_bytes(int hidden) { return hc::log_row_bytes(2 * hidden); }

// x [hidden] bf16.
void write_row(const uint16_t* x, int hidden, uint8_t* row) {
    for (int at = 0; at < 2 * hidden; at += 16) {
        uint32_t words[4];
        load_lane(x, at, words);
        const hc::LogRange range = range_of_group(x, at / hc::kLogGroupBytes * hc::kLogGroupBytes);
        const hc::LogHeader header = hc::log_header(range);
        if (at % hc::kLogGroupBytes == 0) put(row, hc::log_header_at(2 * hidden, at), header);
        if (!hc::is_encoded(range)) {
            std::memcpy(row + at, words, sizeof words);
            continue;
        }
        const hc::LogLane lane = hc::encode_lane(words, hc::log_encoder(header));
        put(row, hc::log_low_at(at), lane.low[0] | static_cast<uint64_t>(lane.low[1]) << 32);
        put(row, hc::log_high_at(at), lane.high);
    }
}

// values [hidden].
void read_row(const uint8_t* row, int hidden, float* values) {
    for (int at = 0; at < 2 * hidden; at += 16) {
        const auto header = get<hc::LogHeader>(row, hc::log_header_at(2 * hidden, at));
        float lane_values[8];
        if (hc::is_encoded(header)) {
            const auto low = get<uint64_t>(row, hc::log_low_at(at));
            const hc::LogLane lane = {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32)},
                                      get<uint16_t>(row, hc::log_high_at(at))};
            hc::decode_lane(lane, hc::log_decoder(header), lane_values);
        } else {
            for (int i = 0; i < 8; ++i) lane_values[i] = hc::log_bits_as<float>(get<uint16_t>(row, at + 2 * i) << 16);
        }
        std::memcpy(values + at / 2, lane_values, sizeof lane_values);
    }
}

// x [num_groups, 128] bf16, headers [num_groups, 2], codes [num_groups, 128]: 10 bits each, -1 in groups that are bf16.
void encode(const uint16_t* x, int64_t num_groups, float* headers, int32_t* codes) {
    for (int64_t group = 0; group < num_groups; ++group, x += 128, headers += 2, codes += 128) {
        const hc::LogHeader header = hc::log_header(range_of_group(x, 0));
        const hc::LogEncoder encoder = hc::log_encoder(header);
        std::memcpy(headers, &header, sizeof header);
        for (int i = 0; i < 128; ++i) {
            codes[i] = hc::is_encoded(header) ? static_cast<int32_t>(hc::encode_channel(x[i], encoder)) : -1;
        }
    }
}

// values [num_headers, 1024], of all codes.
void decode(const float* headers, int64_t num_headers, float* values) {
    for (int64_t i = 0; i < num_headers; ++i, headers += 2, values += 1024) {
        const hc::LogDecoder decoder = hc::log_decoder({headers[0], headers[1]});
        for (uint32_t code = 0; code < 1024; ++code) values[code] = hc::decode_channel(code, decoder);
    }
}

// Of all pairs of magnitudes below 1, those whose header is another than what comes of `logs` [0x3f80], by bits of
// bf16.
int64_t wrong_headers(const double* logs, int64_t* num_pairs) {
    int64_t wrong = 0;
    *num_pairs = 0;
    for (uint32_t largest = 1; largest < 0x3f80; ++largest) {
        for (uint32_t smallest = 1; smallest <= largest; ++smallest, ++*num_pairs) {
            const hc::LogHeader header = hc::log_header(largest << 16 | (0x8000u - smallest));
            const double lowest = logs[largest] - 32.0;
            const double log_min = logs[smallest] > lowest ? logs[smallest] : lowest;
            const float step = static_cast<float>((logs[largest] - log_min) / 510.0);
            wrong += header.log_min != static_cast<float>(log_min) || header.step != step;
        }
    }
    return wrong;
}

}  // extern "C"

#ifdef __CUDACC__
__global__ void encode_and_decode(const uint4* x, uint32_t* lanes, float* values) {
    const uint4 mine = x[threadIdx.x];
    const uint32_t words[4] = {mine.x, mine.y, mine.z, mine.w};
    const hc::LogHeader header = hc::log_header(hc::log_range_of_group(words));
    const hc::LogLane lane = hc::encode_lane(words, hc::log_encoder(header));
    lanes[threadIdx.x] = lane.low[0] ^ lane.low[1] ^ lane.high;
    float decoded[8];
    hc::decode_lane(lane, hc::log_decoder(header), decoded);
    for (int i = 0; i < 8; ++i) values[8 * threadIdx.x + i] = decoded[i];
}
#endif
