// Tensors cross as addresses.
#pragma once

#include <cstdint>

namespace stellarator {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace stellarator
