// What a round is, at random.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "common/numeric.h"
#include "world.h"

using namespace hpc_moe::cuda;

namespace {

// In steps of 1 / `steps`, up to 2000 of them.
uint16_t draw_bf16(Random& random, float steps) {
    return hpc_moe::float_to_bf16(static_cast<float>(random.below(4001) - 2000) / steps);
}

Round draw_shape(const World& world, Random& random) {
    Round round{};
    round.hidden = 128 * (1 + random.below(random.below(2) ? 3 : 30));
    round.top_k = 1 + random.below(random.below(2) ? 4 : 16);
    round.local_experts = 1 + random.below(6) + (round.top_k + world.size() - 1) / world.size();
    round.max_tokens = 1 + random.below(random.below(3) ? 8 : 70);
    round.fp8 = random.below(2);
    round.round_scale = random.below(2);
    round.ue8m0 = round.fp8 && round.round_scale && random.below(2);
    if (round.ue8m0) round.hidden = (round.hidden + 511) / 512 * 512;
    round.weighted = random.below(2);
    round.most_tagged_bytes = random.one_in(3)  ? 0
                              : random.below(2) ? kMostTaggedBytes[random.below(kNumLowLatencyKinds)]
                                                : random.below(200000);
    const Order orders[] = {Order::kWhole, Order::kWhole, Order::kHalves, Order::kTwoUnderWay};
    round.order = orders[random.below(4)];
    round.logfmt = random.one_in(3);
    round.may_mask = world.options.deaths || random.below(2);
    if (world.options.deaths) return round;
    if (random.one_in(12)) {
        round.rejecting = random.below(world.size());
    } else if (world.size() > 1 && random.one_in(12)) {
        round.mismatch = true;
    } else if (random.one_in(4)) {
        round.bad_index = random.below(2) ? BadIndex::kTwice : BadIndex::kUnknown;
    }
    return round;
}

// A rank is lost, or the one that was comes back.
void draw_death(World& world, Random& random) {
    if (!world.options.deaths || world.size() == 1 || !random.one_in(3)) return;
    if (world.dead < 0) {
        world.dead = random.below(world.size());
        return;
    }
    world.dead = -1;
    uint64_t epoch = 0;
    for (const auto& rank : world.ranks) {
        for (const uint64_t sent : rank->state.of_block[0].sent) epoch = std::max(epoch, sent);
    }
    for (const auto& rank : world.ranks) {
        auto* control = reinterpret_cast<LowLatencyControl*>(rank->region);
        launch_restart(&rank->state, control, world.size(), epoch, 0, nullptr);
    }
}

void draw_topk(const Round& round, int num_ranks, Rank& rank, Random& random) {
    std::vector<int> experts(round.local_experts * num_ranks);
    for (int token = 0; token < rank.tokens; ++token) {
        std::iota(experts.begin(), experts.end(), 0);
        for (int k = 0; k < round.top_k; ++k) {
            std::swap(experts[k], experts[k + random.below(static_cast<int>(experts.size()) - k)]);
            rank.topk_index[token * round.top_k + k] = random.one_in(9) ? -1 : experts[k];
            rank.topk_weights[token * round.top_k + k] = static_cast<float>(random.below(1000)) / 1000.0f;
        }
    }
}

// Inputs, and results with what is in none: indices that lead astray, a bit pattern that is no number.
void draw_tensors(const World& world, Rank& rank, Random& random) {
    const Round& round = world.round;
    rank.tokens = random.one_in(5) ? 0 : random.below(round.max_tokens + 1);
    const size_t hidden = round.hidden, tokens = rank.tokens, experts = round.local_experts,
                 most_rows = round.max_tokens * world.size();
    rank.x.resize(tokens * hidden + 1);  // and so never without an address
    for (uint16_t& value : rank.x) value = draw_bf16(random, 500.0f);
    rank.expert_rows.resize(experts * most_rows * hidden);
    for (uint16_t& value : rank.expert_rows) {
        value = draw_bf16(random, round.logfmt && !random.one_in(4000) ? 4000.0f : 500.0f);  // most groups below 1
    }
    rank.topk_index.assign(tokens * round.top_k + 1, -1);
    rank.topk_weights.assign(tokens * round.top_k + 1, 0.0f);
    draw_topk(round, world.size(), rank, random);
    rank.recv_rows.assign(experts * most_rows * hidden * (round.fp8 ? 1 : 2), 0xee);
    rank.recv_scales.assign(experts * most_rows * (hidden / 128), 0xeeeeeeee);
    rank.recv_count.assign(experts, kUntouched);
    rank.recv_src_idx.assign(experts * most_rows, kUntouched);
    rank.layout_range.assign(experts * world.size(), kUntouched);
    rank.wait_stats.assign(world.size(), 0);
    rank.arrivals = {99999, 99999, 99999, 0};
    rank.came_tokens.assign(most_rows, 0x7fffffff);
    rank.token_rows.assign(most_rows * round.top_k, 0x7fffffff);
    rank.token_weights.assign(most_rows * round.top_k, 1e30f);
    rank.combined.assign(tokens * hidden + kGuard, kUntouchedBf16);
}

LowLatencyCall make_call(World& world, int index) {
    const Round& round = world.round;
    Rank& rank = *world.ranks[index];
    LowLatencyCall call{};
    call.call.rank = index;
    call.call.num_ranks = world.size();
    call.call.timeout = world.options.deaths ? 3'000'000'000 : 20'000'000'000;
    for (int i = 0; i < std::min(world.size(), kMaxRanks); ++i) call.call.windows[i] = world.ranks[i]->region;
    call.region = rank.region;
    call.call.state = &rank.local;
    call.call.host = &rank.host;
    call.call.mutation = world.options.mutation;
    call.call.stress_seed = world.options.stress_seed == 0 ? 0 : world.options.stress_seed + index;
    call.state = &rank.state;
    call.num_tokens = rank.tokens;
    call.num_max_tokens = round.max_tokens;
    call.hidden = round.hidden;
    call.top_k = round.top_k;
    call.num_local_experts = round.local_experts;
    call.weighted = round.weighted;
    call.may_mask = round.may_mask;
    call.most_tagged_bytes = round.most_tagged_bytes;
    const auto puts = static_cast<uint32_t>(world.options.put_ranks) & (~0u >> (32 - world.size()));
    if (puts >> index & 1u) call.put_ranks = puts & ~(1u << index);
    return call;
}

void prepare_dispatch(const Round& round, const LowLatencyCall& call, Rank& rank) {
    LowLatencyDispatchParams& params = rank.dispatch = {};
    params.call = call;
    params.call.call.entry.operation = Operation::kLowLatencyDispatch;
    params.call.call.entry.fields[0] = round.mismatch && call.call.rank == 0;
    if (lay_out(params.call, kLowLatencyDispatch) > static_cast<int64_t>(kRegionBytes)) {
        throw std::runtime_error("the regions are too small");
    }
    params.packet = shape_packet(round.hidden, !round.fp8 ? 0 : round.ue8m0 ? 1 : 4);
    params.round_scale = round.round_scale;
    params.use_ue8m0 = round.ue8m0;
    params.x = reinterpret_cast<const uint8_t*>(rank.x.data());
    params.x_stride = 2 * round.hidden;
    params.topk_index = rank.topk_index.data();
    params.topk_weights = rank.topk_weights.data();
    params.recv_rows = rank.recv_rows.data();
    params.recv_scales = rank.recv_scales.data();
    params.recv_count = rank.recv_count.data();
    params.recv_src_idx = rank.recv_src_idx.data();
    params.layout_range = rank.layout_range.data();
    params.wait_stats = rank.wait_stats.data();
    params.arrivals = &rank.arrivals;
    params.tokens = rank.came_tokens.data();
    params.token_rows = rank.token_rows.data();
    params.token_weights = round.weighted ? rank.token_weights.data() : nullptr;
}

void prepare_combine(const Round& round, const LowLatencyCall& call, Rank& rank) {
    LowLatencyCombineParams& params = rank.combine = {};
    params.call = call;
    params.call.call.entry.operation = Operation::kLowLatencyCombine;
    lay_out(params.call, kLowLatencyCombine);
    params.use_logfmt = round.logfmt;
    params.x = reinterpret_cast<const uint8_t*>(rank.expert_rows.data());
    params.arrivals = &rank.arrivals;
    params.tokens = rank.came_tokens.data();
    params.token_rows = rank.token_rows.data();
    params.token_weights = rank.dispatch.token_weights;
    params.topk_index = rank.topk_index.data();
    params.topk_weights = rank.topk_weights.data();
    params.combined = reinterpret_cast<uint8_t*>(rank.combined.data());
    params.wait_stats = rank.wait_stats.data();
}

}  // namespace

void draw_round(World& world, Random& random) {
    world.round = draw_shape(world, random);
    draw_death(world, random);
    Round& round = world.round;
    for (const auto& rank : world.ranks) draw_tensors(world, *rank, random);
    Rank& first = *world.ranks[0];
    if (first.tokens == 0 || round.top_k == 1) round.bad_index = BadIndex::kNone;
    if (round.bad_index != BadIndex::kNone) {
        const bool is_unknown = round.bad_index == BadIndex::kUnknown;
        first.topk_index[0] = is_unknown ? 1000000 : 0;
        first.topk_index[1] = is_unknown ? -5 : 0;
    }
    for (int i = 0; i < world.size(); ++i) {
        const LowLatencyCall call = make_call(world, i);
        prepare_dispatch(round, call, *world.ranks[i]);
        prepare_combine(round, call, *world.ranks[i]);
    }
}
