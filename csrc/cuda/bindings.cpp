#include "cuda/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/addresses.h"
#include "cuda/runtime.h"

namespace py = pybind11;

namespace hpc_moe::cuda {
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

cudaStream_t stream_at(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

void bind_layout(py::module_& module) {
    py::class_<LayoutParams> params(module, "LayoutParams");
    params.def(py::init<>())
        .def_readwrite("num_tokens", &LayoutParams::num_tokens)
        .def_readwrite("num_experts", &LayoutParams::num_experts)
        .def_readwrite("top_k", &LayoutParams::top_k)
        .def_readwrite("report", &LayoutParams::report);
    def_address(params, "topk_idx", &LayoutParams::topk_idx);
    def_address(params, "given_in_rank", &LayoutParams::given_in_rank);
    def_address(params, "given_per_rank", &LayoutParams::given_per_rank);
    def_address(params, "given_per_expert", &LayoutParams::given_per_expert);
    def_address(params, "in_rank", &LayoutParams::in_rank);
    def_address(params, "send_position", &LayoutParams::send_position);
    def_address(params, "expert_position", &LayoutParams::expert_position);
    def_address(params, "per_rank", &LayoutParams::per_rank);
    def_address(params, "per_expert", &LayoutParams::per_expert);
    def_address(params, "chunk_counts", &LayoutParams::chunk_counts);
}

void bind_exchange(py::module_& module) {
    py::class_<ExchangeParams> params(module, "ExchangeParams");
    params.def(py::init<>())
        .def_readwrite("num_local_experts", &ExchangeParams::num_local_experts)
        .def_readwrite("expert_alignment", &ExchangeParams::expert_alignment)
        .def_readwrite("grouped", &ExchangeParams::grouped)
        .def_readwrite("values_matter", &ExchangeParams::values_matter);
    def_address(params, "per_rank", &ExchangeParams::per_rank);
    def_address(params, "per_expert", &ExchangeParams::per_expert);
    def_address(params, "rank_prefix_matrix", &ExchangeParams::rank_prefix_matrix);
    def_address(params, "recv_rank_prefix_sum", &ExchangeParams::recv_rank_prefix_sum);
    def_address(params, "aligned_per_expert", &ExchangeParams::aligned_per_expert);
    def_address(params, "expert_ranges", &ExchangeParams::expert_ranges);
    def_address(params, "source_begin", &ExchangeParams::source_begin);
}

void bind_dispatch(py::module_& module) {
    py::class_<DispatchParams> params(module, "DispatchParams");
    params.def(py::init<>())
        .def_readwrite("num_tokens", &DispatchParams::num_tokens)
        .def_readwrite("row_bytes", &DispatchParams::row_bytes)
        .def_readwrite("num_scales", &DispatchParams::num_scales)
        .def_readwrite("top_k", &DispatchParams::top_k)
        .def_readwrite("experts_per_rank", &DispatchParams::experts_per_rank)
        .def_readwrite("num_rows", &DispatchParams::num_rows)
        .def_readwrite("has_topk_index", &DispatchParams::has_topk_index)
        .def_readwrite("has_topk_weights", &DispatchParams::has_topk_weights)
        .def_readwrite("grouped", &DispatchParams::grouped)
        .def_readwrite("cached", &DispatchParams::cached)
        .def_readwrite("marks_unused", &DispatchParams::marks_unused)
        .def_readwrite("x_stride", &DispatchParams::x_stride)
        .def_readwrite("scale_token_stride", &DispatchParams::scale_token_stride)
        .def_readwrite("scale_channel_stride", &DispatchParams::scale_channel_stride);
    def_address(params, "x", &DispatchParams::x);
    def_address(params, "scales", &DispatchParams::scales);
    def_address(params, "topk_index", &DispatchParams::topk_index);
    def_address(params, "topk_weights", &DispatchParams::topk_weights);
    def_address(params, "send_position", &DispatchParams::send_position);
    def_address(params, "expert_position", &DispatchParams::expert_position);
    def_address(params, "rank_prefix_matrix", &DispatchParams::rank_prefix_matrix);
    def_address(params, "source_begin", &DispatchParams::source_begin);
    def_address(params, "expert_ranges", &DispatchParams::expert_ranges);
    def_address(params, "recv_rows", &DispatchParams::recv_rows);
    def_address(params, "recv_scales", &DispatchParams::recv_scales);
    def_address(params, "recv_topk_index", &DispatchParams::recv_topk_index);
    def_address(params, "recv_topk_weights", &DispatchParams::recv_topk_weights);
    def_address(params, "recv_source_index", &DispatchParams::recv_source_index);
    def_address(params, "grouped_rows", &DispatchParams::grouped_rows);
}

void bind_combine(py::module_& module) {
    py::class_<CombineParams> params(module, "CombineParams");
    params.def(py::init<>())
        .def_readwrite("num_tokens", &CombineParams::num_tokens)
        .def_readwrite("row_bytes", &CombineParams::row_bytes)
        .def_readwrite("top_k", &CombineParams::top_k)
        .def_readwrite("has_weights", &CombineParams::has_weights)
        .def_readwrite("grouped", &CombineParams::grouped)
        .def_readwrite("x_stride", &CombineParams::x_stride)
        .def("set_bias", [](CombineParams& self, int index, uintptr_t address) {
            self.biases[index & 1] = at<const uint8_t>(address);
        });
    def_address(params, "x", &CombineParams::x);
    def_address(params, "topk_weights", &CombineParams::topk_weights);
    def_address(params, "recv_source_index", &CombineParams::recv_source_index);
    def_address(params, "grouped_rows", &CombineParams::grouped_rows);
    def_address(params, "rank_prefix_matrix", &CombineParams::rank_prefix_matrix);
    def_address(params, "send_position", &CombineParams::send_position);
    def_address(params, "combined", &CombineParams::combined);
    def_address(params, "combined_weights", &CombineParams::combined_weights);
}

template <typename Params>
void def_low_latency_call(py::class_<Params>& params) {
    params.def(py::init<>())
        .def_property(
            "num_tokens", [](const Params& self) { return self.call.num_tokens; },
            [](Params& self, int32_t value) { self.call.num_tokens = value; })
        .def_property(
            "num_max_tokens", [](const Params& self) { return self.call.num_max_tokens; },
            [](Params& self, int32_t value) { self.call.num_max_tokens = value; })
        .def_property(
            "hidden", [](const Params& self) { return self.call.hidden; },
            [](Params& self, int32_t value) { self.call.hidden = value; })
        .def_property(
            "top_k", [](const Params& self) { return self.call.top_k; },
            [](Params& self, int32_t value) { self.call.top_k = value; })
        .def_property(
            "num_local_experts", [](const Params& self) { return self.call.num_local_experts; },
            [](Params& self, int32_t value) { self.call.num_local_experts = value; })
        .def_property(
            "weighted", [](const Params& self) { return self.call.weighted; },
            [](Params& self, bool value) { self.call.weighted = value; });
}

void bind_low_latency(py::module_& module) {
    py::class_<LowLatencyDispatchParams> dispatch(module, "LowLatencyDispatchParams");
    def_low_latency_call(dispatch);
    dispatch.def_readwrite("round_scale", &LowLatencyDispatchParams::round_scale)
        .def_readwrite("use_ue8m0", &LowLatencyDispatchParams::use_ue8m0);

    py::class_<LowLatencyCombineParams> combine(module, "LowLatencyCombineParams");
    def_low_latency_call(combine);
    combine.def_readwrite("use_logfmt", &LowLatencyCombineParams::use_logfmt);

    py::class_<RoutingParts>(module, "RoutingParts")
        .def_readonly("layout_range", &RoutingParts::layout_range)
        .def_readonly("recv_count", &RoutingParts::recv_count)
        .def_readonly("recv_src_idx", &RoutingParts::recv_src_idx)
        .def_readonly("end", &RoutingParts::end);
    module.def(
        "lay_out_routing",
        [](const LowLatencyDispatchParams& params, int num_ranks) { return lay_out_routing(params.call, num_ranks); },
        py::arg("params"), py::arg("num_ranks"));
}

py::dict describe_error(const ErrorRecord& error, int num_ranks) {
    static const char* const kinds[] = {"", "timeout", "rejected", "bad value", "operations", "fields", "capacity"};
    static const char* const missing[] = {"entry", "row", "arrival", "drain"};
    py::dict out;
    py::list operations, fields;
    for (int rank = 0; rank < num_ranks; ++rank) {
        operations.append(static_cast<int>(error.operations[rank]));
        fields.append(std::vector<int64_t>(error.fields[rank], error.fields[rank] + kMaxFields));
    }
    out["kind"] = kinds[static_cast<int>(error.kind)];
    out["operation"] = static_cast<int>(error.operation);
    out["peer"] = error.peer;
    out["missing"] = missing[static_cast<int>(error.missing)];
    out["numbers"] = std::vector<uint64_t>(error.numbers, error.numbers + 2);
    out["operations"] = operations;
    out["fields"] = fields;
    out["text"] = py::str(error.text, strnlen(error.text, kTextBytes));
    return out;
}

void bind_runtime(py::module_& module) {
    py::class_<Window, std::shared_ptr<Window>>(module, "Window")
        .def_property_readonly("address",
                               [](const Window& self) { return reinterpret_cast<uintptr_t>(self.address()); })
        .def_property_readonly("num_bytes", &Window::num_bytes);

    py::class_<CudaRuntime>(module, "CudaRuntime")
        .def(py::init<int, std::vector<int>, int, int64_t, double, bool, bool, int, uint32_t, int32_t>(),
             py::arg("rank"), py::arg("node_of_rank"), py::arg("device"), py::arg("window_bytes"), py::arg("timeout"),
             py::arg("shares_gpu"), py::arg("bulk_copies"), py::arg("link_rate") = -1, py::arg("stress_seed") = 0,
             py::arg("mutation") = 0)
        .def("get_local_device_id", &CudaRuntime::get_local_device_id)
        .def("get_local_device_uuid", [](const CudaRuntime& self) { return to_bytes(self.get_local_device_uuid()); })
        .def("get_local_ipc_handle", [](const CudaRuntime& self) { return to_bytes(self.get_local_ipc_handle()); })
        .def("get_num_rdma_ranks", &CudaRuntime::get_num_rdma_ranks)
        .def("get_rdma_rank", &CudaRuntime::get_rdma_rank)
        .def("get_root_rdma_rank", &CudaRuntime::get_root_rdma_rank)
        .def("get_local_nvshmem_unique_id",
             [](const CudaRuntime& self) { return to_bytes(self.get_local_nvshmem_unique_id()); })
        .def(
            "check_peers",
            [](const CudaRuntime& self, const std::vector<py::bytes>& uuids) {
                self.check_peers({uuids.begin(), uuids.end()});
            },
            py::arg("uuids"))
        .def(
            "sync",
            [](CudaRuntime& self, const std::vector<int>& device_ids, const std::vector<py::bytes>& ipc_handles,
               const py::bytes& root_unique_id) {
                self.sync(device_ids, {ipc_handles.begin(), ipc_handles.end()}, root_unique_id);
            },
            py::arg("device_ids"), py::arg("ipc_handles"), py::arg("root_unique_id"))
        .def("is_available", &CudaRuntime::is_available)
        .def("close_peers", &CudaRuntime::close_peers)
        .def("free", &CudaRuntime::free)
        .def("destroy", &CudaRuntime::destroy)
        .def("abandon", &CudaRuntime::abandon)
        .def_property_readonly("window", &CudaRuntime::window)
        .def_property_readonly("control_bytes", [](const CudaRuntime&) { return kControlBytes; })
        .def_property_readonly("pool_offset", &CudaRuntime::pool_offset)
        .def_property_readonly("pool_bytes", &CudaRuntime::pool_bytes)
        .def("num_slots", &CudaRuntime::num_slots, py::arg("row_bytes"), py::arg("num_scales"), py::arg("top_k"))
        .def(
            "launch_layout",
            [](CudaRuntime& self, const LayoutParams& params, uintptr_t stream) {
                self.launch_layout(params, stream_at(stream));
            },
            py::arg("params"), py::arg("stream"))
        .def(
            "launch_exchange",
            [](CudaRuntime& self, const ExchangeParams& params, const std::vector<int64_t>& agreed, int64_t num_tokens,
               int64_t capacity, uintptr_t stream) {
                return self.launch_exchange(params, agreed, num_tokens, capacity, stream_at(stream));
            },
            py::arg("params"), py::arg("agreed"), py::arg("num_tokens"), py::arg("capacity"), py::arg("stream"))
        .def(
            "wait_for_exchange",
            [](const CudaRuntime& self, uint32_t number, uintptr_t stream) {
                return self.wait_for_exchange(number, stream_at(stream));
            },
            py::arg("number"), py::arg("stream"), ReleaseGil())
        .def(
            "launch_dispatch",
            [](CudaRuntime& self, const DispatchParams& params, const std::vector<int64_t>& agreed,
               const std::vector<uintptr_t>& landing, bool behind_exchange, int num_blocks, uintptr_t stream) {
                self.launch_dispatch(params, agreed, landing, behind_exchange, num_blocks, stream_at(stream));
            },
            py::arg("params"), py::arg("agreed"), py::arg("landing"), py::arg("behind_exchange"), py::arg("num_blocks"),
            py::arg("stream"))
        .def(
            "launch_combine",
            [](CudaRuntime& self, const CombineParams& params, const std::vector<int64_t>& agreed, int num_blocks,
               uintptr_t stream) { self.launch_combine(params, agreed, num_blocks, stream_at(stream)); },
            py::arg("params"), py::arg("agreed"), py::arg("num_blocks"), py::arg("stream"))
        .def(
            "launch_reject",
            [](CudaRuntime& self, int operation, const std::string& text, bool behind_exchange, uintptr_t stream) {
                self.launch_reject(operation, text, behind_exchange, stream_at(stream));
            },
            py::arg("operation"), py::arg("text"), py::arg("behind_exchange"), py::arg("stream"))
        .def("set_regions", &CudaRuntime::set_regions, py::arg("regions"), py::arg("num_bytes"),
             py::arg("most_tagged_bytes"), py::arg("may_mask"))
        .def(
            "set_puts",
            [](CudaRuntime& self, uint32_t ranks, const std::vector<int>& pes, const std::vector<int>& queue_pairs,
               uintptr_t launchers) {
                self.set_puts(ranks, pes, queue_pairs, *at<const LowLatencyLaunchers>(launchers));
            },
            py::arg("ranks"), py::arg("pes"), py::arg("queue_pairs"), py::arg("launchers"))
        .def(
            "mask_ranks",
            [](CudaRuntime& self, uint32_t ranks, uintptr_t stream) { self.mask_ranks(ranks, stream_at(stream)); },
            py::arg("ranks"), py::arg("stream"))
        .def(
            "query_masks",
            [](CudaRuntime& self, uintptr_t masked, uintptr_t stream) { self.query_masks(masked, stream_at(stream)); },
            py::arg("masked"), py::arg("stream"))
        .def("low_latency_state", &CudaRuntime::low_latency_state)
        .def("restart_low_latency", &CudaRuntime::restart_low_latency, py::arg("epoch"), py::arg("masked"))
        .def(
            "launch_low_latency_dispatch",
            [](CudaRuntime& self, LowLatencyDispatchParams params, int scale_bytes, const std::vector<int64_t>& agreed,
               uintptr_t x, int64_t x_stride, uintptr_t topk_index, uintptr_t topk_weights, uintptr_t recv_rows,
               uintptr_t recv_scales, uintptr_t routing, uintptr_t recv_stats, uintptr_t wait_stats, int halves,
               uintptr_t stream) {
                params.x = at<const uint8_t>(x), params.x_stride = x_stride;
                params.topk_index = at<const int64_t>(topk_index);
                params.topk_weights = at<const float>(topk_weights);
                params.recv_rows = at<uint8_t>(recv_rows), params.recv_scales = at<void>(recv_scales);
                params.recv_stats = at<int32_t>(recv_stats), params.wait_stats = at<int64_t>(wait_stats);
                self.launch_low_latency_dispatch(params, scale_bytes, agreed, at<uint8_t>(routing), halves,
                                                 stream_at(stream));
            },
            py::arg("params"), py::arg("scale_bytes"), py::arg("agreed"), py::arg("x"), py::arg("x_stride"),
            py::arg("topk_index"), py::arg("topk_weights"), py::arg("recv_rows"), py::arg("recv_scales"),
            py::arg("routing"), py::arg("recv_stats"), py::arg("wait_stats"), py::arg("halves"), py::arg("stream"))
        .def(
            "launch_low_latency_combine",
            [](CudaRuntime& self, LowLatencyCombineParams params, const std::vector<int64_t>& agreed, uintptr_t x,
               uintptr_t topk_index, uintptr_t topk_weights, uintptr_t routing, uintptr_t combined,
               uintptr_t wait_stats, int halves, uintptr_t stream) {
                params.x = at<const uint8_t>(x);
                params.topk_index = at<const int64_t>(topk_index);
                params.topk_weights = at<const float>(topk_weights);
                params.combined = at<uint8_t>(combined), params.wait_stats = at<int64_t>(wait_stats);
                self.launch_low_latency_combine(params, agreed, at<const uint8_t>(routing), halves, stream_at(stream));
            },
            py::arg("params"), py::arg("agreed"), py::arg("x"), py::arg("topk_index"), py::arg("topk_weights"),
            py::arg("routing"), py::arg("combined"), py::arg("wait_stats"), py::arg("halves"), py::arg("stream"))
        .def(
            "launch_low_latency_reject",
            [](CudaRuntime& self, int operation, const std::string& text, uintptr_t stream) {
                self.launch_low_latency_reject(operation, text, stream_at(stream));
            },
            py::arg("operation"), py::arg("text"), py::arg("stream"))
        .def("has_error", &CudaRuntime::has_error)
        .def("has_timeout", &CudaRuntime::has_timeout)
        .def(
            "take_error",
            [](CudaRuntime& self, int num_ranks) -> py::object {
                const std::optional<ErrorRecord> error = self.take_error();
                if (!error) return py::none();
                return describe_error(*error, num_ranks);
            },
            py::arg("num_ranks"))
        .def(
            "exchanged_counts",
            [](const CudaRuntime& self, int num_local_experts) {
                const HostRecord& host = self.host_record();
                return std::make_pair(host.num_recv_tokens,
                                      std::vector<int32_t>(host.per_expert, host.per_expert + num_local_experts));
            },
            py::arg("num_local_experts"))
        .def("passes", &CudaRuntime::passes, py::arg("operation"));
}

}  // namespace

void bind_cuda(py::module_& module) {
    bind_layout(module);
    bind_exchange(module);
    bind_dispatch(module);
    bind_combine(module);
    bind_low_latency(module);
    bind_runtime(module);
    module.def("layout_num_chunks", &layout_num_chunks, py::arg("num_tokens"));
    module.attr("CUDA_MAX_RANKS") = kMaxRanks;
    module.attr("CUDA_MAX_TOP_K") = kMaxTopK;
    module.attr("CUDA_MAX_LOCAL_EXPERTS") = kMaxLocalExperts;
    module.def(
        "low_latency_bytes",
        [](int num_max_tokens, int hidden, int top_k, int num_ranks, int num_put_ranks) {
            LowLatencyCall call{};
            call.put_ranks = (1u << num_put_ranks) - 1;
            call.num_max_tokens = num_max_tokens, call.hidden = hidden, call.top_k = top_k;
            call.call.num_ranks = num_ranks;
            return lay_out(call, kLowLatencyDispatch) - kLowLatencyFixedBytes;
        },
        py::arg("num_max_tokens"), py::arg("hidden"), py::arg("top_k"), py::arg("num_ranks"),
        py::arg("num_put_ranks") = 0);
    module.attr("LOW_LATENCY_FIXED_BYTES") = kLowLatencyFixedBytes;
    module.attr("MAX_LOW_LATENCY_RANKS") = kMaxLowLatencyRanks;
    module.attr("MAX_LOW_LATENCY_TOKENS") = kMaxLowLatencyTokens;
    module.attr("MAX_COMING_TOKENS") = kMaxComingTokens;
    module.attr("MAX_LOW_LATENCY_EXPERTS") = kMaxLowLatencyExperts;
    module.attr("MAX_LOW_LATENCY_TOP_K") = kMaxLowLatencyTopK;
#ifdef HPC_MOE_STRESS
    module.attr("is_stress_build") = true;
#else
    module.attr("is_stress_build") = false;
#endif
}

}  // namespace hpc_moe::cuda
