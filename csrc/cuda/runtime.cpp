#include "cuda/runtime.h"

#include <cuda_runtime.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "cuda/check.h"
#include "cuda/device_guard.h"

namespace hpc_moe::cuda {
namespace {

constexpr int64_t kGranule = 2 << 20;
constexpr int kBlocksOnSharedGpu = 4;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::string uuid_text(const void* bytes) {
    const auto* digits = static_cast<const uint8_t*>(bytes);
    std::ostringstream text;
    text << "GPU-" << std::hex;
    for (int i = 0; i < 4; ++i) text << (digits[i] >> 4) << (digits[i] & 15);
    return text.str();
}

// The parts of a slot behind the row, as offsets; returns the bytes of the slot.
int64_t lay_out_slot(int row_bytes, int num_scales, int top_k, bool has_index, bool has_weights, bool has_positions,
                     bool has_source, DispatchSlot& slot) {
    int64_t end = round_up(row_bytes, 16);
    auto add = [&end](bool wanted, int64_t bytes) {
        if (!wanted) return int32_t{-1};
        const int64_t begin = end;
        end = round_up(end + bytes, 8);
        return static_cast<int32_t>(begin);
    };
    slot.scales = add(num_scales > 0, 4 * static_cast<int64_t>(num_scales));  // first: at a multiple of 16
    slot.topk_index = add(has_index, 8 * static_cast<int64_t>(top_k));
    slot.topk_weights = add(has_weights, 4 * static_cast<int64_t>(top_k));
    slot.positions = add(has_positions, 4 * static_cast<int64_t>(top_k));
    slot.source_index = add(has_source, 4);
    return round_up(end, 128);
}

// Bytes of a token's scales if bulk copies can take them along, else 0.
int bulk_scale_bytes(const DispatchParams& p) {
    const int bytes = 4 * p.num_scales;
    const bool contiguous = p.scale_channel_stride == 1 || p.num_scales == 1;
    const bool aligned = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.scales) % 16 == 0 &&
                         (p.num_tokens < 2 || p.scale_token_stride % 4 == 0);
    return contiguous && aligned ? bytes : 0;
}

// Whether kernels can begin early (launch.h) on a GPU of this compute capability: by CUDA's guide from 9.0 on, and in
// graphs from CUDA 12.3 on.
bool can_begin_early(int major) {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    return major >= 9 && driver >= 12030 && CUDART_VERSION >= 12030;
}

}  // namespace

Window::Window(int device, int64_t num_bytes) : device_(device), num_bytes_(num_bytes) {
    DeviceGuard guard(device);
    void* memory = nullptr;
    check(cudaMalloc(&memory, round_up(num_bytes, kGranule)), "allocating the window");
    address_ = static_cast<uint8_t*>(memory);
}

Window::~Window() {
    // At the end of the process CUDA may be gone before the last tensor: nothing can be done about an error here.
    int before = 0;
    if (cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device_) == cudaSuccess) {
        cudaFree(address_);
        cudaSetDevice(before);
    }
    cudaGetLastError();
}

CudaRuntime::CudaRuntime(int rank, std::vector<int> node_of_rank, int device, int64_t window_bytes, double timeout,
                         bool shares_gpu, bool bulk_copies, int link_rate, uint32_t stress_seed, int32_t mutation)
    : rank_(rank),
      num_ranks_(static_cast<int>(node_of_rank.size())),
      device_(device),
      node_of_rank_(std::move(node_of_rank)),
      window_bytes_(window_bytes),
      stage_bytes_(window_bytes / 2 / 4096 * 4096),
      timeout_(timeout),
      shares_gpu_(shares_gpu),
      link_rate_(link_rate),
      stress_seed_(stress_seed),
      mutation_(mutation) {
    if (num_ranks_ > (window_bytes > 0 ? kMaxRanks : kMaxLowLatencyRanks)) {
        throw std::runtime_error("more ranks than there may be");
    }
    int count = 0;
    check(cudaGetDeviceCount(&count), "counting the GPUs");
    if (device < 0 || device >= count) {
        throw std::invalid_argument("device: there is no cuda:" + std::to_string(device) + "; this process sees " +
                                    std::to_string(count) + " GPUs");
    }
    DeviceGuard guard(device);
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the GPU's kind");
    check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device), "asking for the GPU's kind");
    bulk_copies_ = bulk_copies && major >= 9;
    begins_early_ = can_begin_early(major);
    if (link_rate < 0) link_rate_ = major >= 10 ? kNvlink5Rate : kNvlink4Rate;
    size_t free_bytes = 0, total_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for the GPU's memory");
    if (kControlBytes + window_bytes > static_cast<int64_t>(total_bytes)) {
        throw std::invalid_argument("num_nvl_bytes=" + std::to_string(window_bytes) +
                                    " is more than the GPU has: " + std::to_string(total_bytes) + " bytes");
    }
    if (window_bytes / kLandingUnit >= INT32_MAX) {  // places in it are told as int32
        throw std::invalid_argument("num_nvl_bytes=" + std::to_string(window_bytes) + " must be less than 256 GiB");
    }
    prepare_layout();
    prepare_exchange();
    prepare_dispatch(bulk_copies_);
    prepare_combine(bulk_copies_);
    window_ = std::make_shared<Window>(device, kControlBytes + window_bytes);
    check(cudaMemset(window_->address(), 0, kControlBytes), "clearing the window");
    LocalState state{};
    state.bad_value = kNoBadValue;
    void* memory = nullptr;
    check(cudaMalloc(&memory, sizeof(LocalState)), "allocating the state");
    state_ = static_cast<LocalState*>(memory);
    check(cudaMemcpy(state_, &state, sizeof state, cudaMemcpyHostToDevice), "clearing the state");
    check(cudaHostAlloc(&memory, sizeof(HostRecord), cudaHostAllocMapped), "allocating the host record");
    host_ = static_cast<HostRecord*>(memory);
    std::memset(host_, 0, sizeof(HostRecord));
    check(cudaHostGetDevicePointer(&memory, host_, 0), "mapping the host record");
    host_on_device_ = static_cast<HostRecord*>(memory);
    check(cudaDeviceSynchronize(), "clearing the window");
}

