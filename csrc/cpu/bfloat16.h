// bfloat16 as the upper half of a float.
//
// Only plain functions of this translation unit: files in per_isa/ are compiled for several
// instruction sets, and an inline function with external linkage could be taken from the AVX-512
// object by code that must run without it.
#pragma once

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float widen(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }
static inline float widen(float value) { return value; }

// Round to nearest, ties to even; NaN becomes 0x7fc0. Not vcvtneps2bf16, which flushes subnormals.
static inline uint16_t round_to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
