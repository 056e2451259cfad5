// Python module stellarator_kernels._cuda. Tensors of a GPU cross as addresses, its streams as
// integers; the Python side has checked shapes, dtypes and strides and made the device current.
#include <pybind11/pybind11.h>

#include <utility>

#include "../pointer.h"
#include "adamw.h"
#include "embedding.h"
#include "grad_norm.h"
#include "layer_norm.h"

namespace py = pybind11;

namespace {

using stellarator::pointer;
using AddressAndStride = std::pair<uintptr_t, int64_t>;  // of the rows of a matrix; zeros for none

stellarator::LayerNormRows rows(const AddressAndStride& x) {
    return {pointer<const void>(x.first), x.second};
}

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

void embedding_backward(bool is_bfloat16, bool sums_are_bfloat16, bool add, int64_t N, int C,
                        const AddressAndStride& dy, uintptr_t ids, uintptr_t order, uintptr_t sums,
                        uintptr_t parts, uintptr_t stream) {
    stellarator::EmbeddingBackward call;
    call.is_bfloat16 = is_bfloat16, call.sums_are_bfloat16 = sums_are_bfloat16;
    call.add = add;
    call.N = N, call.C = C;
    call.dy = pointer<const void>(dy.first), call.stride = dy.second;
    call.ids = pointer<const int64_t>(ids), call.order = pointer<const int64_t>(order);
    call.sums = pointer<void>(sums);
    call.parts = pointer<float>(parts);
    stellarator::embedding_backward(call, pointer<void>(stream));
}

void layer_norm_forward(bool is_bfloat16, int64_t N, int C, double eps, const AddressAndStride& x,
                        const AddressAndStride& residual, uintptr_t weight, uintptr_t bias,
                        uintptr_t y, uintptr_t summed, uintptr_t mean, uintptr_t rstd,
                        uintptr_t stream) {
    stellarator::LayerNormForward call;
    call.is_bfloat16 = is_bfloat16;
    call.N = N, call.C = C;
    call.eps = static_cast<float>(eps);
    call.x = rows(x), call.residual = rows(residual);
    call.weight = pointer<const void>(weight), call.bias = pointer<const void>(bias);
    call.y = pointer<void>(y), call.summed = pointer<void>(summed);
    call.mean = pointer<float>(mean), call.rstd = pointer<float>(rstd);
    stellarator::layer_norm_forward(call, pointer<void>(stream));
}

void layer_norm_backward(bool is_bfloat16, int64_t N, int C, int64_t blocks,
                         const AddressAndStride& dy, const AddressAndStride& dsummed,
                         const AddressAndStride& summed, uintptr_t weight, uintptr_t mean,
                         uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                         uintptr_t partials, uintptr_t stream) {
    stellarator::LayerNormBackward call;
    call.is_bfloat16 = is_bfloat16;
    call.N = N, call.C = C, call.blocks = blocks;
    call.dy = rows(dy), call.dsummed = rows(dsummed), call.summed = rows(summed);
    call.weight = pointer<const void>(weight);
    call.mean = pointer<const float>(mean), call.rstd = pointer<const float>(rstd);
    call.dx = pointer<void>(dx);
    call.dweight = pointer<void>(dweight), call.dbias = pointer<void>(dbias);
    call.partials = pointer<float>(partials);
    stellarator::layer_norm_backward(call, pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels; addresses, sizes and a stream only.";
    m.attr("squares_per_sum") = stellarator::kSquaresPerSum;
    m.attr("rows_of_chunk") = stellarator::kRowsOfChunk;
    m.attr("widest_row") = stellarator::kWidestRow;
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
    m.def("embedding_backward", &embedding_backward, without_gil, py::kw_only(),
          py::arg("is_bfloat16"), py::arg("sums_are_bfloat16"), py::arg("add"), py::arg("N"),
          py::arg("C"), py::arg("dy"), py::arg("ids"), py::arg("order"), py::arg("sums"),
          py::arg("parts"), py::arg("stream"));
    m.def("layer_norm_blocks", &stellarator::layer_norm_blocks, py::arg("N"), py::arg("C"),
          py::arg("multiprocessors"));
    m.def("layer_norm_forward", &layer_norm_forward, without_gil, py::kw_only(),
          py::arg("is_bfloat16"), py::arg("N"), py::arg("C"), py::arg("eps"), py::arg("x"),
          py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("y"),
          py::arg("summed"), py::arg("mean"), py::arg("rstd"), py::arg("stream"));
    m.def("layer_norm_backward", &layer_norm_backward, without_gil, py::kw_only(),
          py::arg("is_bfloat16"), py::arg("N"), py::arg("C"), py::arg("blocks"), py::arg("dy"),
          py::arg("dsummed"), py::arg("summed"), py::arg("weight"), py::arg("mean"),
          py::arg("rstd"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"),
          py::arg("partials"), py::arg("stream"));
}
