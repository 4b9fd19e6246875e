// The CUDA runtime of one rank: its GPU, its window and those of its peers, and what the kernels report to the host.
//
// It knows neither torch nor MPI. Python chooses the device, exchanges what the methods return, allocates tensors, and
// says on which stream to launch. The methods that launch do not wait; only wait_for_exchange does, with a limit.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/combine.h"
#include "cuda/dispatch.h"
#include "cuda/exchange.h"
#include "cuda/layout.h"
#include "cuda/low_latency.h"

namespace hpc_moe::cuda {

// Device memory that peers may open. It lives as long as anything refers to it: the runtime, or a tensor in its pool.
class Window {
   public:
    // Rounded up to 2 MiB, so that the allocation is one of its own: an IPC handle opens the whole allocation.
    Window(int device, int64_t num_bytes);
    ~Window();
    Window(const Window&) = delete;
    Window& operator=(const Window&) = delete;

    uint8_t* address() const { return address_; }
    int64_t num_bytes() const { return num_bytes_; }

   private:
    int device_;
    int64_t num_bytes_;
    uint8_t* address_ = nullptr;
};

class CudaRuntime {
   public:
    // node_of_rank: node index of every rank, at most kMaxRanks; of kMaxLowLatencyRanks, where there are no normal
    // calls (window_bytes 0). window_bytes: for rows; control data come on top. timeout: seconds that a kernel waits
    // for a peer. shares_gpu: ranks may share a GPU (for tests). bulk_copies: use them where there are any. link_rate:
    // see shape_pipeline, -1: that of the GPU's kind.
    CudaRuntime(int rank, std::vector<int> node_of_rank, int device, int64_t window_bytes, double timeout,
                bool shares_gpu, bool bulk_copies, int link_rate, uint32_t stress_seed, int32_t mutation);
    ~CudaRuntime();
    CudaRuntime(const CudaRuntime&) = delete;
    CudaRuntime& operator=(const CudaRuntime&) = delete;

    // --- what the bootstrap calls

    // The GPU's index among those that this process sees.
    int get_local_device_id() const { return device_; }
    // All zero if ranks may share a GPU.
    std::array<uint8_t, 16> get_local_device_uuid() const;
    std::array<uint8_t, 64> get_local_ipc_handle() const;
    // Nodes.
    int get_num_rdma_ranks() const;
    // This rank's node.
    int get_rdma_rank() const { return node_of_rank_[rank_]; }
    // The only world is over all ranks.
    int get_root_rdma_rank() const { return 0; }
    std::array<uint8_t, 128> get_local_nvshmem_unique_id() const;
    // Throws if this GPU cannot reach that of a peer of its node. uuids: of all ranks.
    void check_peers(const std::vector<std::string>& uuids) const;
    // Opens the windows of the peers of this node. Those of others cannot be: normal calls are for one node only.
    void sync(const std::vector<int>& device_ids, const std::vector<std::string>& ipc_handles,
              const std::string& root_unique_id);
    bool is_available() const { return available_; }

    // Closes the windows of the peers; then none of them may be written any more.
    void close_peers();
    // Lets go of this rank's own memory. Peers must have closed it.
    void free();
    void destroy();
    // Never frees what peers may still use, nor what kernels under way may write.
    void abandon();

    // --- memory

    std::shared_ptr<Window> window() const { return window_; }
    // Where results may lie in the window: behind the control data and the stage.
    int64_t pool_offset() const { return kControlBytes + stage_bytes_; }
    int64_t pool_bytes() const { return window_bytes_ - stage_bytes_; }
    // Rows of a source that the stage holds at a time, each with all that may travel with it.
    int num_slots(int row_bytes, int num_scales, int top_k) const;

    // --- calls. agreed: values that must be equal on all ranks.

    void launch_layout(LayoutParams params, cudaStream_t stream);
    // Returns the number for wait_for_exchange. capacity: rows of the outputs, -1: not allocated yet.
    uint32_t launch_exchange(ExchangeParams params, const std::vector<int64_t>& agreed, int64_t num_tokens,
                             int64_t capacity, cudaStream_t stream);
    // Rows that this rank receives, -1 if the exchange failed: see take_error. Throws if it does not end.
    int64_t wait_for_exchange(uint32_t number, cudaStream_t stream) const;
    // landing: addresses in this rank's window of the arrays that peers may write, in the order of Array, 0 for none;
    // all 0: rows are staged.
    void launch_dispatch(DispatchParams params, const std::vector<int64_t>& agreed,
                         const std::vector<uintptr_t>& landing, bool behind_exchange, int num_blocks,
                         cudaStream_t stream);
    void launch_combine(CombineParams params, const std::vector<int64_t>& agreed, int num_blocks, cudaStream_t stream);
    // behind_exchange: in place of the dispatch that follows an exchange.
    void launch_reject(int operation, const std::string& text, bool behind_exchange, cudaStream_t stream);

