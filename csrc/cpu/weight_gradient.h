// dweight = dy^T * x for bfloat16, summed in float32 over all tokens and rounded once, or added to
// float32 sums.
//
// ATen's product of a transposed matrix reads it against the grain, at a third of the rate of the
// others. Here a block of the result stays in the second cache in float32 while the tokens pass by;
// both operands are packed, 256 tokens at a time, into what the matrix unit reads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace stellarator {

constexpr int64_t kGradientRows = 768;     // of a block of dweight, at most
constexpr int64_t kGradientColumns = 384;  // likewise
constexpr int64_t kGradientTokens = 256;   // packed at one time

struct WeightGradient {
    int64_t N, M, K;  // tokens, width of dy, width of x
    const uint16_t* dy;
    int64_t dy_stride;  // between tokens; the elements of one are adjacent
    const uint16_t* x;
    int64_t x_stride;
    uint16_t* dweight;  // (M, K), contiguous; null with `total`
    float* total;       // (M, K), contiguous, to which it is added, unrounded; or null
    int64_t rows = 0;   // of a block; set by weight_gradient
};

int64_t weight_gradient_workspace(int threads, Isa isa);

// `workspace` is aligned to 64 bytes. The bits do not depend on the number of threads.
void weight_gradient(const WeightGradient& call, void* workspace, int threads, Isa isa);

// One block, compiled per instruction set.
STELLARATOR_FOR_EACH_ISA(int64_t gradient_block_bytes())
STELLARATOR_FOR_EACH_ISA(void gradient_block(const WeightGradient& call, int64_t row,
                                             int64_t column, void* scratch))

}  // namespace stellarator
