// Python module stellarator_kernels._cuda. Tensors of a GPU cross as addresses, its streams as
// integers; the Python side has checked shapes, dtypes and strides and made the device current.
#include <pybind11/pybind11.h>

#include "../pointer.h"
#include "adamw.h"
#include "grad_norm.h"

namespace py = pybind11;

namespace {

using stellarator::pointer;

void adamw(uintptr_t weight, uintptr_t rounded, uintptr_t grad, bool grad_is_bfloat16,
           uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t clip, uintptr_t factors, int64_t n,
           double decay, double step_size, double root_correction, double beta1, double beta2,
           double eps, uintptr_t stream) {
    stellarator::AdamW update;
    update.weight = pointer<float>(weight);
    update.rounded = pointer<uint16_t>(rounded);
    update.grad = pointer<const void>(grad);
    update.exp_avg = pointer<float>(exp_avg);
    update.exp_avg_sq = pointer<float>(exp_avg_sq);
    update.clip = pointer<const float>(clip);
    update.factors = pointer<const float>(factors);
    update.n = n;
    update.grad_is_bfloat16 = grad_is_bfloat16;
    update.decay = static_cast<float>(decay);
    update.step_size = static_cast<float>(step_size);
    update.root_correction = static_cast<float>(root_correction);
    update.beta1_rest = static_cast<float>(1.0 - beta1);
    update.beta2 = static_cast<float>(beta2);
    update.beta2_rest = static_cast<float>(1.0 - beta2);
    update.eps = static_cast<float>(eps);
    stellarator::adamw(update, pointer<void>(stream));
}

void sums_of_squares(uintptr_t x, bool is_bfloat16, int64_t n, double weight, uintptr_t sums,
                     uintptr_t stream) {
    stellarator::sums_of_squares(pointer<const void>(x), is_bfloat16, n, weight,
                                 pointer<double>(sums), pointer<void>(stream));
}

void total_of_sums(uintptr_t sums, int64_t n, uintptr_t total, uintptr_t stream) {
    stellarator::total_of_sums(pointer<const double>(sums), n, pointer<double>(total),
                               pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels; addresses, sizes and a stream only.";
    m.attr("squares_per_sum") = stellarator::kSquaresPerSum;
    const py::call_guard<py::gil_scoped_release> without_gil;
    m.def("adamw", &adamw, without_gil, py::kw_only(), py::arg("weight"), py::arg("rounded"),
          py::arg("grad"), py::arg("grad_is_bfloat16"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
          py::arg("clip"), py::arg("factors"), py::arg("n"), py::arg("decay"),
          py::arg("step_size"), py::arg("root_correction"), py::arg("beta1"), py::arg("beta2"),
          py::arg("eps"), py::arg("stream"));
    m.def("sums_of_squares", &sums_of_squares, without_gil, py::kw_only(), py::arg("x"),
          py::arg("is_bfloat16"), py::arg("n"), py::arg("weight"), py::arg("sums"),
          py::arg("stream"));
    m.def("total_of_sums", &total_of_sums, without_gil, py::kw_only(), py::arg("sums"),
          py::arg("n"), py::arg("total"), py::arg("stream"));
}
