// Rotary positions of q and k.
#pragma once

#include "rope.h"

#include <pybind11/stl.h>

#include <array>

#include "bind.h"

namespace stellarator::bindings {

// Address, strides of tokens and heads, number of heads.
using Heads = std::array<int64_t, 4>;

inline TokenHeads heads(const Heads& x, const Heads& to) {
    return {pointer<const void>(static_cast<uintptr_t>(x[0])), x[1],  x[2], x[3],
            pointer<void>(static_cast<uintptr_t>(to[0])),      to[1], to[2]};
}

inline void run_rope(bool is_bfloat16, bool conjugate, int64_t M, int64_t D, uintptr_t cos,
                     uintptr_t sin, const Heads& q, const Heads& k, const Heads& q_out,
                     const Heads& k_out, int threads, Isa isa) {
    Rope call;
    call.is_bfloat16 = is_bfloat16, call.conjugate = conjugate;
    call.M = M, call.D = D;
    call.cos = pointer<const float>(cos), call.sin = pointer<const float>(sin);
    call.q = heads(q, q_out), call.k = heads(k, k_out);
    const py::gil_scoped_release without_gil;
    rope(call, threads, isa);
}

inline void bind_rope(py::module_& m) {
    m.def("rope", &run_rope, py::kw_only(), py::arg("is_bfloat16"), py::arg("conjugate"),
          py::arg("M"), py::arg("D"), py::arg("cos"), py::arg("sin"), py::arg("q"), py::arg("k"),
          py::arg("q_out"), py::arg("k_out"), py::arg("threads"), py::arg("isa"));
}

}  // namespace stellarator::bindings
