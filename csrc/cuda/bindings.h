// Python bindings of the CUDA runtime.
#pragma once

#include <pybind11/pybind11.h>

namespace hpc_moe::cuda {

void bind_cuda(pybind11::module_& module);

}  // namespace hpc_moe::cuda
