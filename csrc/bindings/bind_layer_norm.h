// LayerNorm: forward and backward.
#pragma once

#include "layer_norm.h"

#include "bind.h"
#include "column_sums.h"

namespace stellarator::bindings {

inline void run_layer_norm_forward(bool is_bfloat16, int64_t N, int64_t C, double eps,
                                   const AddressAndStride& x, const AddressAndStride& residual,
                                   uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t summed,
                                   uintptr_t mean, uintptr_t rstd, int threads, Isa isa) {
    LayerNormForward call;
    call.is_bfloat16 = is_bfloat16;
    call.N = N, call.C = C;
    call.eps = static_cast<float>(eps);
    call.x = rows(x), call.residual = rows(residual);
    call.weight = pointer<const void>(weight), call.bias = pointer<const void>(bias);
    call.y = pointer<void>(y), call.summed = pointer<void>(summed);
    call.mean = pointer<float>(mean), call.rstd = pointer<float>(rstd);
    const py::gil_scoped_release without_gil;
    layer_norm_forward(call, threads, isa);
}

inline void run_layer_norm_backward(bool is_bfloat16, int64_t N, int64_t C,
                                    const AddressAndStride& dy, const AddressAndStride& dsummed,
                                    const AddressAndStride& summed, uintptr_t weight,
                                    uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dweight,
                                    uintptr_t dbias, uintptr_t sums, int threads, Isa isa) {
    LayerNormBackward call;
    call.is_bfloat16 = is_bfloat16;
    call.N = N, call.C = C;
    call.dy = rows(dy), call.dsummed = rows(dsummed), call.summed = rows(summed);
    call.weight = pointer<const void>(weight);
    call.mean = pointer<const float>(mean), call.rstd = pointer<const float>(rstd);
    call.dx = pointer<void>(dx);
    call.dweight = pointer<void>(dweight), call.dbias = pointer<void>(dbias);
    call.sums = pointer<float>(sums);
    const py::gil_scoped_release without_gil;
    layer_norm_backward(call, threads, isa);
}

inline void bind_layer_norm(py::module_& m) {
    m.def("blocks_of_rows", &blocks_of_rows);
    m.def("layer_norm_forward", &run_layer_norm_forward, py::kw_only(), py::arg("is_bfloat16"),
          py::arg("N"), py::arg("C"), py::arg("eps"), py::arg("x"), py::arg("residual"),
          py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("summed"), py::arg("mean"),
          py::arg("rstd"), py::arg("threads"), py::arg("isa"));
    m.def("layer_norm_backward", &run_layer_norm_backward, py::kw_only(), py::arg("is_bfloat16"),
          py::arg("N"), py::arg("C"), py::arg("dy"), py::arg("dsummed"), py::arg("summed"),
          py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dweight"),
          py::arg("dbias"), py::arg("sums"), py::arg("threads"), py::arg("isa"));
}

}  // namespace stellarator::bindings
