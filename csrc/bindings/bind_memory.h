// Blocks of the arena as DLPack capsules, which torch turns into tensors that give them back.
#pragma once

#include <pybind11/stl.h>

#include <vector>

#include "arena.h"
#include "bind.h"

namespace stellarator::bindings {

// DLPack's structures, version 0.8 (dmlc.github.io/dlpack), for the CPU.
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCpu = 1;
constexpr char kFresh[] = "dltensor";  // until somebody takes the tensor out of the capsule

struct Block {
    DLManagedTensor managed;
    std::vector<int64_t> shape;
};

inline void free_block(DLManagedTensor* managed) {
    Block* block = static_cast<Block*>(managed->context);
    arena_free(managed->tensor.data);
    delete block;
}

inline void end_capsule(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, kFresh)) return;
    free_block(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kFresh)));
}

// A dense tensor whose values are not set, or None: the arena has no room.
inline py::object empty(std::vector<int64_t> shape, int code, int bits) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    void* data = arena_allocate(count * bits / 8);
    if (data == nullptr) return py::none();
    Block* block = new Block{{}, std::move(shape)};
    DLTensor& tensor = block->managed.tensor;
    tensor.data = data;
    tensor.device_type = kCpu, tensor.device_id = 0;
    tensor.ndim = static_cast<int32_t>(block->shape.size());
    tensor.code = static_cast<uint8_t>(code), tensor.bits = static_cast<uint8_t>(bits);
    tensor.lanes = 1;
    tensor.shape = block->shape.data();
    tensor.strides = nullptr;  // row-major
    tensor.byte_offset = 0;
    block->managed.context = block;
    block->managed.deleter = &free_block;
    return py::reinterpret_steal<py::object>(PyCapsule_New(&block->managed, kFresh, &end_capsule));
}

inline void bind_memory(py::module_& m) {
    m.def("arena_empty", &empty, py::arg("shape"), py::arg("code"), py::arg("bits"));
    m.def("arena_state", [] {
        const ArenaState state = arena_state();
        return py::make_tuple(state.reserved, state.used, state.high, state.peak);
    });
    m.def("arena_reset_peak", &arena_reset_peak);
    m.def("arena_trim", &arena_trim);
}

}  // namespace stellarator::bindings
