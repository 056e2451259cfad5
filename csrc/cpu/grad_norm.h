// Sum of squares of one flat tensor, in float64 and in an order that is fixed.
#pragma once

#include <cstdint>

#include "isa.h"

namespace stellarator {

// Sum of the squares of elements [begin, end) of `x`, float32 or bfloat16.
STELLARATOR_FOR_EACH_ISA(double squares_range(const void* x, bool is_bfloat16, int64_t begin,
                                              int64_t end))

// Blocks of fixed length are summed in their order: the bits do not depend on `threads` or `isa`.
double sum_of_squares(const void* x, bool is_bfloat16, int64_t n, int threads, Isa isa);

}  // namespace stellarator
