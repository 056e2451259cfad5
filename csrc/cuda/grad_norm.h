// Sums of squares on a GPU, in float64 and in an order that is fixed.
#pragma once

#include <cstdint>

namespace stellarator {

constexpr int64_t kSquaresPerSum = 32768;

// sums[i] = weight * the squares of the i-th kSquaresPerSum elements of `x`, float32 or bfloat16;
// whatever the alignment of x, the additions are the same. `stream` is a cudaStream_t. Throws
// std::runtime_error, as the next one does.
void sums_of_squares(const void* x, bool is_bfloat16, int64_t n, double weight, double* sums,
                     void* stream);

// total[0] = the n sums together, by one block.
void total_of_sums(const double* sums, int64_t n, double* total, void* stream);

}  // namespace stellarator
