// gelu(x + bias) and its gradients, one pass each; csrc/cpu/per_isa/bias_gelu.cpp has the formulas.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace stellarator {

// The names are those of stellarator_kernels/bias_gelu.py. Results are contiguous.
struct BiasGelu {
    bool is_bfloat16, is_tanh;
    int64_t N, C;
    Rows x;            // (N, C)
    const void* bias;  // (C,) or null
    void* y;           // (N, C); backward: null, or the result of the forward once more
    // Backward only.
    Rows dy;      // (N, C)
    void* dx;     // (N, C)
    void* dbias;  // (C,) or null
    float* sums;  // workspace (blocks_of_rows(N), C), null without dbias
};

void bias_gelu_forward(const BiasGelu& call, int threads, Isa isa);
void bias_gelu_backward(const BiasGelu& call, int threads, Isa isa);

struct Block {
    int64_t begin_row, end_row, begin_column, end_column;
};

// One block, compiled per instruction set.
STELLARATOR_FOR_EACH_ISA(void gelu_block(const BiasGelu& call, const Block& block))
// `sums` (C,): those of dbias of these rows; or null.
STELLARATOR_FOR_EACH_ISA(void gelu_block_backward(const BiasGelu& call, const Block& block,
                                                  float* sums))

}  // namespace stellarator
