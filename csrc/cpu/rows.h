// Matrices that cross the border of the extension, and sizes of their blocks.
#pragma once

#include <cstdint>

namespace stellarator {

// Rows of a matrix whose elements are adjacent; the stride is in elements. Null: there is none.
struct Rows {
    const void* at;
    int64_t stride;
};

// Static: each instruction set needs its own copy, or the linker keeps any one of them for all.
static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

}  // namespace stellarator
