// Compiled once per instruction set. gelu(u) = u * Phi(u), gelu'(u) = Phi(u) + u * Phi'(u).
//
// Both forms compute Phi(-|u|), which is small without cancellation, and mirror it. Largest errors
// in float32: 2e-7 of Phi in the tanh form, 3e-7 in the other, so 6e-7 of erf (measured).
#include "bias_gelu.h"

#include "columns.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

struct Normal {
    Floats cdf, density;  // Phi and Phi'
};

inline Floats absolute(Floats x) { return (Floats)((Bits)x & 0x7fffffffu); }

// Phi(u) = sigmoid(a * (u + b * u^3)), a = 2 * sqrt(2 / pi), b = 0.044715. With t = exp of minus
// the argument's absolute value: sigmoid is 1 / (1 + t) or t / (1 + t), its slope t / (1 + t)^2.
inline Normal tanh_form(Floats u) {
    constexpr float a = 1.59576912f, b = 0.044715f, log2_e = 1.44269504f;
    const Floats square = u * u;
    const Floats t = exp2(absolute(u) * (square * (-a * b * log2_e) - a * log2_e));
    const Floats upper = 1.0f / (1.0f + t), lower = t * upper;
    return {u < 0.0f ? lower : upper, (square * (3.0f * a * b) + a) * (lower * upper)};
}

// Phi(-x) = exp(-x^2 / 2) * q(t) for x >= 0, t = 1 / (1 + 0.3 * x): q is a polynomial without a
// constant, fitted to erfcx(x / sqrt(2)) / 2 with a relative error of 1.5e-7.
inline Normal erf_form(Floats u) {
    constexpr float half_log2_e = 0.721347520f, inverse_root = 0.398942280f;  // 1 / sqrt(2 * pi)
    const Floats x = absolute(u), t = 1.0f / (x * 0.3f + 1.0f);
    const Floats e = exp2(u * u * -half_log2_e);
    Floats q = t * 0.0356753618f - 0.157205537f;
    q = q * t + 0.206357718f;
    q = q * t - 0.0536874831f;
    q = q * t + 0.128563628f;
    q = q * t + 0.0999128968f;
    q = q * t + 0.120754048f;
    q = q * t + 0.119629294f;
    const Floats lower = q * t * e;
    return {u < 0.0f ? lower : 1.0f - lower, e * inverse_root};
}

template <bool kTanh>
inline Normal normal(Floats u) {
    return kTanh ? tanh_form(u) : erf_form(u);
}

template <typename Element, bool kTanh>
void forward(const BiasGelu& call, const Block& block) {
    const Element* bias = static_cast<const Element*>(call.bias);
    for (int64_t row = block.begin_row; row < block.end_row; ++row) {
        const Element* x = row_of<Element>(call.x, row);
        Element* y = static_cast<Element*>(call.y) + row * call.C;
        for_columns(block.begin_column, block.end_column, [&](int64_t i, auto part) {
            Floats u = load(x + i, part);
            if (bias != nullptr) u += load(bias + i, part);
            store(y + i, u * normal<kTanh>(u).cdf, part);
        });
    }
}

template <typename Element, bool kTanh, bool kSums>
void backward(const BiasGelu& call, const Block& block, float* sums) {
    const Element* bias = static_cast<const Element*>(call.bias);
    for (int64_t row = block.begin_row; row < block.end_row; ++row) {
        const Element* x = row_of<Element>(call.x, row);
        const Element* dy = row_of<Element>(call.dy, row);
        Element* dx = static_cast<Element*>(call.dx) + row * call.C;
        Element* y = call.y == nullptr ? nullptr : static_cast<Element*>(call.y) + row * call.C;
        for_columns(block.begin_column, block.end_column, [&](int64_t i, auto part) {
            Floats u = load(x + i, part);
            if (bias != nullptr) u += load(bias + i, part);
            const Normal at = normal<kTanh>(u);
            const Floats d = load(dy + i, part) * (at.cdf + u * at.density);
            store(dx + i, d, part);
            if (y != nullptr) store(y + i, u * at.cdf, part);
            if constexpr (kSums) {
                const bool first = row == block.begin_row;
                store(sums + i, first ? d : d + load(sums + i, part), part);
            }
        });
    }
}

template <typename Element, bool kTanh>
void backward(const BiasGelu& call, const Block& block, float* sums) {
    if (sums == nullptr) {
        backward<Element, kTanh, false>(call, block, nullptr);
    } else {
        backward<Element, kTanh, true>(call, block, sums);
    }
}

}  // namespace

void gelu_block(const BiasGelu& call, const Block& block) {
    if (call.is_bfloat16) {
        call.is_tanh ? forward<uint16_t, true>(call, block) : forward<uint16_t, false>(call, block);
    } else {
        call.is_tanh ? forward<float, true>(call, block) : forward<float, false>(call, block);
    }
}

void gelu_block_backward(const BiasGelu& call, const Block& block, float* sums) {
    if (call.is_bfloat16) {
        call.is_tanh ? backward<uint16_t, true>(call, block, sums)
                     : backward<uint16_t, false>(call, block, sums);
    } else {
        call.is_tanh ? backward<float, true>(call, block, sums)
                     : backward<float, false>(call, block, sums);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
