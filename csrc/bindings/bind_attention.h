// Attention: forward and backward.
#pragma once

#include "attention.h"

#include <pybind11/stl.h>

#include <array>

#include "bind.h"

namespace stellarator::bindings {

// Sizes: (B, T, S, H, G, D). Addresses: those of Attention in its order, 0 for none. Strides:
// batch, token and head of q, k, v, dout, dq, dk and dv.
inline Attention attention(bool is_bfloat16, const std::array<int64_t, 6>& sizes,
                           uintptr_t cu_seqlens, int64_t documents, bool causal, int64_t window,
                           double scale, const std::array<uintptr_t, 10>& addresses,
                           const std::array<int64_t, 21>& strides) {
    Attention call;
    call.is_bfloat16 = is_bfloat16;
    call.B = sizes[0], call.T = sizes[1], call.S = sizes[2];
    call.H = sizes[3], call.G = sizes[4], call.D = sizes[5];
    call.cu_seqlens = pointer<const int32_t>(cu_seqlens);
    call.documents = documents;
    call.causal = causal;
    call.window = window;
    call.scale = static_cast<float>(scale);
    call.q = pointer<const void>(addresses[0]);
    call.k = pointer<const void>(addresses[1]);
    call.v = pointer<const void>(addresses[2]);
    call.out = pointer<void>(addresses[3]);
    call.lse = pointer<float>(addresses[4]);
    call.dout = pointer<const void>(addresses[5]);
    call.dlse = pointer<const float>(addresses[6]);
    call.dq = pointer<void>(addresses[7]);
    call.dk = pointer<void>(addresses[8]);
    call.dv = pointer<void>(addresses[9]);
    Strides* parts[] = {&call.q_strides,  &call.k_strides,  &call.v_strides, &call.dout_strides,
                        &call.dq_strides, &call.dk_strides, &call.dv_strides};
    for (int i = 0; i < 7; ++i) {
        *parts[i] = {strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    }
    return call;
}

inline void run_attention_forward(const Attention& call, uintptr_t workspace, int threads,
                                  Isa isa) {
    attention_forward(call, pointer<void>(workspace), threads, isa);
}

inline void run_attention_backward(const Attention& call, uintptr_t workspace, int threads,
                                   Isa isa) {
    attention_backward(call, pointer<void>(workspace), threads, isa);
}

inline void bind_attention(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> without_gil;
    py::class_<Attention>(m, "Attention")
        .def(py::init(&attention), py::kw_only(), py::arg("is_bfloat16"), py::arg("sizes"),
             py::arg("cu_seqlens"), py::arg("documents"), py::arg("causal"), py::arg("window"),
             py::arg("scale"), py::arg("addresses"), py::arg("strides"));
    m.def("attention_forward_workspace", &attention_forward_workspace);
    m.def("attention_backward_workspace", &attention_backward_workspace);
    m.def("attention_forward", &run_attention_forward, without_gil);
    m.def("attention_backward", &run_attention_backward, without_gil);
}

}  // namespace stellarator::bindings
