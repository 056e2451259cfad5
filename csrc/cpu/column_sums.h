// The gradient of a parameter that all rows share: sums of blocks of rows, added in their order.
#pragma once

#include <cstdint>

#include "isa.h"

namespace stellarator {

// Rows are cut into blocks by their number alone, so that the number of threads changes no bit: 64
// rows in a block, more where that would make more than 128 sums.
int64_t rows_of_block(int64_t N);
int64_t blocks_of_rows(int64_t N);

// Sums (C,) float32 of blocks, `stride` floats apart, become one (C,) of bfloat16 or float32.
struct ColumnSums {
    const float* sums;
    int64_t blocks, stride, C;
    bool is_bfloat16;
    void* to;
};

void add_columns(const ColumnSums& job, int threads, Isa isa);

// Columns [begin, end).
STELLARATOR_FOR_EACH_ISA(void add_column_range(const ColumnSums& job, int64_t begin, int64_t end))

}  // namespace stellarator
