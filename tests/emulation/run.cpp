// Low-latency dispatches and combines of several ranks on the CPU, at random, and whether they do what they should.
// tests/test_emulated_low_latency.py builds and runs it. Exits with 1 after the first round that has something wrong.
#include <cinttypes>
#include <cstdio>
#include <stdexcept>
#include <thread>

#include "device.h"
#include "world.h"
#ifdef HPC_MOE_PUTS
#include "nvshmem/puts.cuh"
#endif

using namespace hpc_moe::cuda;

namespace {

Options parse(int count, char** words) {
    Options options;
    const std::map<std::string, int*> names = {
        {"ranks", &options.ranks},       {"rounds", &options.rounds},       {"seed", &options.seed},
        {"deaths", &options.deaths},     {"put_ranks", &options.put_ranks}, {"stress_seed", &options.stress_seed},
        {"mutation", &options.mutation}, {"fences", &options.fences},
    };
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const size_t equals = word.find('=');
        if (equals == std::string::npos) throw std::invalid_argument("not name=value: " + word);
        *names.at(word.substr(0, equals)) = std::stoi(word.substr(equals + 1));
    }
    return options;
}

uint8_t* allocate_region() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* region = mmap(nullptr, kRegionBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (region == MAP_FAILED) throw std::runtime_error("no memory for a region");
    return static_cast<uint8_t*>(region);
}

// A rank's part in a round.
void run_rank(const World& world, int index) {
    const Round& round = world.round;
    Rank& rank = *world.ranks[index];
    const auto dispatch = [&](int halves) {
        rank.dispatch.call.halves = halves;
        launch_low_latency_dispatch(rank.dispatch, world.num_blocks, nullptr);
    };
    const auto combine = [&](int halves) {
        rank.combine.call.halves = halves;
        launch_low_latency_combine(rank.combine, world.num_blocks, nullptr);
    };
    if (index == round.rejecting) {
        LowLatencyCall call = rank.dispatch.call;
        call.call.entry.status = EntryStatus::kRejected;
        call.halves = kSendHalf | kReceiveHalf;
        launch_low_latency_reject(call, kLowLatencyDispatch, "no", world.num_blocks, nullptr);
        return;
    }
    if (round.order == Order::kWhole) {
        dispatch(kSendHalf | kReceiveHalf);
        if (round.rejecting < 0) combine(kSendHalf | kReceiveHalf);
        return;
    }
    // With two under way, the second sends before the first has been received.
    const int times = round.order == Order::kTwoUnderWay && round.rejecting < 0 ? 2 : 1;
    for (int i = 0; i < times; ++i) dispatch(kSendHalf);
    for (int i = 0; i < times; ++i) dispatch(kReceiveHalf);
    if (round.rejecting >= 0) return;
    for (int i = 0; i < times; ++i) combine(kSendHalf);
    for (int i = 0; i < times; ++i) combine(kReceiveHalf);
}

void print_round(const World& world, int number) {
    const Round& r = world.round;
    printf(
        "round %d: blocks %d, hidden %d, top_k %d, local experts %d, max tokens %d, fp8 %d, round_scale %d,"
        " ue8m0 %d, weighted %d, logfmt %d, most tagged bytes %" PRId64
        ", order %d, may mask %d, dead %d, rejecting %d, mismatch %d, bad index %d; tokens:",
        number, world.num_blocks, r.hidden, r.top_k, r.local_experts, r.max_tokens, r.fp8, r.round_scale, r.ue8m0,
        r.weighted, r.logfmt, r.most_tagged_bytes, static_cast<int>(r.order), r.may_mask, world.dead, r.rejecting,
        r.mismatch, static_cast<int>(r.bad_index));
    for (const auto& rank : world.ranks) printf(" %d", rank->tokens);
    printf("\n");
}

}  // namespace

int main(int count, char** words) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    World world;
    world.options = parse(count, words);
    Random random(world.options.seed);
    world.num_blocks = 1 + random.below(3);
    for (int i = 0; i < world.options.ranks; ++i) {
        world.ranks.push_back(std::make_unique<Rank>());
        world.ranks[i]->region = allocate_region();
        for (int block = 0; block < kMaxBlocks; ++block) world.ranks[i]->state.of_block[block].queue = block % 2;
    }
    for (const auto& rank : world.ranks) {
        for (int i = 0; i < world.size(); ++i) rank->state.regions[i] = world.ranks[i]->region, rank->state.pes[i] = i;
    }
#ifdef HPC_MOE_PUTS
    std::vector<emulation::Region> regions;
    for (const auto& rank : world.ranks) regions.push_back({rank->region, kRegionBytes});
    const emulation::Network network(regions, world.options.fences != 0);
#endif
    for (int number = 0; number < world.options.rounds; ++number) {
        draw_round(world, random);
        print_round(world, number);
        std::vector<std::thread> threads;
        for (int i = 0; i < world.size(); ++i) {
            if (i != world.dead) threads.emplace_back(run_rank, std::cref(world), i);
        }
        for (std::thread& thread : threads) thread.join();
        const auto wrong = find_wrong(world);
        for (const auto& [what, times] : wrong) printf("wrong: %s, %" PRId64 " times\n", what.c_str(), times);
        if (!wrong.empty()) return 1;
    }
    printf("%d rounds are right\n", world.options.rounds);
    return 0;
}
