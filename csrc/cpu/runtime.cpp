#include "runtime.h"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>

namespace hpc_moe {

namespace {

// A window starts with its cookie; slots begin at the next page.
constexpr int64_t kWindowHeaderBytes = 4096;

uint64_t random_number() {
    std::random_device source;
    return static_cast<uint64_t>(source()) << 32 | source();
}

}  // namespace

CpuRuntime::CpuRuntime(int rank, std::vector<int> node_of_rank, std::vector<uintptr_t> local_windows,
                       int64_t window_bytes, bool low_latency_mode, int num_threads)
    : rank_(rank),
      node_of_rank_(std::move(node_of_rank)),
      local_windows_(std::move(local_windows)),
      window_bytes_(window_bytes),
      low_latency_mode_(low_latency_mode),
      num_threads_(num_threads),
      cookie_(random_number()) {
    const int num_nodes = *std::max_element(node_of_rank_.begin(), node_of_rank_.end()) + 1;
    ranks_of_node_.resize(num_nodes);
    for (int r = 0; r < num_ranks(); ++r) ranks_of_node_[node_of_rank_[r]].push_back(r);
    if (window_bytes_ == 0) return;
    if (local_windows_.size() != ranks_of_node_[get_rdma_rank()].size()) {
        throw std::invalid_argument("CpuRuntime: local_windows must have one address for each rank of the node");
    }
    std::memcpy(reinterpret_cast<void*>(local_windows_[local_rank()]), &cookie_, sizeof cookie_);
}

int CpuRuntime::get_local_device_id() const {
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 0;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (CPU_ISSET(core, &cores)) return core;
    }
    return 0;
}

IpcHandle CpuRuntime::get_local_ipc_handle() const {
    IpcHandle handle{};
    std::memcpy(handle.data(), &cookie_, sizeof cookie_);
    std::memcpy(handle.data() + sizeof cookie_, &window_bytes_, sizeof window_bytes_);
    return handle;
}

int CpuRuntime::get_root_rdma_rank() const { return low_latency_mode_ ? 0 : ranks_of_node_[0][local_rank()]; }

NvshmemUniqueId CpuRuntime::get_local_nvshmem_unique_id() const {
    NvshmemUniqueId id{};
    for (size_t at = 0; at < id.size(); at += sizeof(uint64_t)) {
        const uint64_t number = random_number();
        std::memcpy(id.data() + at, &number, sizeof number);
    }
    return id;
}

void CpuRuntime::sync(const std::vector<int>& device_ids, const std::vector<std::string>& ipc_handles,
                      const std::string& root_unique_id) {
    const auto ranks = static_cast<size_t>(num_ranks());
    if (device_ids.size() != ranks || ipc_handles.size() != ranks) {
        throw std::invalid_argument("CpuRuntime.sync: needs one device ID and one IPC handle for each rank");
    }
    if ((get_num_rdma_ranks() > 1 || low_latency_mode_) && root_unique_id.size() != NvshmemUniqueId{}.size()) {
        throw std::invalid_argument("CpuRuntime.sync: root_unique_id must have 128 bytes, got " +
                                    std::to_string(root_unique_id.size()));
    }
    for (size_t local = 0; window_bytes_ > 0 && local < local_windows_.size(); ++local) {
        const int peer = ranks_of_node_[get_rdma_rank()][local];
        if (ipc_handles[peer].size() != sizeof(IpcHandle) ||
            std::memcmp(ipc_handles[peer].data(), reinterpret_cast<const void*>(local_windows_[local]),
                        sizeof cookie_) != 0) {
            throw std::runtime_error("rank " + std::to_string(rank_) +
                                     " mapped memory that is not the window of rank " + std::to_string(peer) +
                                     ": do the two ranks really share a node?");
        }
    }
    available_ = true;
}

int CpuRuntime::local_rank_of(int rank) const {
    const std::vector<int>& ranks = ranks_of_node_[node_of_rank_[rank]];
    return static_cast<int>(std::find(ranks.begin(), ranks.end(), rank) - ranks.begin());
}

int64_t CpuRuntime::slot_bytes() const {
    return std::max<int64_t>(0, (window_bytes_ - kWindowHeaderBytes) / (2 * num_ranks()) / 64 * 64);
}

uint8_t* CpuRuntime::slot(int owner, int parity, int slot) const {
    return reinterpret_cast<uint8_t*>(local_windows_[local_rank_of(owner)]) + kWindowHeaderBytes +
           (static_cast<int64_t>(parity) * num_ranks() + slot) * slot_bytes();
}

}  // namespace hpc_moe