CudaRuntime::~CudaRuntime() {
    if (window_) abandon();  // nobody said that peers are done with it
}

std::array<uint8_t, 16> CudaRuntime::get_local_device_uuid() const {
    std::array<uint8_t, 16> uuid{};
    if (shares_gpu_) return uuid;
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device_), "asking for the GPU's UUID");
    std::memcpy(uuid.data(), &properties.uuid, uuid.size());
    return uuid;
}

std::array<uint8_t, 64> CudaRuntime::get_local_ipc_handle() const {
    DeviceGuard guard(device_);
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, window_->address()), "making the IPC handle of the window");
    std::array<uint8_t, 64> bytes;
    static_assert(sizeof handle == sizeof bytes);
    std::memcpy(bytes.data(), &handle, bytes.size());
    return bytes;
}

int CudaRuntime::get_num_rdma_ranks() const {
    return *std::max_element(node_of_rank_.begin(), node_of_rank_.end()) + 1;
}

std::array<uint8_t, 128> CudaRuntime::get_local_nvshmem_unique_id() const {
    throw std::runtime_error("this build has no NVSHMEM");
}

void CudaRuntime::check_peers(const std::vector<std::string>& uuids) const {
    int count = 0;
    check(cudaGetDeviceCount(&count), "counting the GPUs");
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (!is_local_peer(peer)) continue;
        // A rank that sees only its own GPU cannot ask about others: then opening the handles decides.
        for (int device = 0; device < count; ++device) {
            cudaDeviceProp properties;
            check(cudaGetDeviceProperties(&properties, device), "asking for a GPU's UUID");
            if (device == device_ || std::memcmp(&properties.uuid, uuids[peer].data(), 16) != 0) continue;
            int reachable = 0;
            check(cudaDeviceCanAccessPeer(&reachable, device_, device), "asking for peer access");
            if (!reachable) {
                throw std::runtime_error("rank " + std::to_string(rank_) + " (cuda:" + std::to_string(device_) + ", " +
                                         uuid_text(get_local_device_uuid().data()) + ") has no peer access to rank " +
                                         std::to_string(peer) + " (" + uuid_text(uuids[peer].data()) +
                                         "): the GPUs of a node must reach each other (nvidia-smi topo -p2p r)");
            }
        }
    }
}

void CudaRuntime::sync(const std::vector<int>& device_ids, const std::vector<std::string>& ipc_handles,
                       const std::string&) {
    if (static_cast<int>(ipc_handles.size()) != num_ranks_)
        throw std::runtime_error("one IPC handle per rank is needed");
    DeviceGuard guard(device_);
    windows_.assign(num_ranks_, nullptr);
    windows_[rank_] = window_->address();
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (!is_local_peer(peer)) continue;
        cudaIpcMemHandle_t handle;
        std::memcpy(&handle, ipc_handles[peer].data(), sizeof handle);
        void* memory = nullptr;
        const cudaError_t code = cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
        if (code != cudaSuccess) {
            cudaGetLastError();
            throw std::runtime_error("rank " + std::to_string(rank_) + " (cuda:" + std::to_string(device_) +
                                     ") could not open the window of rank " + std::to_string(peer) + " (its cuda:" +
                                     std::to_string(device_ids[peer]) + "): " + cudaGetErrorString(code) +
                                     ". The usual cause is that a rank's device cgroup hides the other GPUs: with "
                                     "Slurm, --gpu-bind=none cures it");
        }
        windows_[peer] = static_cast<uint8_t*>(memory);
    }
    available_ = true;
}

