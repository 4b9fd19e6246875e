// Emulated ranks, and a round of calls on them: a dispatch and its combine.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/low_latency.h"

// What the command line says, as name=value.
struct Options {
    int ranks = 2, rounds = 10, seed = 1;
    int deaths = 0;       // 1: ranks are lost, masked, and come back
    int put_ranks = 0;    // a bit for each rank that others of these reach by puts
    int stress_seed = 0;  // stress builds: 0 for no pauses
    int mutation = 0;     // stress builds: the rule to break
    int fences = 1;       // 0: those between puts and signals do nothing
};

class Random {
   public:
    explicit Random(int seed) : generator_(static_cast<unsigned>(seed)) {}
    int below(int end) { return static_cast<int>(generator_() % static_cast<unsigned>(end)); }  // alike everywhere
    bool one_in(int n) { return below(n) == 0; }

   private:
    std::mt19937 generator_;
};

enum class Order { kWhole, kHalves, kTwoUnderWay };
enum class BadIndex { kNone, kUnknown, kTwice };

struct Round {
    int hidden, top_k, local_experts, max_tokens;
    bool fp8, round_scale, ue8m0, weighted, logfmt, may_mask;
    int64_t most_tagged_bytes;
    Order order;
    int rejecting = -1;     // the rank that rejects the dispatch
    bool mismatch = false;  // ranks call with different arguments
    BadIndex bad_index = BadIndex::kNone;

    bool is_refused() const { return rejecting >= 0 || mismatch; }
};

struct Rank {
    // As long as the rank lives.
    uint8_t* region = nullptr;
    hpc_moe::cuda::LocalState local{};
    hpc_moe::cuda::LowLatencyState state{};
    hpc_moe::cuda::HostRecord host{};
    // Of a round: tensors, as the parameters of the kernels name them. Those of bf16 hold its bits.
    int tokens = 0;
    std::vector<uint16_t> x, expert_rows, combined;
    std::vector<int64_t> topk_index, layout_range, wait_stats;
    std::vector<float> topk_weights, token_weights;
    std::vector<uint8_t> recv_rows;
    std::vector<uint32_t> recv_scales;
    std::vector<int32_t> recv_count, recv_src_idx, came_tokens, token_rows;
    hpc_moe::cuda::Arrivals arrivals;
    hpc_moe::cuda::LowLatencyDispatchParams dispatch;
    hpc_moe::cuda::LowLatencyCombineParams combine;
};

constexpr size_t kRegionBytes = 1 << 30;  // of which few are ever touched
constexpr int kGuard = 8;                 // channels behind `combined` that nobody may write
constexpr uint16_t kUntouchedBf16 = 0x7fff;
constexpr int kUntouched = -7;

struct World {
    Options options;
    int num_blocks;
    Round round;
    int dead = -1;  // the rank that takes no part
    std::vector<std::unique_ptr<Rank>> ranks;

    int size() const { return static_cast<int>(ranks.size()); }
};

// Draws a round: its sizes, who lives, and what each rank has.
void draw_round(World& world, Random& random);

// What is wrong after a round: how often, by what it is.
std::map<std::string, int64_t> find_wrong(World& world);