    // --- low-latency calls. halves: kSendHalf, kReceiveHalf or both.

    // Where every rank's region lies, as this process sees it, and how many bytes it has. Peers may write it only after
    // all ranks have come back from here.
    void set_regions(const std::vector<uintptr_t>& regions, int64_t num_bytes, int64_t most_tagged_bytes,
                     bool may_mask);
    // Reaches ranks (a bit each) by puts; pes: of all ranks; queue_pairs: handles, which the blocks of a kernel share
    // out among them, if there are any; launchers: of the module that has kernels with puts. Before the first call.
    void set_puts(uint32_t ranks, const std::vector<int>& pes, const std::vector<int>& queue_pairs,
                  const LowLatencyLaunchers& launchers);
    // scale_bytes: for each 128 channels of e4m3; 0: bf16. routing: laid out as RoutingParts.
    void launch_low_latency_dispatch(LowLatencyDispatchParams params, int scale_bytes,
                                     const std::vector<int64_t>& agreed, uint8_t* routing, int halves,
                                     cudaStream_t stream);
    void launch_low_latency_combine(LowLatencyCombineParams params, const std::vector<int64_t>& agreed,
                                    const uint8_t* routing, int halves, cudaStream_t stream);
    // Ranks that low-latency calls go on without (a bit each): masks more of them; writes who is, [num_ranks].
    void mask_ranks(uint32_t ranks, cudaStream_t stream);
    void query_masks(uintptr_t masked, cudaStream_t stream);
    // What low-latency calls have come to: the highest number of a call, and who is masked. Waits for all kernels.
    std::pair<uint64_t, uint32_t> low_latency_state() const;
    // Goes on from that number, without these ranks. No rank that takes part has a kernel under way.
    void restart_low_latency(uint64_t epoch, uint32_t masked);
    void launch_low_latency_reject(int operation, const std::string& text, cudaStream_t stream);

    // --- reports

    bool has_error() const;
    bool has_timeout() const;
    // The error that kernels reported, once.
    std::optional<ErrorRecord> take_error();
    const HostRecord& host_record() const { return *host_; }
    // Passes of all calls of an operation, and of the last one. Waits for the device.
    std::pair<uint64_t, uint64_t> passes(int operation) const;

   private:
    Call make_call(Operation operation, const std::vector<int64_t>& agreed, int64_t num_tokens, int64_t capacity) const;
    Stage make_stage(int64_t slot_bytes) const;
    int limit_blocks(int num_blocks) const;
    // Whether this is another rank of this rank's node.
    bool is_local_peer(int rank) const { return rank != rank_ && node_of_rank_[rank] == node_of_rank_[rank_]; }
    void fill_low_latency_call(LowLatencyCall& call, LowLatencyKind kind, const std::vector<int64_t>& agreed,
                               int halves) const;

    int rank_, num_ranks_, device_;
    std::vector<int> node_of_rank_;
    int64_t window_bytes_, stage_bytes_;
    double timeout_;
    bool shares_gpu_, bulk_copies_, begins_early_ = false;
    int link_rate_;
    uint32_t stress_seed_;
    int32_t mutation_;
    int num_sms_ = 0;
    std::shared_ptr<Window> window_;
    std::vector<uint8_t*> windows_;  // of all ranks, as this process sees them; null: of another node
    LocalState* state_ = nullptr;
    std::vector<uint8_t*> regions_;  // of all ranks, for low-latency calls
    int64_t region_bytes_ = 0;
    LowLatencyState* low_latency_state_ = nullptr;
    int64_t most_tagged_bytes_ = -1;  // negative: kMostTaggedBytes
    bool may_mask_ = false;
    uint32_t put_ranks_ = 0;
    const LowLatencyLaunchers* launchers_ = &low_latency_launchers();
    HostRecord* host_ = nullptr;
    HostRecord* host_on_device_ = nullptr;
    uint32_t num_exchanges_ = 0;
    bool available_ = false;
    bool took_timeout_ = false;
};

}  // namespace hpc_moe::cuda
