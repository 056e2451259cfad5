// A block updates kTile elements: of each array every thread loads two vectors of four, both before
// it computes, so that enough bytes are under way. Compiled without contraction of a * b + c and
// with correctly rounded quotients and roots: the bits are those of the C++ for CPUs, which alone
// takes subnormal numbers for zero.
#include "adamw.h"

#include "bfloat16.h"
#include "launch.h"
#include "vector.h"

namespace stellarator {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int kVectors = 2;
constexpr int64_t kTile = kThreads * kVector * kVectors;
constexpr int kUnaligned = -1;

struct Factors {
    float clip, decay, step_size, root_correction;
};

__device__ inline Factors factors_of(const AdamW& u) {
    const float clip = u.clip != nullptr ? *u.clip : 1.0f;
    if (u.factors == nullptr) return {clip, u.decay, u.step_size, u.root_correction};
    return {clip, u.factors[0], u.factors[1], u.factors[2]};
}

// One element: new moments and weight in place.
__device__ inline void update_element(const AdamW& u, const Factors& f, float grad, float& w,
                                      float& m, float& v) {
    const float g = grad * f.clip;
    m = m + u.beta1_rest * (g - m);
    v = u.beta2 * v + u.beta2_rest * (g * g);
    w = w * f.decay - f.step_size * (m / (sqrtf(v) * f.root_correction + u.eps));
}

template <typename Grad, bool kHasMaster>
__device__ void update_whole_tile(const AdamW& u, const Factors& f, int64_t begin) {
    Vector<float, kVector> w[kVectors], m[kVectors], v[kVectors];
    Vector<Grad, kVector> g[kVectors];
    const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kVector;
    const Grad* grad = static_cast<const Grad*>(u.grad);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        const int64_t i = first + j * kThreads * kVector;
        g[j] = load<kVector>(grad + i);
        m[j] = load<kVector>(u.exp_avg + i);
        v[j] = load<kVector>(u.exp_avg_sq + i);
        w[j] = load<kVector>(u.weight + i);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        const int64_t i = first + j * kThreads * kVector;
        Vector<uint16_t, kVector> rounded;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            update_element(u, f, widen(g[j].x[k]), w[j].x[k], m[j].x[k], v[j].x[k]);
            if (kHasMaster) rounded.x[k] = round_to_bfloat16(w[j].x[k]);
        }
        store(u.exp_avg + i, m[j]);
        store(u.exp_avg_sq + i, v[j]);
        store(u.weight + i, w[j]);
        if (kHasMaster) store(u.rounded + i, rounded);
    }
}

template <typename Grad, bool kHasMaster>
__device__ void update_elements(const AdamW& u, const Factors& f, int64_t begin, int64_t end) {
    const Grad* grad = static_cast<const Grad*>(u.grad);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        update_element(u, f, widen(grad[i]), u.weight[i], u.exp_avg[i], u.exp_avg_sq[i]);
        if (kHasMaster) u.rounded[i] = round_to_bfloat16(u.weight[i]);
    }
}

// `shift`: the first tile begins so many elements before the arrays, where vectors are aligned.
template <typename Grad, bool kHasMaster>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const AdamW u, int shift) {
    const Factors f = factors_of(u);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile - (shift > 0 ? shift : 0);
    const int64_t end = begin + kTile;
    if (shift != kUnaligned && begin >= 0 && end <= u.n) {
        update_whole_tile<Grad, kHasMaster>(u, f, begin);
    } else {
        update_elements<Grad, kHasMaster>(u, f, begin < 0 ? 0 : begin, end < u.n ? end : u.n);
    }
}

// Elements by which an array begins behind the place of a vector.
template <typename T>
int shift_of(const T* array) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(array) / sizeof(T) % kVector);
}

// That of all arrays, or kUnaligned if they differ.
template <typename Grad, bool kHasMaster>
int common_shift(const AdamW& u) {
    const int shift = shift_of(u.weight);
    const bool same = shift_of(u.exp_avg) == shift && shift_of(u.exp_avg_sq) == shift &&
                      shift_of(static_cast<const Grad*>(u.grad)) == shift &&
                      (!kHasMaster || shift_of(u.rounded) == shift);
    return same ? shift : kUnaligned;
}

template <typename Grad, bool kHasMaster>
void launch_update(const AdamW& u, void* stream) {
    const int shift = common_shift<Grad, kHasMaster>(u);
    const int64_t blocks = (u.n + (shift > 0 ? shift : 0) + kTile - 1) / kTile;
    launch("adamw_", adamw_kernel<Grad, kHasMaster>, blocks, kThreads, stream, u, shift);
}

}  // namespace

void adamw(const AdamW& u, void* stream) {
    if (u.n == 0) return;
    if (u.grad_is_bfloat16) {
        u.rounded != nullptr ? launch_update<uint16_t, true>(u, stream)
                             : launch_update<uint16_t, false>(u, stream);
    } else {
        u.rounded != nullptr ? launch_update<float, true>(u, stream)
                             : launch_update<float, false>(u, stream);
    }
}

}  // namespace stellarator
