// Python bindings. Python passes addresses (of torch and numpy memory that it keeps alive), sizes and strides; nothing
// here allocates what Python sees, and the core knows neither torch nor MPI. Functions that move data release the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/addresses.h"
#include "cpu/convert.h"
#include "cpu/layout.h"
#include "cpu/packet.h"
#include "cpu/reduce.h"
#include "cpu/rows.h"
#include "cpu/runtime.h"
#ifdef HPC_MOE_CUDA
#include "cuda/bindings.h"
#endif
#ifdef HPC_MOE_NVSHMEM
#include <non_abi/nvshmem_version.h>
#endif

namespace py = pybind11;

namespace hpc_moe {
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// A packet that lies at `base`, as its writer left it.
Packet packet_at(const PacketShape& shape, uintptr_t base) {
    int64_t num_rows;
    std::memcpy(&num_rows, at<uint8_t>(base), sizeof num_rows);
    return Packet(shape, num_rows, at<uint8_t>(base));
}

// A packet of `num_rows` rows whose arrays the caller fills.
Packet begin_packet_at(const PacketShape& shape, int64_t num_rows, uintptr_t base) {
    return begin_packet(shape, num_rows, at<uint8_t>(base));
}

void bind_rows(py::module_& module) {
    py::class_<PacketShape>(module, "PacketShape")
        .def(py::init<>())
        .def_readwrite("row_bytes", &PacketShape::row_bytes)
        .def_readwrite("scale_bytes", &PacketShape::scale_bytes)
        .def_readwrite("num_topk", &PacketShape::num_topk)
        .def_readwrite("mask_bytes", &PacketShape::mask_bytes)
        .def_readwrite("has_source_index", &PacketShape::has_source_index)
        .def_readwrite("has_topk_index", &PacketShape::has_topk_index)
        .def_readwrite("has_weights", &PacketShape::has_weights)
        .def("bytes", &packet_bytes, py::arg("num_rows"))
        .def("capacity", &packet_capacity, py::arg("bytes"));

    py::class_<Packet>(module, "Packet")
        .def_static("at", &packet_at, py::arg("shape"), py::arg("base"))
        .def_static("begin", &begin_packet_at, py::arg("shape"), py::arg("num_rows"), py::arg("base"))
        .def_readonly("num_rows", &Packet::num_rows)
        .def_property_readonly("rows", [](const Packet& self) { return reinterpret_cast<uintptr_t>(self.rows); })
        .def_property_readonly("masks", [](const Packet& self) { return reinterpret_cast<uintptr_t>(self.masks); })
        .def_property_readonly("source_index",
                               [](const Packet& self) { return reinterpret_cast<uintptr_t>(self.source_index); })
        .def_property_readonly("topk_weights",
                               [](const Packet& self) { return reinterpret_cast<uintptr_t>(self.topk_weights); });

    py::class_<RowView> view(module, "RowView");
    view.def(py::init<>())
        .def_static("of_packet", &view_of_packet, py::arg("shape"), py::arg("packet"))
        .def_readwrite("num_rows", &RowView::num_rows)
        .def_readwrite("row_stride", &RowView::row_stride)
        .def_readwrite("scale_row_stride", &RowView::scale_row_stride)
        .def_readwrite("scale_column_stride", &RowView::scale_column_stride);
    def_address(view, "selection", &RowView::selection);
    def_address(view, "rows", &RowView::rows);
    def_address(view, "scales", &RowView::scales);
    def_address(view, "source_index", &RowView::source_index);
    def_address(view, "topk_index", &RowView::topk_index);
    def_address(view, "topk_weights", &RowView::topk_weights);

    py::class_<DispatchOutput> output(module, "DispatchOutput");
    output.def(py::init<>())
        .def_readwrite("scale_block_rows", &DispatchOutput::scale_block_rows)
        .def_readwrite("scale_block_stride", &DispatchOutput::scale_block_stride)
        .def_readwrite("scale_row_stride", &DispatchOutput::scale_row_stride)
        .def_readwrite("scale_column_stride", &DispatchOutput::scale_column_stride)
        .def_readwrite("first_expert", &DispatchOutput::first_expert)
        .def_readwrite("num_local_experts", &DispatchOutput::num_local_experts)
        .def_readwrite("num_topk", &DispatchOutput::num_topk)
        .def_readwrite("grouped", &DispatchOutput::grouped)
        .def_readwrite("know_grouped_rows", &DispatchOutput::know_grouped_rows);
    def_address(output, "rows", &DispatchOutput::rows);
    def_address(output, "scales", &DispatchOutput::scales);
    def_address(output, "token_source", &DispatchOutput::token_source);
    def_address(output, "topk_index", &DispatchOutput::topk_index);
    def_address(output, "topk_weights", &DispatchOutput::topk_weights);
    def_address(output, "grouped_rows", &DispatchOutput::grouped_rows);
    def_address(output, "token_topk_weights", &DispatchOutput::token_topk_weights);
    def_address(output, "row_source", &DispatchOutput::row_source);
}

void bind_reduce(py::module_& module) {
    py::class_<Contribution> contribution(module, "Contribution");
    contribution.def(py::init([](uintptr_t rows, int64_t row_stride, bool is_float32, uintptr_t topk_weights) {
                         return Contribution{at<uint8_t>(rows), row_stride,
                                             is_float32 ? Element::kFloat32 : Element::kBf16, at<float>(topk_weights)};
                     }),
                     py::arg("rows") = 0, py::arg("row_stride") = 0, py::arg("is_float32") = false,
                     py::arg("topk_weights") = 0);

    py::class_<CombineOutput> output(module, "CombineOutput");
    output.def(py::init<>())
        .def_readwrite("num_topk", &CombineOutput::num_topk)
        .def_readwrite("hidden", &CombineOutput::hidden)
        .def_property(
            "is_float32", [](const CombineOutput& self) { return self.element == Element::kFloat32; },
            [](CombineOutput& self, bool value) { self.element = value ? Element::kFloat32 : Element::kBf16; })
        .def("add_bias", [](CombineOutput& self, uintptr_t address) { self.biases.push_back(at<uint16_t>(address)); });
    def_address(output, "rows", &CombineOutput::rows);
    def_address(output, "topk_weights", &CombineOutput::topk_weights);

    module.def(
        "combine_by_flags",
        [](const std::vector<Contribution>& contributions, uintptr_t flags, int64_t flags_stride, int64_t num_tokens,
           const CombineOutput& output, int num_threads) {
            combine_by_flags(contributions, at<bool>(flags), flags_stride, num_tokens, output, num_threads);
        },
        py::arg("contributions"), py::arg("flags"), py::arg("flags_stride"), py::arg("num_tokens"), py::arg("output"),
        py::arg("num_threads"), ReleaseGil());
    module.def(
        "combine_by_expert",
        [](const std::vector<Contribution>& contributions, const std::vector<bool>& skip, uintptr_t topk_index,
           uintptr_t topk_weights, int64_t num_tokens, int64_t num_topk, int64_t experts_per_rank,
           const CombineOutput& output, int num_threads) {
            combine_by_expert(contributions, skip, at<int64_t>(topk_index), at<float>(topk_weights), num_tokens,
                              num_topk, experts_per_rank, output, num_threads);
        },
        py::arg("contributions"), py::arg("skip"), py::arg("topk_index"), py::arg("topk_weights"),
        py::arg("num_tokens"), py::arg("num_topk"), py::arg("experts_per_rank"), py::arg("output"),
        py::arg("num_threads"), ReleaseGil());
    module.def(
        "combine_grouped",
        [](uintptr_t x, int64_t x_row_stride, uintptr_t grouped_rows, uintptr_t token_weights, int64_t begin,
           int64_t num_tokens, int64_t num_topk, const CombineOutput& output, int num_threads) {
            combine_grouped(at<uint16_t>(x), x_row_stride, at<int32_t>(grouped_rows), at<float>(token_weights), begin,
                            num_tokens, num_topk, output, num_threads);
        },
        py::arg("x"), py::arg("x_row_stride"), py::arg("grouped_rows"), py::arg("token_weights"), py::arg("begin"),
        py::arg("num_tokens"), py::arg("num_topk"), py::arg("output"), py::arg("num_threads"), ReleaseGil());
}

void bind_convert(py::module_& module) {
    module.def(
        "cast_to_fp8",
        [](uintptr_t x, int64_t x_row_stride, int64_t num_rows, int64_t hidden, bool round_scale, bool use_ue8m0,
           uintptr_t q, uintptr_t scales, int num_threads) {
            cast_to_fp8({at<uint16_t>(x), x_row_stride, num_rows, hidden, round_scale, use_ue8m0, at<uint8_t>(q),
                         at<void>(scales)},
                        num_threads);
        },
        py::arg("x"), py::arg("x_row_stride"), py::arg("num_rows"), py::arg("hidden"), py::arg("round_scale"),
        py::arg("use_ue8m0"), py::arg("q"), py::arg("scales"), py::arg("num_threads"), ReleaseGil());
    module.def(
        "encode_logfmt",
        [](uintptr_t x, int64_t x_row_stride, uintptr_t selection, int64_t num_rows, int64_t hidden, uintptr_t target) {
            return encode_logfmt(at<uint16_t>(x), x_row_stride, at<int32_t>(selection), num_rows, hidden,
                                 at<uint8_t>(target));
        },
        py::arg("x"), py::arg("x_row_stride"), py::arg("selection"), py::arg("num_rows"), py::arg("hidden"),
        py::arg("target"), ReleaseGil());
    module.def("logfmt_row_bytes_limit", &logfmt_row_bytes_limit, py::arg("hidden"));
    module.def(
        "decode_logfmt",
        [](uintptr_t encoded, int64_t num_rows, int64_t hidden, uintptr_t rows) {
            decode_logfmt(at<uint8_t>(encoded), num_rows, hidden, at<float>(rows));
        },
        py::arg("encoded"), py::arg("num_rows"), py::arg("hidden"), py::arg("rows"), ReleaseGil());
}

// Tokens of this rank in [first, last) that go to any of `ranks`, as a packet at `base`. Returns its bytes.
int64_t pack_tokens(const CpuRuntime& self, const PacketShape& shape, RowView tokens, uintptr_t is_token_in_rank,
                    const std::vector<int>& ranks, int64_t first, int64_t last, uintptr_t base) {
    const auto* flags = at<bool>(is_token_in_rank);
    const std::vector<int32_t> selected = select_tokens(flags, self.num_ranks(), ranks, first, last);
    tokens.num_rows = static_cast<int64_t>(selected.size());
    tokens.selection = selected.data();
    const int64_t bytes = write_packet(shape, tokens, at<uint8_t>(base), self.num_threads());
    if (shape.mask_bytes) write_masks(shape, flags, self.num_ranks(), ranks, selected, at<uint8_t>(base));
    return bytes;
}

// Delivers rows as received tokens from `begin` on, which must end at or before `end`: nothing is written otherwise.
int64_t deliver_within(const CpuRuntime& self, const PacketShape& shape, const RowView& view,
                       const DispatchOutput& output, int64_t begin, int64_t end, uintptr_t next_row) {
    if (view.num_rows > end - begin) {
        throw std::runtime_error("more rows arrived than were announced: " + std::to_string(view.num_rows) + " where " +
                                 std::to_string(end - begin) + " were expected");
    }
    deliver(shape, view, output, begin, at<int64_t>(next_row), self.num_threads());
    return view.num_rows;
}

// This rank's own share of its tokens in [first, last), delivered without a packet. Returns the number of rows.
int64_t deliver_own(const CpuRuntime& self, const PacketShape& shape, RowView tokens, uintptr_t is_token_in_rank,
                    int64_t first, int64_t last, const DispatchOutput& output, int64_t begin, int64_t end,
                    uintptr_t next_row) {
    const std::vector<int32_t> selected =
        select_tokens(at<bool>(is_token_in_rank), self.num_ranks(), {self.rank()}, first, last);
    tokens.num_rows = static_cast<int64_t>(selected.size());
    tokens.selection = selected.data();
    return deliver_within(self, shape, tokens, output, begin, end, next_row);
}

// A packet's rows whose mask has bit `bit` (-1: all rows), delivered. Returns the number of rows.
int64_t deliver_packet(const CpuRuntime& self, const PacketShape& shape, uintptr_t base, int bit,
                       const DispatchOutput& output, int64_t begin, int64_t end, uintptr_t next_row) {
    const Packet packet = packet_at(shape, base);
    RowView view = view_of_packet(shape, packet);
    std::vector<int32_t> selected;
    if (bit >= 0) {
        selected = select_by_mask(shape, packet, bit);
        view.num_rows = static_cast<int64_t>(selected.size());
        view.selection = selected.data();
    }
    return deliver_within(self, shape, view, output, begin, end, next_row);
}

// The rows of the packet at `base` whose mask has bit `bit`, written as a packet of shape `target_shape`.
void forward_packet(const CpuRuntime& self, const PacketShape& shape, uintptr_t base, int bit,
                    const PacketShape& target_shape, uintptr_t target) {
    const Packet packet = packet_at(shape, base);
    const std::vector<int32_t> selected = select_by_mask(shape, packet, bit);
    RowView view = view_of_packet(shape, packet);
    view.num_rows = static_cast<int64_t>(selected.size());
    view.selection = selected.data();
    write_packet(target_shape, view, at<uint8_t>(target), self.num_threads());
}

// Rows as they are, from consecutive memory. Returns the packet's bytes.
int64_t write_rows(const CpuRuntime& self, const PacketShape& shape, const RowView& view, uintptr_t base) {
    return write_packet(shape, view, at<uint8_t>(base), self.num_threads());
}

std::string layout(const CpuRuntime& self, uintptr_t topk_index, int64_t num_tokens, int64_t num_topk,
                   int64_t num_experts, uintptr_t per_rank, uintptr_t per_node, uintptr_t per_expert,
                   uintptr_t is_token_in_rank) {
    return compute_layout(
        {at<int64_t>(topk_index), num_tokens, num_topk, num_experts, self.num_ranks(), &self.node_of_rank(),
         self.get_num_rdma_ranks()},
        {at<int32_t>(per_rank), at<int32_t>(per_node), at<int32_t>(per_expert), at<bool>(is_token_in_rank)});
}

void bind_runtime(py::module_& module) {
    py::class_<CpuRuntime>(module, "CpuRuntime")
        .def(py::init<int, std::vector<int>, std::vector<uintptr_t>, int64_t, bool, int>(), py::arg("rank"),
             py::arg("node_of_rank"), py::arg("local_windows"), py::arg("window_bytes"), py::arg("low_latency_mode"),
             py::arg("num_threads"))
        .def("get_local_device_id", &CpuRuntime::get_local_device_id)
        .def("get_local_device_uuid", [](const CpuRuntime& self) { return to_bytes(self.get_local_device_uuid()); })
        .def("get_local_ipc_handle", [](const CpuRuntime& self) { return to_bytes(self.get_local_ipc_handle()); })
        .def("get_num_rdma_ranks", &CpuRuntime::get_num_rdma_ranks)
        .def("get_rdma_rank", &CpuRuntime::get_rdma_rank)
        .def("get_root_rdma_rank", &CpuRuntime::get_root_rdma_rank)
        .def("get_local_nvshmem_unique_id",
             [](const CpuRuntime& self) { return to_bytes(self.get_local_nvshmem_unique_id()); })
        .def(
            "sync",
            [](CpuRuntime& self, const std::vector<int>& device_ids, const std::vector<py::bytes>& ipc_handles,
               const py::bytes& root_unique_id) {
                self.sync(device_ids, {ipc_handles.begin(), ipc_handles.end()}, root_unique_id);
            },
            py::arg("device_ids"), py::arg("ipc_handles"), py::arg("root_unique_id"))
        .def("is_available", &CpuRuntime::is_available)
        .def(
            "check_peers", [](const CpuRuntime&, const py::list&) {}, py::arg("uuids"))
        .def("destroy", &CpuRuntime::destroy)
        .def_property_readonly("num_threads", &CpuRuntime::num_threads)
        .def_property_readonly("slot_bytes", &CpuRuntime::slot_bytes)
        .def(
            "slot",
            [](const CpuRuntime& self, int owner, int parity, int slot) {
                return reinterpret_cast<uintptr_t>(self.slot(owner, parity, slot));
            },
            py::arg("owner"), py::arg("parity"), py::arg("slot"))
        .def("layout", &layout, py::arg("topk_index"), py::arg("num_tokens"), py::arg("num_topk"),
             py::arg("num_experts"), py::arg("per_rank"), py::arg("per_node"), py::arg("per_expert"),
             py::arg("is_token_in_rank"), ReleaseGil())
        .def("pack_tokens", &pack_tokens, py::arg("shape"), py::arg("tokens"), py::arg("is_token_in_rank"),
             py::arg("ranks"), py::arg("first"), py::arg("last"), py::arg("base"), ReleaseGil())
        .def("deliver_own", &deliver_own, py::arg("shape"), py::arg("tokens"), py::arg("is_token_in_rank"),
             py::arg("first"), py::arg("last"), py::arg("output"), py::arg("begin"), py::arg("end"),
             py::arg("next_row"), ReleaseGil())
        .def("deliver_packet", &deliver_packet, py::arg("shape"), py::arg("base"), py::arg("bit"), py::arg("output"),
             py::arg("begin"), py::arg("end"), py::arg("next_row"), ReleaseGil())
        .def("forward_packet", &forward_packet, py::arg("shape"), py::arg("base"), py::arg("bit"),
             py::arg("target_shape"), py::arg("target"), ReleaseGil())
        .def("write_rows", &write_rows, py::arg("shape"), py::arg("view"), py::arg("base"), ReleaseGil());
    module.def(
        "count_local_experts",
        [](const RowView& view, int64_t num_topk, int64_t first_expert, int64_t num_local_experts, uintptr_t counts) {
            count_local_experts(view, num_topk, first_expert, num_local_experts, at<int64_t>(counts));
        },
        py::arg("view"), py::arg("num_topk"), py::arg("first_expert"), py::arg("num_local_experts"), py::arg("counts"));
}

// The version of the NVSHMEM headers that this was built with, empty without any.
std::string nvshmem_build_version() {
#ifdef HPC_MOE_NVSHMEM
    return std::to_string(NVSHMEM_VENDOR_MAJOR_VERSION) + "." + std::to_string(NVSHMEM_VENDOR_MINOR_VERSION) + "." +
           std::to_string(NVSHMEM_VENDOR_PATCH_VERSION);
#else
    return "";
#endif
}

}  // namespace
}  // namespace hpc_moe

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C++ core of hpc_moe. Internal: the interface may change with any version.";
    hpc_moe::bind_rows(module);
    hpc_moe::bind_reduce(module);
    hpc_moe::bind_convert(module);
    hpc_moe::bind_runtime(module);
#ifdef HPC_MOE_CUDA
    hpc_moe::cuda::bind_cuda(module);
#endif
    module.attr("__version__") = HPC_MOE_VERSION;
    module.attr("cuda_archs") = HPC_MOE_CUDA_ARCHS;
    module.attr("nvshmem_build_version") = hpc_moe::nvshmem_build_version();
}
