// The parts of the module: one function for each file of this folder.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace stellarator {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_attention(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);

}  // namespace stellarator
