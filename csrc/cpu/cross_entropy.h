// Cross entropy of rows of logits: losses, and the gradient in the same visit of a row.
#pragma once

#include <cstdint>

#include "isa.h"

namespace stellarator {

struct CrossEntropy {
    bool is_bfloat16;
    int64_t N, V;
    const void* logits;  // (N, V), rows `stride` elements apart
    int64_t stride;
    const int64_t* targets;  // (N,), in [0, V) or ignore_index
    int64_t ignore_index;
    float z_loss;
    bool forward;  // writes loss and lse; else lse is read
    float* loss;   // (N,)
    float* lse;    // (N,)
    const float* dloss;  // (N,), `dloss_stride` apart, or null: no gradient
    int64_t dloss_stride;
    void* gradient;  // (N, V), rows `gradient_stride` apart; may be the logits themselves
    int64_t gradient_stride;
};

// All rows; the result does not depend on `threads`.
void cross_entropy(const CrossEntropy& call, int threads, Isa isa);

// Rows [begin, end).
STELLARATOR_FOR_EACH_ISA(void cross_entropy_rows(const CrossEntropy& call, int64_t begin,
                                                 int64_t end))

}  // namespace stellarator
