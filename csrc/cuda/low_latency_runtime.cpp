// The host side of low-latency calls: what lies where in a region, and the launches.
#include <algorithm>
#include <stdexcept>

#include "cuda/check.h"
#include "cuda/device_guard.h"
#include "cuda/runtime.h"

namespace hpc_moe::cuda {

void CudaRuntime::set_regions(const std::vector<uintptr_t>& regions, int64_t num_bytes, int64_t most_tagged_bytes,
                              bool may_mask) {
    if (static_cast<int>(regions.size()) != num_ranks_) throw std::runtime_error("one region per rank is needed");
    if (num_bytes < kLowLatencyFixedBytes) throw std::runtime_error("the region is too small");
    DeviceGuard guard(device_);
    launchers_->prepare();
    prepare_low_latency_masks();
    regions_.resize(regions.size());
    std::transform(regions.begin(), regions.end(), regions_.begin(),
                   [](uintptr_t address) { return reinterpret_cast<uint8_t*>(address); });
    region_bytes_ = num_bytes;
    may_mask_ = may_mask;
    most_tagged_bytes_ = most_tagged_bytes;
    void* memory = nullptr;
    check(cudaMalloc(&memory, sizeof(LowLatencyState)), "allocating the low-latency state");
    low_latency_state_ = static_cast<LowLatencyState*>(memory);
    check(cudaMemset(low_latency_state_, 0, sizeof(LowLatencyState)), "clearing the low-latency state");
    check(cudaMemcpy(low_latency_state_->regions, regions_.data(), regions_.size() * sizeof regions_[0],
                     cudaMemcpyHostToDevice),
          "saying where regions are");
    check(cudaMemset(regions_[rank_], 0, kLowLatencyClearedBytes), "clearing the region");
    check(cudaDeviceSynchronize(), "clearing the region");
}

void CudaRuntime::set_puts(uint32_t ranks, const std::vector<int>& pes, const std::vector<int>& queue_pairs,
                           const LowLatencyLaunchers& launchers) {
    if (static_cast<int>(pes.size()) != num_ranks_) throw std::runtime_error("one PE per rank is needed");
    if (!low_latency_state_) throw std::runtime_error("there is no region for low-latency calls");
    DeviceGuard guard(device_);
    launchers.prepare();
    std::vector<LowLatencyState::OfBlock> blocks(kMaxBlocks);  // no call has been made yet
    for (size_t i = 0; i < blocks.size() && !queue_pairs.empty(); ++i) {
        blocks[i].queue = queue_pairs[i % queue_pairs.size()];
    }
    check(cudaMemcpy(low_latency_state_->of_block, blocks.data(), sizeof low_latency_state_->of_block,
                     cudaMemcpyHostToDevice),
          "dealing out the queue pairs");
    check(cudaMemcpy(low_latency_state_->pes, pes.data(), pes.size() * sizeof pes[0], cudaMemcpyHostToDevice),
          "saying who is which PE");
    check(cudaDeviceSynchronize(), "preparing puts");
    put_ranks_ = ranks, launchers_ = &launchers;
}

void CudaRuntime::fill_low_latency_call(LowLatencyCall& call, LowLatencyKind kind, const std::vector<int64_t>& agreed,
                                        int halves) const {
    if (!low_latency_state_) throw std::runtime_error("there is no region for low-latency calls");
    if (num_ranks_ > launchers_->most_ranks) throw std::runtime_error("these kernels do not serve as many ranks");
    const Operation operation =
        kind == kLowLatencyDispatch ? Operation::kLowLatencyDispatch : Operation::kLowLatencyCombine;
    call.call = make_call(operation, agreed, call.num_tokens, -1);
    std::copy_n(regions_.begin(), std::min(num_ranks_, kMaxRanks), call.call.windows);
    call.region = regions_[rank_];
    call.state = low_latency_state_;
    call.halves = halves;
    call.may_mask = may_mask_;
    call.begins_early = begins_early_;
    call.most_tagged_bytes = most_tagged_bytes_ < 0 ? kMostTaggedBytes[kind] : most_tagged_bytes_;
    call.put_ranks = put_ranks_;
    if (lay_out(call, kind) > region_bytes_) throw std::runtime_error("the region is too small for this call");
}

void CudaRuntime::launch_low_latency_dispatch(LowLatencyDispatchParams params, int scale_bytes,
                                              const std::vector<int64_t>& agreed, uint8_t* routing, int halves,
                                              cudaStream_t stream) {
    DeviceGuard guard(device_);
    fill_low_latency_call(params.call, kLowLatencyDispatch, agreed, halves);
    params.packet = shape_packet(params.call.hidden, scale_bytes);
    const RoutingParts parts = lay_out_routing(params.call, num_ranks_);
    params.arrivals = reinterpret_cast<Arrivals*>(routing);
    params.layout_range = reinterpret_cast<int64_t*>(routing + parts.layout_range);
    params.recv_count = reinterpret_cast<int32_t*>(routing + parts.recv_count);
    params.recv_src_idx = reinterpret_cast<int32_t*>(routing + parts.recv_src_idx);
    params.tokens = reinterpret_cast<int32_t*>(routing + parts.tokens);
    params.token_rows = reinterpret_cast<int32_t*>(routing + parts.token_rows);
    params.token_weights = params.call.weighted ? reinterpret_cast<float*>(routing + parts.token_weights) : nullptr;
    launchers_->dispatch(params, limit_blocks(kLowLatencyBlocks), stream);
}

void CudaRuntime::launch_low_latency_combine(LowLatencyCombineParams params, const std::vector<int64_t>& agreed,
                                             const uint8_t* routing, int halves, cudaStream_t stream) {
    DeviceGuard guard(device_);
    fill_low_latency_call(params.call, kLowLatencyCombine, agreed, halves);
    const RoutingParts parts = lay_out_routing(params.call, num_ranks_);
    params.arrivals = reinterpret_cast<const Arrivals*>(routing);
    params.tokens = reinterpret_cast<const int32_t*>(routing + parts.tokens);
    params.token_rows = reinterpret_cast<const int32_t*>(routing + parts.token_rows);
    params.token_weights =
        params.call.weighted ? reinterpret_cast<const float*>(routing + parts.token_weights) : nullptr;
    launchers_->combine(params, limit_blocks(kLowLatencyBlocks), stream);
}

void CudaRuntime::launch_low_latency_reject(int operation, const std::string& text, cudaStream_t stream) {
    DeviceGuard guard(device_);
    const bool is_dispatch = operation == static_cast<int>(Operation::kLowLatencyDispatch);
    const LowLatencyKind kind = is_dispatch ? kLowLatencyDispatch : kLowLatencyCombine;
    LowLatencyCall call{};  // of no sizes: nothing but control words is written
    fill_low_latency_call(call, kind, {}, kSendHalf | kReceiveHalf);
    call.call.entry.status = EntryStatus::kRejected;
    launchers_->reject(call, kind, text.c_str(), limit_blocks(kLowLatencyBlocks), stream);
}

void CudaRuntime::mask_ranks(uint32_t ranks, cudaStream_t stream) {
    DeviceGuard guard(device_);
    launch_mask_ranks(low_latency_state_, ranks, stream);
}

void CudaRuntime::query_masks(uintptr_t masked, cudaStream_t stream) {
    DeviceGuard guard(device_);
    launch_query_masks(low_latency_state_, num_ranks_, reinterpret_cast<int32_t*>(masked), stream);
}

std::pair<uint64_t, uint32_t> CudaRuntime::low_latency_state() const {
    DeviceGuard guard(device_);
    check(cudaDeviceSynchronize(), "waiting for low-latency calls");
    LowLatencyState::OfBlock block{};  // all blocks have the same
    uint32_t masked = 0;
    check(cudaMemcpy(&block, &low_latency_state_->of_block[0], sizeof block, cudaMemcpyDeviceToHost),
          "reading the low-latency state");
    check(cudaMemcpy(&masked, &low_latency_state_->masked, sizeof masked, cudaMemcpyDeviceToHost),
          "reading the low-latency state");
    return {*std::max_element(block.sent, block.sent + kNumLowLatencyKinds), masked};
}

void CudaRuntime::restart_low_latency(uint64_t epoch, uint32_t masked) {
    DeviceGuard guard(device_);
    auto* own = reinterpret_cast<LowLatencyControl*>(regions_[rank_]);
    launch_restart(low_latency_state_, own, num_ranks_, epoch, masked, nullptr);
    check(cudaDeviceSynchronize(), "restarting low-latency calls");
}

}  // namespace hpc_moe::cuda