void CudaRuntime::close_peers() {
    available_ = false;
    DeviceGuard guard(device_);
    for (int peer = 0; peer < static_cast<int>(windows_.size()); ++peer) {
        if (peer != rank_ && windows_[peer]) cudaIpcCloseMemHandle(windows_[peer]);
    }
    cudaGetLastError();
    windows_.clear();
}

void CudaRuntime::free() {
    available_ = false;
    DeviceGuard guard(device_);
    window_.reset();
    if (state_) cudaFree(state_);
    if (low_latency_state_) cudaFree(low_latency_state_);
    if (host_) cudaFreeHost(host_);
    state_ = nullptr;
    low_latency_state_ = nullptr;
    host_ = host_on_device_ = nullptr;
    cudaGetLastError();
}

void CudaRuntime::destroy() {
    close_peers();
    free();
}

void CudaRuntime::abandon() {
    available_ = false;
    new std::shared_ptr<Window>(std::move(window_));  // never deleted: peers may write it until the process ends
    window_.reset();
}

int CudaRuntime::num_slots(int row_bytes, int num_scales, int top_k) const {
    DispatchSlot slot;
    return make_stage(lay_out_slot(row_bytes, num_scales, top_k, true, true, true, true, slot)).num_slots;
}

Stage CudaRuntime::make_stage(int64_t slot_bytes) const {
    Stage stage;
    stage.offset = kControlBytes;
    stage.region_bytes = stage_bytes_ / num_ranks_ / 128 * 128;
    stage.slot_bytes = slot_bytes;
    stage.num_slots = static_cast<int32_t>(std::min<int64_t>(stage.region_bytes / slot_bytes, kMaxSlots));
    return stage;
}

Call CudaRuntime::make_call(Operation operation, const std::vector<int64_t>& agreed, int64_t num_tokens,
                            int64_t capacity) const {
    if (!available_) throw std::runtime_error("the runtime is not available");
    if (agreed.size() > kMaxFields) throw std::runtime_error("too many values to agree on");
    Call call{};
    call.rank = rank_;
    call.num_ranks = num_ranks_;
    call.timeout = static_cast<uint64_t>(std::min(timeout_, 1e9) * 1e9);
    if (num_ranks_ <= kMaxRanks) std::copy(windows_.begin(), windows_.end(), call.windows);
    call.state = state_;
    call.host = host_on_device_;
    call.entry.operation = operation;
    std::transform(agreed.begin(), agreed.end(), call.entry.fields, [](int64_t v) { return static_cast<int32_t>(v); });
    call.entry.num_tokens = static_cast<int32_t>(num_tokens);
    call.entry.capacity = static_cast<int32_t>(capacity);
    std::fill(call.entry.landing, call.entry.landing + kNumArrays, -1);
    call.entry.num_blocks = 1;
    call.stress_seed = stress_seed_;
    call.mutation = mutation_;
    return call;
}

int CudaRuntime::limit_blocks(int num_blocks) const {
    return std::max(1, std::min({num_blocks, kMaxBlocks, shares_gpu_ ? kBlocksOnSharedGpu : num_sms_}));
}

void CudaRuntime::launch_layout(LayoutParams params, cudaStream_t stream) {
    DeviceGuard guard(device_);
    params.state = state_;
    params.host = host_on_device_;
    params.num_ranks = num_ranks_;
    params.tokens_per_chunk = layout_tokens_per_chunk(params.num_tokens);
    cuda::launch_layout(params, stream);
}

uint32_t CudaRuntime::launch_exchange(ExchangeParams params, const std::vector<int64_t>& agreed, int64_t num_tokens,
                                      int64_t capacity, cudaStream_t stream) {
    DeviceGuard guard(device_);
    params.call = make_call(Operation::kDispatch, agreed, num_tokens, capacity);
    params.number = ++num_exchanges_;
    cuda::launch_exchange(params, stream);
    return params.number;
}

int64_t CudaRuntime::wait_for_exchange(uint32_t number, cudaStream_t stream) const {
    DeviceGuard guard(device_);
    using Clock = std::chrono::steady_clock;
    const auto limit = std::chrono::duration<double>(timeout_ + 10.0);  // the kernel itself gives up after timeout_
    const auto result = [this] { return __atomic_load_n(&host_->result, __ATOMIC_ACQUIRE); };
    bool is_running = false;
    Clock::time_point begin;
    for (uint64_t polls = 1; result() >> 32 != number; ++polls) {
        if (polls % 1024 != 0) continue;
        sched_yield();
        const cudaError_t code = cudaStreamQuery(stream);
        if (code != cudaErrorNotReady) {
            check(code, "the exchange of counts");
            if (result() >> 32 != number) throw std::runtime_error("the exchange of counts ended without a result");
        }
        if (!is_running && __atomic_load_n(&host_->started, __ATOMIC_RELAXED) == number) {
            is_running = true;
            begin = Clock::now();
        }
        if (is_running && Clock::now() - begin > limit) throw std::runtime_error("the exchange of counts does not end");
    }
    const auto rows = static_cast<uint32_t>(result());
    return rows == kExchangeFailed ? -1 : static_cast<int64_t>(rows);
}

