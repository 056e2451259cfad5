// Vectors of the width of one instruction set, as GCC and Clang extend C++: arithmetic, comparisons
// and `condition ? a : b` work lane by lane. For files in per_isa/ only: everything is internal to
// the translation unit, as bfloat16.h says.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define STELLARATOR_LANES 16
#elif defined(__AVX2__)
#define STELLARATOR_LANES 8
#else
#define STELLARATOR_LANES 4
#endif

namespace {

constexpr int kLanes = STELLARATOR_LANES;

typedef float Floats __attribute__((vector_size(4 * STELLARATOR_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * STELLARATOR_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * STELLARATOR_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * STELLARATOR_LANES)));

inline Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

// bfloat16 is the upper half of a float. By hand, because GCC 12 widens in two halves.
inline Floats load(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Floats)((Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u*)from)) << 16);
#elif defined(__AVX2__)
    return (Floats)((Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u*)from)) << 16);
#else
    Halves x;
    memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
#endif
}

inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }

// Rounds to nearest, ties to even. A NaN stays one.
inline void store(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);  // also flushes subnormals to zero
    memcpy(to, &rounded, sizeof rounded);
#else
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits result = x == x ? rounded : (rounded & 0u) + 0x7fc0u;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i_u*)to, _mm512_cvtepi32_epi16((__m512i)result));
#elif defined(__AVX2__)
    const __m256i y = (__m256i)result;
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(y),
                                            _mm256_extracti128_si256(y, 1));
    _mm_storeu_si128((__m128i_u*)to, narrow);
#else
    const Halves narrow = __builtin_convertvector(result, Halves);
    memcpy(to, &narrow, sizeof narrow);
#endif
#endif
}

inline Floats all(float x) { return x - (Floats){}; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// 2^x with a relative error below 1.5e-7 for x from -126 to 127; 0 below, NaN for NaN.
// x = n + f with |f| <= 1/2; 2^f is a minimax polynomial, n goes to the exponent bits.
inline Floats exp2(Floats x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);
    Floats p = f * 1.53458081e-4f + 1.33999309e-3f;
    p = p * f + 9.61848907e-3f;
    p = p * f + 5.55032864e-2f;
    p = p * f + 2.40226462e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
    const Floats y = p * (Floats)power;
    return x < -126.0f ? (Floats){} : y;
}

// The sum of all lanes: halves of the vector are added until four lanes are left.
inline float sum(Floats x) {
#if defined(__AVX512F__)
    const __m256 half = _mm512_castps512_ps256((__m512)x) + _mm512_extractf32x8_ps((__m512)x, 1);
    const __m128 four = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif defined(__AVX2__)
    const __m128 four = _mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1);
#else
    const Floats four = x;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace
