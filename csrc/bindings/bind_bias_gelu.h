// Bias and GELU: forward and backward.
#pragma once

#include "bias_gelu.h"

#include "bind.h"

namespace stellarator::bindings {

inline BiasGelu bias_gelu(bool is_bfloat16, bool is_tanh, int64_t N, int64_t C,
                          const AddressAndStride& x, uintptr_t bias) {
    BiasGelu call{};
    call.is_bfloat16 = is_bfloat16, call.is_tanh = is_tanh;
    call.N = N, call.C = C;
    call.x = rows(x);
    call.bias = pointer<const void>(bias);
    return call;
}

inline void run_bias_gelu_forward(bool is_bfloat16, bool is_tanh, int64_t N, int64_t C,
                                  const AddressAndStride& x, uintptr_t bias, uintptr_t y,
                                  int threads, Isa isa) {
    BiasGelu call = bias_gelu(is_bfloat16, is_tanh, N, C, x, bias);
    call.y = pointer<void>(y);
    const py::gil_scoped_release without_gil;
    bias_gelu_forward(call, threads, isa);
}

inline void run_bias_gelu_backward(bool is_bfloat16, bool is_tanh, int64_t N, int64_t C,
                                   const AddressAndStride& x, uintptr_t bias, uintptr_t y,
                                   const AddressAndStride& dy, uintptr_t dx, uintptr_t dbias,
                                   uintptr_t sums, int threads, Isa isa) {
    BiasGelu call = bias_gelu(is_bfloat16, is_tanh, N, C, x, bias);
    call.y = pointer<void>(y);
    call.dy = rows(dy);
    call.dx = pointer<void>(dx);
    call.dbias = pointer<void>(dbias);
    call.sums = pointer<float>(sums);
    const py::gil_scoped_release without_gil;
    bias_gelu_backward(call, threads, isa);
}

inline void bind_bias_gelu(py::module_& m) {
    m.def("bias_gelu_forward", &run_bias_gelu_forward, py::kw_only(), py::arg("is_bfloat16"),
          py::arg("is_tanh"), py::arg("N"), py::arg("C"), py::arg("x"), py::arg("bias"),
          py::arg("y"), py::arg("threads"), py::arg("isa"));
    m.def("bias_gelu_backward", &run_bias_gelu_backward, py::kw_only(), py::arg("is_bfloat16"),
          py::arg("is_tanh"), py::arg("N"), py::arg("C"), py::arg("x"), py::arg("bias"),
          py::arg("y"), py::arg("dy"), py::arg("dx"), py::arg("dbias"), py::arg("sums"),
          py::arg("threads"), py::arg("isa"));
}

}  // namespace stellarator::bindings
