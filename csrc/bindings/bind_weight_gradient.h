// The product of a weight gradient.
#pragma once

#include "weight_gradient.h"

#include "bind.h"

namespace stellarator::bindings {

inline void run_weight_gradient(int64_t N, int64_t M, int64_t K, const AddressAndStride& dy,
                                const AddressAndStride& x, uintptr_t dweight, uintptr_t total,
                                uintptr_t workspace, int threads, Isa isa) {
    const WeightGradient call{N,
                              M,
                              K,
                              pointer<const uint16_t>(dy.first),
                              dy.second,
                              pointer<const uint16_t>(x.first),
                              x.second,
                              pointer<uint16_t>(dweight),
                              pointer<float>(total),
                              0};
    const py::gil_scoped_release without_gil;
    weight_gradient(call, pointer<void>(workspace), threads, isa);
}

inline void bind_weight_gradient(py::module_& m) {
    m.def("weight_gradient_workspace", &weight_gradient_workspace);
    m.def("weight_gradient", &run_weight_gradient, py::kw_only(), py::arg("N"), py::arg("M"),
          py::arg("K"), py::arg("dy"), py::arg("x"), py::arg("dweight"), py::arg("total"),
          py::arg("workspace"), py::arg("threads"), py::arg("isa"));
}

}  // namespace stellarator::bindings
