// Compiled once per instruction set.
#include "layer_norm.h"

#include <math.h>

#include "columns.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

// Rows that are done at once: their sums do not wait for each other, and what all rows share (the
// parameters and the sums of their gradients) is read once for them.
constexpr int kTogether = 4;

// s = x + residual of one row, rounded as it is stored, widened again into `to`; its sum.
template <typename Element>
Floats add_residual(const LayerNormForward& call, int64_t row, float* to) {
    const Element* x = row_of<Element>(call.x, row);
    Floats values = {};
    if (call.residual.at == nullptr) {
        for_columns(0, call.C, [&](int64_t i, auto part) {
            const Floats s = load(x + i, part);
            store(to + i, s);
            values += s;
        });
        return values;
    }
    const Element* residual = row_of<Element>(call.residual, row);
    Element* summed = static_cast<Element*>(call.summed) + row * call.C;
    for_columns(0, call.C, [&](int64_t i, auto part) {
        const Floats exact = load(x + i, part) + load(residual + i, part);
        store(summed + i, exact, part);
        const Floats s = rounded(exact, summed);
        store(to + i, s);
        values += s;
    });
    return values;
}

template <typename Element, int kRows>
void normalise(const LayerNormForward& call, int64_t row) {
    alignas(64) float s[kRows][kNormWidth];
    const int64_t C = call.C;
    float mean[kRows], rstd[kRows];
    Floats squares[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
        call.mean[row + r] = mean[r] = sum(add_residual<Element>(call, row + r, s[r])) / C;
    }
    for_columns(0, C, [&](int64_t i, auto part) {
        for (int r = 0; r < kRows; ++r) {
            const Floats centred = inside(load(s[r] + i) - mean[r], part);
            squares[r] += centred * centred;
        }
    });
    for (int r = 0; r < kRows; ++r) {
        call.rstd[row + r] = rstd[r] = 1.0f / sqrtf(sum(squares[r]) / C + call.eps);
    }
    const Element* weight = static_cast<const Element*>(call.weight);
    const Element* bias = static_cast<const Element*>(call.bias);
    Element* y = static_cast<Element*>(call.y) + row * C;
    for_columns(0, C, [&](int64_t i, auto part) {
        const Floats w = load(weight + i, part);
        const Floats b = bias == nullptr ? (Floats){} : load(bias + i, part);
        for (int r = 0; r < kRows; ++r) {
            store(y + r * C + i, (load(s[r] + i) - mean[r]) * rstd[r] * w + b, part);
        }
    });
}

template <typename Element>
void normalise_block(const LayerNormForward& call, int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + kTogether <= end; row += kTogether) normalise<Element, kTogether>(call, row);
    for (; row < end; ++row) normalise<Element, 1>(call, row);
}

template <typename Element, int kRows, bool kSums>
void differentiate(const LayerNormBackward& call, int64_t row, float* dweight, float* dbias) {
    const int64_t C = call.C;
    const Element* weight = static_cast<const Element*>(call.weight);
    const Element *dy[kRows], *s[kRows];
    Floats g_sum[kRows], gn_sum[kRows];
    float mean[kRows], rstd[kRows];
    for (int r = 0; r < kRows; ++r) {
        dy[r] = row_of<Element>(call.dy, row + r), s[r] = row_of<Element>(call.summed, row + r);
        mean[r] = call.mean[row + r], rstd[r] = call.rstd[row + r];
        g_sum[r] = gn_sum[r] = (Floats){};
    }
    for_columns(0, C, [&](int64_t i, auto part) {
        const Floats w = load(weight + i, part);
        Floats weight_sum = {}, bias_sum = {};
        for (int r = 0; r < kRows; ++r) {
            const Floats d = load(dy[r] + i, part), g = d * w;  // 0 outside the row
            const Floats n = (load(s[r] + i, part) - mean[r]) * rstd[r];
            g_sum[r] += g;
            gn_sum[r] += g * n;
            weight_sum += d * n;
            bias_sum += d;
        }
        if constexpr (kSums) {
            store(dweight + i, load(dweight + i, part) + weight_sum, part);
            store(dbias + i, load(dbias + i, part) + bias_sum, part);
        }
    });
    for (int r = 0; r < kRows; ++r) {
        const float g_mean = sum(g_sum[r]) / C, gn_mean = sum(gn_sum[r]) / C;
        const Element* dsummed = call.dsummed.at == nullptr
                                     ? nullptr
                                     : row_of<Element>(call.dsummed, row + r);
        Element* dx = static_cast<Element*>(call.dx) + (row + r) * C;
        for_columns(0, C, [&](int64_t i, auto part) {
            const Floats g = load(dy[r] + i, part) * load(weight + i, part);
            const Floats n = (load(s[r] + i, part) - mean[r]) * rstd[r];
            const Floats d = rstd[r] * (g - g_mean - n * gn_mean);
            store(dx + i, dsummed == nullptr ? d : d + load(dsummed + i, part), part);
        });
    }
}

template <typename Element, bool kSums>
void differentiate_rows(const LayerNormBackward& call, int64_t begin, int64_t end, float* sums) {
    float* dbias = kSums ? sums + call.C : nullptr;
    int64_t row = begin;
    for (; row + kTogether <= end; row += kTogether) {
        differentiate<Element, kTogether, kSums>(call, row, sums, dbias);
    }
    for (; row < end; ++row) differentiate<Element, 1, kSums>(call, row, sums, dbias);
}

template <typename Element>
void differentiate_block(const LayerNormBackward& call, int64_t begin, int64_t end, float* sums) {
    if (sums == nullptr) {
        differentiate_rows<Element, false>(call, begin, end, nullptr);
        return;
    }
    memset(sums, 0, 2 * call.C * sizeof(float));
    differentiate_rows<Element, true>(call, begin, end, sums);
}

}  // namespace

void normalise_rows(const LayerNormForward& call, int64_t begin, int64_t end) {
    if (call.is_bfloat16) {
        normalise_block<uint16_t>(call, begin, end);
    } else {
        normalise_block<float>(call, begin, end);
    }
}

void normalise_rows_backward(const LayerNormBackward& call, int64_t begin, int64_t end,
                             float* sums) {
    if (call.is_bfloat16) {
        differentiate_block<uint16_t>(call, begin, end, sums);
    } else {
        differentiate_block<float>(call, begin, end, sums);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
