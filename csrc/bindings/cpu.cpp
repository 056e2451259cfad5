// Python module stellarator_kernels._cpu. Tensors cross as addresses and sizes; the Python side
// (stellarator_kernels/extension.py and the op modules) has checked shapes, dtypes and strides.
#include "adamw.h"
#include "bind_attention.h"
#include "bind_bias_gelu.h"
#include "bind_cross_entropy.h"
#include "bind_layer_norm.h"
#include "bind_memory.h"
#include "bind_rope.h"
#include "bind_weight_gradient.h"
#include "grad_norm.h"
#include "isa.h"
#include "parallel.h"

namespace {

using stellarator::pointer;

void adamw(uintptr_t weight, uintptr_t rounded, uintptr_t grad, bool grad_is_bfloat16,
           uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t n, double clip, double beta1,
           double beta2, double decay, double step_size, double root_correction, double eps,
           int threads, stellarator::Isa isa) {
    stellarator::AdamW update;
    update.weight = pointer<float>(weight);
    update.rounded = pointer<uint16_t>(rounded);
    update.grad = pointer<const void>(grad);
    update.exp_avg = pointer<float>(exp_avg);
    update.exp_avg_sq = pointer<float>(exp_avg_sq);
    update.n = n;
    update.grad_is_bfloat16 = grad_is_bfloat16;
    update.clip = static_cast<float>(clip);
    update.beta1_rest = static_cast<float>(1.0 - beta1);
    update.beta2 = static_cast<float>(beta2);
    update.beta2_rest = static_cast<float>(1.0 - beta2);
    update.decay = static_cast<float>(decay);
    update.step_size = static_cast<float>(step_size);
    update.root_correction = static_cast<float>(root_correction);
    update.eps = static_cast<float>(eps);
    stellarator::adamw(update, threads, isa);
}

double sum_of_squares(uintptr_t x, bool is_bfloat16, int64_t n, int threads,
                      stellarator::Isa isa) {
    return stellarator::sum_of_squares(pointer<const void>(x), is_bfloat16, n, threads, isa);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels for the CPU; addresses and sizes only.";
    py::enum_<stellarator::Isa>(m, "Isa")
        .value("portable", stellarator::Isa::portable)
        .value("avx2", stellarator::Isa::avx2)
        .value("avx512", stellarator::Isa::avx512)
        .value("avx512_bf16", stellarator::Isa::avx512_bf16)
        .value("amx", stellarator::Isa::amx);
    m.def("best_isa", &stellarator::best_isa);
    m.def("threads_of", &stellarator::threads_of);
    const py::call_guard<py::gil_scoped_release> without_gil;
    m.def("adamw", &adamw, without_gil, py::kw_only(), py::arg("weight"), py::arg("rounded"),
          py::arg("grad"), py::arg("grad_is_bfloat16"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
          py::arg("n"), py::arg("clip"), py::arg("beta1"), py::arg("beta2"), py::arg("decay"),
          py::arg("step_size"), py::arg("root_correction"), py::arg("eps"), py::arg("threads"),
          py::arg("isa"));
    m.def("sum_of_squares", &sum_of_squares, without_gil, py::arg("x"), py::arg("is_bfloat16"),
          py::arg("n"), py::arg("threads"), py::arg("isa"));
    stellarator::bindings::bind_attention(m);
    stellarator::bindings::bind_bias_gelu(m);
    stellarator::bindings::bind_cross_entropy(m);
    stellarator::bindings::bind_layer_norm(m);
    stellarator::bindings::bind_memory(m);
    stellarator::bindings::bind_rope(m);
    stellarator::bindings::bind_weight_gradient(m);
}
