// How Python hands over memory: as addresses, which are 0 for null.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

namespace hpc_moe {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A read-write property for a pointer member, seen from Python as an address.
template <typename Class, typename T>
void def_address(pybind11::class_<Class>& type, const char* name, T* Class::* member) {
    type.def_property(
        name, [member](const Class& self) { return reinterpret_cast<uintptr_t>(self.*member); },
        [member](Class& self, uintptr_t address) { self.*member = at<T>(address); });
}

template <size_t N>
pybind11::bytes to_bytes(const std::array<uint8_t, N>& array) {
    return pybind11::bytes(reinterpret_cast<const char*>(array.data()), N);
}

}  // namespace hpc_moe
