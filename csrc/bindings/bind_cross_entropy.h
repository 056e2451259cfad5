// Cross entropy: loss or gradient.
#pragma once

#include "cross_entropy.h"

#include "bind.h"

namespace stellarator::bindings {

inline void run_cross_entropy(bool is_bfloat16, int64_t N, int64_t V, uintptr_t logits,
                              int64_t stride, uintptr_t targets, int64_t ignore_index,
                              double z_loss, bool forward, uintptr_t loss, uintptr_t lse,
                              uintptr_t dloss, int64_t dloss_stride, uintptr_t gradient,
                              int64_t gradient_stride, int threads, Isa isa) {
    CrossEntropy call;
    call.is_bfloat16 = is_bfloat16;
    call.N = N;
    call.V = V;
    call.logits = pointer<const void>(logits);
    call.stride = stride;
    call.targets = pointer<const int64_t>(targets);
    call.ignore_index = ignore_index;
    call.z_loss = static_cast<float>(z_loss);
    call.forward = forward;
    call.loss = pointer<float>(loss);
    call.lse = pointer<float>(lse);
    call.dloss = pointer<const float>(dloss);
    call.dloss_stride = dloss_stride;
    call.gradient = pointer<void>(gradient);
    call.gradient_stride = gradient_stride;
    cross_entropy(call, threads, isa);
}

inline void bind_cross_entropy(py::module_& m) {
    m.def("cross_entropy", &run_cross_entropy, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), py::arg("is_bfloat16"), py::arg("N"), py::arg("V"), py::arg("logits"),
          py::arg("stride"), py::arg("targets"), py::arg("ignore_index"), py::arg("z_loss"),
          py::arg("forward"), py::arg("loss"), py::arg("lse"), py::arg("dloss"),
          py::arg("dloss_stride"), py::arg("gradient"), py::arg("gradient_stride"),
          py::arg("threads"), py::arg("isa"));
}

}  // namespace stellarator::bindings
