// Rotary position embedding of queries and keys, rotate-half layout, in one pass over both.
#pragma once

#include <cstdint>

#include "isa.h"

namespace stellarator {

// The heads of (M, count, D) tokens; strides are in elements, those of one head are adjacent.
struct TokenHeads {
    const void* from;
    int64_t token_stride, head_stride;
    int64_t count;
    void* to;  // may be `from`
    int64_t to_token_stride, to_head_stride;
};

// The names are those of stellarator_kernels/rope.py.
struct Rope {
    bool is_bfloat16;
    bool conjugate;  // rotate by the negative angles: the backward
    int64_t M, D;
    const float *cos, *sin;  // (M, D/2)
    TokenHeads q, k;
};

void rope(const Rope& call, int threads, Isa isa);

// Tokens [begin, end), compiled per instruction set.
STELLARATOR_FOR_EACH_ISA(void rotate_tokens(const Rope& call, int64_t begin, int64_t end))

}  // namespace stellarator
