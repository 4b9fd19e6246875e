// The CPU runtime: where ranks are, the windows that they share inside a node, and slots in them.
//
// It knows no MPI. Python allocates the windows (MPI shared memory), exchanges what the methods below return, and says
// when a slot may be read.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace hpc_moe {

// What a rank tells its peers about its window, so that they can check that what they mapped is that window.
using IpcHandle = std::array<uint8_t, 64>;
using NvshmemUniqueId = std::array<uint8_t, 128>;
using DeviceUuid = std::array<uint8_t, 16>;

class CpuRuntime {
   public:
    // node_of_rank: node index of every rank. local_windows: address, in this process, of the window of every rank of
    // this node, in rank order; each is window_bytes long (0: no windows).
    CpuRuntime(int rank, std::vector<int> node_of_rank, std::vector<uintptr_t> local_windows, int64_t window_bytes,
               bool low_latency_mode, int num_threads);

    // The lowest core that this process may run on.
    int get_local_device_id() const;
    // All zero: cores may be shared by ranks.
    DeviceUuid get_local_device_uuid() const { return {}; }
    IpcHandle get_local_ipc_handle() const;
    // Nodes (a world over all ranks has as many members as ranks, whatever this says).
    int get_num_rdma_ranks() const { return static_cast<int>(ranks_of_node_.size()); }
    // This rank's node.
    int get_rdma_rank() const { return node_of_rank_[rank_]; }
    // The rank that makes the unique ID of this rank's world: rank 0 in low-latency mode, else the rail's first rank.
    int get_root_rdma_rank() const;
    // On CPU, a random number that all ranks of a world must have received.
    NvshmemUniqueId get_local_nvshmem_unique_id() const;

    // Checks that every window of this node is the one that its rank announced. Throws std::runtime_error.
    void sync(const std::vector<int>& device_ids, const std::vector<std::string>& ipc_handles,
              const std::string& root_unique_id);
    bool is_available() const { return available_; }
    void destroy() { available_ = false; }

    const std::vector<int>& node_of_rank() const { return node_of_rank_; }
    int local_rank() const { return local_rank_of(rank_); }
    int local_rank_of(int rank) const;
    int rank() const { return rank_; }
    int num_ranks() const { return static_cast<int>(node_of_rank_.size()); }
    int num_threads() const { return num_threads_; }

    // A window holds, for each parity of the pass counter, one slot for every rank of the communicator.
    int64_t slot_bytes() const;
    // The slot numbered `slot` in the window of `owner`, a rank of this node.
    uint8_t* slot(int owner, int parity, int slot) const;

   private:
    int rank_;
    std::vector<int> node_of_rank_;
    std::vector<std::vector<int>> ranks_of_node_;
    std::vector<uintptr_t> local_windows_;
    int64_t window_bytes_;
    bool low_latency_mode_;
    int num_threads_;
    uint64_t cookie_;
    bool available_ = false;
};

}  // namespace hpc_moe