void CudaRuntime::launch_dispatch(DispatchParams params, const std::vector<int64_t>& agreed,
                                  const std::vector<uintptr_t>& landing, bool behind_exchange, int num_blocks,
                                  cudaStream_t stream) {
    DeviceGuard guard(device_);
    params.call = make_call(Operation::kDispatch, agreed, params.num_tokens, params.num_rows);
    params.call.behind_exchange = behind_exchange;
    for (size_t a = 0; a < landing.size() && a < kNumArrays; ++a) {
        if (!landing[a]) continue;
        const uintptr_t offset = landing[a] - reinterpret_cast<uintptr_t>(window_->address());
        if (offset % kLandingUnit != 0) throw std::runtime_error("results in the pool are not aligned");
        params.call.entry.landing[a] = static_cast<int32_t>(offset / kLandingUnit);
    }
    params.stage = make_stage(lay_out_slot(params.row_bytes, params.num_scales, params.top_k, params.has_topk_index,
                                           params.has_topk_weights, params.grouped && !params.cached, !params.cached,
                                           params.slot));
    const int blocks = limit_blocks(num_blocks);
    params.call.entry.num_blocks = blocks;
    params.pipeline = shape_pipeline(params.row_bytes, bulk_scale_bytes(params), blocks, kDispatchBytesInFlight,
                                     link_rate_, bulk_copies_);
    const bool drains = params.call.entry.landing[kRows] < 0 || params.grouped;
    if (bulk_copies_ && !drains) {
        const int wanted = (kDispatchOwnRowWarps + blocks - 1) / blocks;
        params.pipeline.num_drain_warps = std::min(params.pipeline.num_drain_warps, wanted);
    }
    cuda::launch_dispatch(params, {blocks, bulk_copies_, stream});
}

void CudaRuntime::launch_combine(CombineParams params, const std::vector<int64_t>& agreed, int num_blocks,
                                 cudaStream_t stream) {
    DeviceGuard guard(device_);
    params.call = make_call(Operation::kCombine, agreed, params.num_tokens, -1);
    DispatchSlot slot;
    params.stage = make_stage(lay_out_slot(params.grouped ? 2 * params.row_bytes : params.row_bytes, 0, params.top_k,
                                           false, params.has_weights, false, false, slot));
    params.slot_weights = slot.topk_weights;
    const int blocks = limit_blocks(num_blocks);
    const bool bulk_copies = bulk_copies_ && !params.grouped;  // a grouped one adds before it sends
    params.pipeline = shape_pipeline(params.row_bytes, 0, blocks, kCombineBytesInFlight, link_rate_, bulk_copies);
    cuda::launch_combine(params, {blocks, bulk_copies, stream});
}

void CudaRuntime::launch_reject(int operation, const std::string& text, bool behind_exchange, cudaStream_t stream) {
    DeviceGuard guard(device_);
    Call call = make_call(static_cast<Operation>(operation), {}, 0, -1);
    call.behind_exchange = behind_exchange;
    cuda::launch_reject(call, text.c_str(), stream);
}

std::pair<uint64_t, uint64_t> CudaRuntime::passes(int operation) const {
    DeviceGuard guard(device_);
    LocalState state;
    check(cudaMemcpy(&state, state_, sizeof state, cudaMemcpyDeviceToHost), "reading the statistics");
    return {state.passes[operation], state.last_passes[operation]};
}

bool CudaRuntime::has_timeout() const {
    return host_ && !took_timeout_ && __atomic_load_n(&host_->timeout.sequence, __ATOMIC_ACQUIRE) != 0;
}

bool CudaRuntime::has_error() const {
    if (!host_) return false;
    return has_timeout() || __atomic_load_n(&host_->error.sequence, __ATOMIC_ACQUIRE) != host_->error.acknowledged;
}

std::optional<ErrorRecord> CudaRuntime::take_error() {
    if (!has_error()) return std::nullopt;
    if (has_timeout()) {
        took_timeout_ = true;
        return host_->timeout;
    }
    ErrorRecord error = host_->error;
    __atomic_store_n(&host_->error.acknowledged, error.sequence, __ATOMIC_RELEASE);
    return error;
}

}  // namespace hpc_moe::cuda
