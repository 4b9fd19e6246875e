// Python bindings of all that links to NVSHMEM: the module hpc_moe._nvshmem, apart from hpc_moe._C so that the latter
// can be imported where there is no libnvshmem_host. Memory is passed as addresses. Functions that may wait release the
// GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/addresses.h"
#include "cuda/low_latency.h"
#include "nvshmem/probe.h"
#include "nvshmem/world.h"

namespace py = pybind11;

namespace hpc_moe::nvshmem {
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

auto as_tuple(const Version& version) { return std::make_tuple(version[0], version[1], version[2]); }

UniqueId to_unique_id(const std::string& bytes) {
    UniqueId id;
    if (bytes.size() != id.size()) {
        throw std::invalid_argument("unique_id must have " + std::to_string(id.size()) + " bytes; got " +
                                    std::to_string(bytes.size()));
    }
    std::copy(bytes.begin(), bytes.end(), id.begin());
    return id;
}

void bind_world(py::module_& module) {
    module.def("built_version", [] { return as_tuple(built_version()); });
    module.def("built_path", &built_path);
    module.def("loaded_version", [] { return as_tuple(loaded_version()); });
    module.def("loaded_path", &loaded_path);
    module.def("environment", &environment, py::arg("names"));
    module.def("get_unique_id", [] { return to_bytes(get_unique_id()); });
    module.def(
        "init",
        [](const py::bytes& unique_id, int pe, int num_pes, int device) {
            const UniqueId id = to_unique_id(unique_id);
            py::gil_scoped_release release;
            init(id, pe, num_pes, device);
        },
        py::arg("unique_id"), py::arg("pe"), py::arg("num_pes"), py::arg("device"));
    module.def("low_latency_launchers", [] { return reinterpret_cast<uintptr_t>(&cuda::low_latency_launchers()); });
    module.def("is_running", &is_running);
    module.def("finalize", &finalize, py::arg("device"), ReleaseGil());
    module.def("my_pe", &my_pe);
    module.def("n_pes", &n_pes);
    module.def(
        "malloc", [](size_t num_bytes, int device) { return reinterpret_cast<uintptr_t>(malloc(num_bytes, device)); },
        py::arg("num_bytes"), py::arg("device"), ReleaseGil());
    module.def(
        "free", [](uintptr_t address, int device) { free(at<void>(address), device); }, py::arg("address"),
        py::arg("device"), ReleaseGil());
    module.def("create_queue_pairs", &create_queue_pairs, py::arg("count"), py::arg("device"), ReleaseGil());
    module.def(
        "ptr", [](uintptr_t address, int pe) { return reinterpret_cast<uintptr_t>(ptr(at<void>(address), pe)); },
        py::arg("address"), py::arg("pe"));
}

void bind_probe(py::module_& module) {
    module.def(
        "launch_probe",
        [](uintptr_t inbox, uintptr_t outbox, uintptr_t signal, size_t num_bytes, int target, uint64_t value,
           double timeout, uintptr_t found, uintptr_t stream) {
            ProbeParams params;
            params.inbox = at<void>(inbox);
            params.outbox = at<void>(outbox);
            params.signal = at<uint64_t>(signal);
            params.num_bytes = num_bytes;
            params.target = target;
            params.value = value;
            params.timeout = static_cast<uint64_t>(std::min(timeout, 1e9) * 1e9);
            params.found = at<uint64_t>(found);
            if (target < 0 || target >= n_pes()) throw std::invalid_argument("target: there is no such PE");
            launch_probe(params, reinterpret_cast<cudaStream_t>(stream));
        },
        py::kw_only(), py::arg("inbox"), py::arg("outbox"), py::arg("signal"), py::arg("num_bytes"), py::arg("target"),
        py::arg("value"), py::arg("timeout"), py::arg("found"), py::arg("stream"));
}

}  // namespace
}  // namespace hpc_moe::nvshmem

PYBIND11_MODULE(_nvshmem, module) {
    module.doc() = "All of hpc_moe that links to NVSHMEM. Internal: the interface may change with any version.";
    hpc_moe::nvshmem::bind_world(module);
    hpc_moe::nvshmem::bind_probe(module);
}
