// Compiled once per instruction set, with STELLARATOR_ISA naming it; the compiler vectorizes the
// inner loop. Additions, products, quotients and roots are correctly rounded in all of them and
// nothing is contracted, so every instruction set gives the same bits.
//
// Memory is the limit. Two things help beyond the single pass (measured, docs/LOG.md): prefetching
// further ahead than the hardware does, and writing the bfloat16 copy, which nobody reads soon,
// past the caches, so that its lines are not fetched first.
#include "adamw.h"
#include "bfloat16.h"

#include <math.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kLine = 16;       // floats per cache line
constexpr int64_t kAhead = 512;     // floats
constexpr int64_t kStream = 1 << 20;  // elements from which the bfloat16 copy outgrows the L2

// Updates `count` elements; `rounded` may be null.
template <typename Grad, bool kHasMaster>
inline __attribute__((always_inline)) void update_elements(
    const AdamW& u, int64_t count, float* __restrict weight, uint16_t* __restrict rounded,
    const Grad* __restrict grad, float* __restrict exp_avg, float* __restrict exp_avg_sq) {
    const float clip = u.clip, beta1_rest = u.beta1_rest, eps = u.eps;
    const float beta2 = u.beta2, beta2_rest = u.beta2_rest;
    const float decay = u.decay, step_size = u.step_size, root_correction = u.root_correction;
    for (int64_t i = 0; i < count; ++i) {
        const float g = widen(grad[i]) * clip;
        const float m = exp_avg[i] + beta1_rest * (g - exp_avg[i]);
        const float v = beta2 * exp_avg_sq[i] + beta2_rest * (g * g);
        const float w = weight[i] * decay - step_size * (m / (sqrtf(v) * root_correction + eps));
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        weight[i] = w;
        if (kHasMaster) rounded[i] = round_to_bfloat16(w);
    }
}

// Copies one chunk past the caches; `to` is aligned to 16 bytes.
inline void stream_chunk(uint16_t* to, const uint16_t* from) {
#if defined(__SSE2__)
    for (int64_t i = 0; i < kChunk; i += 8) {
        const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), part);
    }
#else
    memcpy(to, from, kChunk * sizeof(uint16_t));
#endif
}

template <typename Grad, bool kHasMaster, bool kStreams>
void update_range(const AdamW& u, int64_t begin, int64_t end) {
    const Grad* grad = static_cast<const Grad*>(u.grad);
    alignas(64) uint16_t chunk[kChunk];
    int64_t i = begin;
    for (; i + kChunk <= end; i += kChunk) {
        for (int64_t ahead = i + kAhead; ahead < i + kAhead + kChunk; ahead += kLine) {
            __builtin_prefetch(u.weight + ahead, 1);
            __builtin_prefetch(u.exp_avg + ahead, 1);
            __builtin_prefetch(u.exp_avg_sq + ahead, 1);
            __builtin_prefetch(grad + ahead, 0);
        }
        uint16_t* rounded = kStreams ? chunk : kHasMaster ? u.rounded + i : nullptr;
        update_elements<Grad, kHasMaster>(u, kChunk, u.weight + i, rounded, grad + i,
                                          u.exp_avg + i, u.exp_avg_sq + i);
        if (kStreams) stream_chunk(u.rounded + i, chunk);
    }
    update_elements<Grad, kHasMaster>(u, end - i, u.weight + i,
                                      kHasMaster ? u.rounded + i : nullptr, grad + i,
                                      u.exp_avg + i, u.exp_avg_sq + i);
#if defined(__SSE2__)
    if (kStreams) _mm_sfence();
#endif
}

template <typename Grad>
void update_with(const AdamW& u, int64_t begin, int64_t end) {
    if (u.rounded == nullptr) {
        update_range<Grad, false, false>(u, begin, end);
    } else if (u.n >= kStream && reinterpret_cast<uintptr_t>(u.rounded + begin) % 16 == 0) {
        update_range<Grad, true, true>(u, begin, end);
    } else {
        update_range<Grad, true, false>(u, begin, end);
    }
}

}  // namespace

void adamw_range(const AdamW& u, int64_t begin, int64_t end) {
    if (u.grad_is_bfloat16) {
        update_with<uint16_t>(u, begin, end);
    } else {
        update_with<float>(u, begin, end);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
