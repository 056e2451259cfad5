// Compiled once per instruction set.
#include "rope.h"

#include "columns.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

// All heads of one token; its cosines and sines stay in the nearest cache meanwhile.
template <typename Element>
void rotate(const TokenHeads& heads, int64_t token, int64_t half, const float* cos,
            const float* sin, float sign) {
    const Element* from = static_cast<const Element*>(heads.from) + token * heads.token_stride;
    Element* to = static_cast<Element*>(heads.to) + token * heads.to_token_stride;
    for (int64_t head = 0; head < heads.count; ++head) {
        for_columns(0, half, [&](int64_t i, auto part) {
            const Floats c = load(cos + i, part), s = load(sin + i, part) * sign;
            const Floats first = load(from + i, part), second = load(from + half + i, part);
            store(to + i, first * c - second * s, part);
            store(to + half + i, second * c + first * s, part);
        });
        from += heads.head_stride;
        to += heads.to_head_stride;
    }
}

template <typename Element>
void rotate(const Rope& call, int64_t begin, int64_t end) {
    const int64_t half = call.D / 2;
    const float sign = call.conjugate ? -1.0f : 1.0f;
    for (int64_t token = begin; token < end; ++token) {
        const float *cos = call.cos + token * half, *sin = call.sin + token * half;
        rotate<Element>(call.q, token, half, cos, sin, sign);
        rotate<Element>(call.k, token, half, cos, sin, sign);
    }
}

}  // namespace

void rotate_tokens(const Rope& call, int64_t begin, int64_t end) {
    if (call.is_bfloat16) {
        rotate<uint16_t>(call, begin, end);
    } else {
        rotate<float>(call, begin, end);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
