// The parts of the module: one function for each file of this folder.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "pointer.h"
#include "rows.h"

namespace stellarator {

using AddressAndStride = std::pair<uintptr_t, int64_t>;  // of the rows of a matrix; zeros for none

inline Rows rows(const AddressAndStride& x) { return {pointer<const void>(x.first), x.second}; }

void bind_attention(pybind11::module_& m);
void bind_bias_gelu(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_weight_gradient(pybind11::module_& m);

}  // namespace stellarator
