// What the parts of the module share. Each is a header, so that pybind11's are read once: they take
// longer to compile than anything else here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "pointer.h"
#include "rows.h"

namespace py = pybind11;

namespace stellarator::bindings {

using AddressAndStride = std::pair<uintptr_t, int64_t>;  // of the rows of a matrix; zeros for none

inline Rows rows(const AddressAndStride& x) { return {pointer<const void>(x.first), x.second}; }

}  // namespace stellarator::bindings
