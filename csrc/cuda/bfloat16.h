// bfloat16 as the upper half of a float, with the bits that the C++ for CPUs gives.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace stellarator {

__device__ inline float widen(uint16_t value) {
    return __uint_as_float(static_cast<uint32_t>(value) << 16);
}
__device__ inline float widen(float value) { return value; }

// Round to nearest, ties to even; NaN becomes 0x7fc0 (the instruction would make it 0x7fff).
__device__ inline uint16_t round_to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

template <typename Element>
__device__ inline Element narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
    return value;
}
template <>
__device__ inline uint16_t narrow<uint16_t>(float value) {
    return round_to_bfloat16(value);
}

}  // namespace stellarator
