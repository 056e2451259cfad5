// Elements that one instruction moves: 16 bytes of a lane at most.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace stellarator {

// Elements of 16 bytes.
template <typename Element>
constexpr int kInVector = 16 / sizeof(Element);

// Whether all rows, `stride` elements of so many bytes apart, begin where vectors do.
inline bool rows_aligned(const void* data, int64_t stride, int bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0;
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
    T x[kCount];
};

// `address` is a multiple of the size of the vector.
template <int kCount, typename T>
__device__ inline Vector<T, kCount> load(const T* address) {
    static_assert(sizeof(T) * kCount <= 16, "one instruction");
    return *reinterpret_cast<const Vector<T, kCount>*>(address);
}

__device__ inline void store(float* address, const Vector<float, 4>& vector) {
    *reinterpret_cast<Vector<float, 4>*>(address) = vector;
}

__device__ inline void store(uint32_t* address, const Vector<uint32_t, 4>& vector) {
    *reinterpret_cast<Vector<uint32_t, 4>*>(address) = vector;
}

// As one number: a structure of several the compiler stores piece by piece (seen, nvcc 13.0).
__device__ inline void store(uint16_t* address, const Vector<uint16_t, 4>& vector) {
    const uint32_t low = vector.x[0] | static_cast<uint32_t>(vector.x[1]) << 16;
    const uint32_t high = vector.x[2] | static_cast<uint32_t>(vector.x[3]) << 16;
    *reinterpret_cast<uint64_t*>(address) = low | static_cast<uint64_t>(high) << 32;
}

__device__ inline void store(uint16_t* address, const Vector<uint16_t, 8>& vector) {
    Vector<uint32_t, 4> pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        pairs.x[i] = vector.x[2 * i] | static_cast<uint32_t>(vector.x[2 * i + 1]) << 16;
    }
    store(reinterpret_cast<uint32_t*>(address), pairs);
}

}  // namespace stellarator
