// Compiled once per instruction set. See matmul.h for the layouts of packed operands.
#include "weight_gradient.h"

#include <algorithm>

#include "bfloat16.h"
#include "matmul.h"
#include "rows.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

typedef WorkOf<uint16_t>::type Work;
constexpr int64_t kWidest = std::max(kGradientRows, kGradientColumns);

// Elements [begin, begin + width) of `count` tokens, filled up: where they are if they need no
// filling and no widening, else in `copy`.
const Work* filled(const uint16_t* from, int64_t stride, int64_t count, int64_t width,
                   int64_t full_count, int64_t full_width, Work* copy, int64_t* copy_stride) {
    if constexpr (sizeof(Work) == sizeof(uint16_t)) {
        if (count == full_count && width == full_width) {
            *copy_stride = stride;
            return reinterpret_cast<const Work*>(from);
        }
    }
    copy_rows(from, stride, count, width, copy, full_count, full_width);
    *copy_stride = full_width;
    return copy;
}

}  // namespace

int64_t gradient_block_bytes() {
    const int64_t packed = (kGradientRows + kGradientColumns + kWidest) * kGradientTokens;
    return packed * sizeof(Work) + kGradientRows * kGradientColumns * sizeof(float);
}

void gradient_block(const WeightGradient& call, int64_t row, int64_t column, void* scratch) {
    const int64_t rows = std::min(call.rows, call.M - row);
    const int64_t columns = std::min(kGradientColumns, call.K - column);
    const int64_t full_rows = round_up(rows, 16), full_columns = round_up(columns, 16);
    float* sums = static_cast<float*>(scratch);
    Work* across = reinterpret_cast<Work*>(sums + kGradientRows * kGradientColumns);
    Work* panels = across + kGradientRows * kGradientTokens;
    Work* copy = panels + kGradientColumns * kGradientTokens;
    const MatrixUnit unit;
    for (int64_t token = 0; token < call.N; token += kGradientTokens) {
        const int64_t count = std::min(kGradientTokens, call.N - token);
        const int64_t depth = round_up(count, kDepth<Work>);
        int64_t stride = 0;
        const Work* dy = filled(call.dy + token * call.dy_stride + row, call.dy_stride, count, rows,
                                depth, full_rows, copy, &stride);
        transpose_rows(dy, stride, depth, full_rows, across, depth);
        const Work* x = filled(call.x + token * call.x_stride + column, call.x_stride, count,
                               columns, depth, full_columns, copy, &stride);
        pack_rows(x, stride, depth, full_columns, panels);
        multiply(sums, full_columns, across, depth, panels, full_rows, full_columns, depth,
                 token > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * call.K + column;
        const float* from = sums + r * full_columns;
        int64_t i = 0;
        if (call.total != nullptr) {
            float* total = call.total + at;
            for (; i + kLanes <= columns; i += kLanes)
                store(total + i, load(total + i) + load(from + i));
            for (; i < columns; ++i) total[i] += from[i];
            continue;
        }
        uint16_t* to = call.dweight + at;
        for (; i + kLanes <= columns; i += kLanes) store(to + i, load(from + i));
        for (; i < columns; ++i) to[i] = round_to_bfloat16(from[i]);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
