// Elements that one instruction moves: 16 bytes of a lane at most.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace stellarator {

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

template <int kCount, typename T>
__device__ inline void store(T* address, const Vector<T, kCount>& vector) {
    static_assert(sizeof(T) * kCount <= 16, "one instruction");
    *reinterpret_cast<Vector<T, kCount>*>(address) = vector;
}

}  // namespace stellarator
