// Matrices that cross the border of the extension.
#pragma once

#include <cstdint>

namespace stellarator {

// Rows of a matrix whose elements are adjacent; the stride is in elements. Null: there is none.
struct Rows {
    const void* at;
    int64_t stride;
};

}  // namespace stellarator
