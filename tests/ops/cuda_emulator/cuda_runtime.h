// Stands in for CUDA's header, so that a C++ compiler makes code for the CPU of csrc/cuda/*.cu as
// they are, launches included. For tests only.
//
// The threads of a block are fibers of one thread of the machine: each runs until it comes to a
// barrier (__syncthreads, or a shuffle: one of its warp) or ends, then the next of its warp. A warp
// runs until it can only wait for the block, then the next. Blocks run one after the other. Threads
// and blocks go forwards in some launches, backwards in others, so what depends on an order shows.
// What is __shared__ is NaN before every block. Barriers that not all threads reach, and warps
// whose threads shuffle in different places, end the process.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 1 << 16;
enum class Wait { nothing, block, warp, end };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    Wait wait = Wait::nothing;
    const void* place = nullptr;  // the shuffle that it waits in
    uint64_t sent = 0;            // and what it hands out there
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline int launches = 0;

[[noreturn]] inline void stop(const char* what) {
    std::fprintf(stderr, "cuda_emulator: %s\n", what);
    std::abort();
}

inline void run_fiber() {
    (*body)();
    current->wait = Wait::end;
    swapcontext(&current->context, &scheduler);
}

inline void wait_for(Wait what) {
    current->wait = what;
    swapcontext(&current->context, &scheduler);
}

// Whether fibers [begin, end) all wait for `what`; then they go on.
inline bool release(unsigned begin, unsigned end, Wait what) {
    for (unsigned i = begin; i < end; ++i) {
        if (fibers[i].wait != what) return false;
        if (what == Wait::warp && fibers[i].place != fibers[begin].place) {
            stop("the threads of a warp shuffle in different places");
        }
    }
    for (unsigned i = begin; i < end; ++i) fibers[i].wait = Wait::nothing;
    return true;
}

// Those of fibers [begin, end) that wait for nothing, until they do.
inline void run_lanes(unsigned begin, unsigned end, bool forwards) {
    for (unsigned k = begin; k < end; ++k) {
        const unsigned i = forwards ? k : end - 1 - (k - begin);
        if (fibers[i].wait != Wait::nothing) continue;
        current = &fibers[i];
        threadIdx = dim3(i, 0, 0);
        swapcontext(&scheduler, &current->context);
    }
}

inline void run_block(unsigned threads, bool forwards) {
    if (__start_emulated_shared != nullptr) {
        const size_t bytes = __stop_emulated_shared - __start_emulated_shared;
        std::memset(__start_emulated_shared, 0xff, bytes);
    }
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.wait = Wait::nothing;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (;;) {
        unsigned ended = 0;
        for (unsigned k = 0; k < warps; ++k) {
            const unsigned begin = (forwards ? k : warps - 1 - k) * kWarp;
            const unsigned end = begin + kWarp < threads ? begin + kWarp : threads;
            do {
                run_lanes(begin, end, forwards);
            } while (release(begin, end, Wait::warp));
            for (unsigned i = begin; i < end; ++i) ended += fibers[i].wait == Wait::end;
        }
        if (ended == threads) return;
        if (!release(0, threads, Wait::block)) stop("a barrier that not all threads reach");
    }
}

// Every thread of the warp gives `value`; this one gets what `lane` gave.
template <typename T>
T exchange(T value, unsigned lane, const void* place) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Fiber* own = current;
    const unsigned base = threadIdx.x / kWarp * kWarp;
    std::memcpy(&own->sent, &value, sizeof(T));
    own->place = place;
    wait_for(Wait::warp);
    T got;
    std::memcpy(&got, &fibers[base + lane].sent, sizeof(T));
    wait_for(Wait::warp);  // until everybody has read
    return got;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait_for(emulator::Wait::block); }

// As on a GPU, a lane beyond the warp gives a thread its own value.
template <typename T>
__attribute__((noinline)) T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
    if (mask != 0xffffffffu) emulator::stop("a shuffle of a part of a warp");
    const unsigned lane = threadIdx.x % emulator::kWarp, from = lane + distance;
    return emulator::exchange(value, from < emulator::kWarp ? from : lane,
                              __builtin_return_address(0));
}

template <typename T>
__attribute__((noinline)) T __shfl_sync(unsigned mask, T value, unsigned lane) {
    if (mask != 0xffffffffu) emulator::stop("a shuffle of a part of a warp");
    return emulator::exchange(value, lane, __builtin_return_address(0));
}

template <typename T>
__attribute__((noinline)) T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
    if (mask != 0xffffffffu) emulator::stop("a shuffle of a part of a warp");
    const unsigned lane = threadIdx.x % emulator::kWarp;
    return emulator::exchange(value, lane ^ distance, __builtin_return_address(0));
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Whether a bug is the one that the tests have planted in this process.
inline bool planted(int bug) {
    static const char* name = std::getenv("PLANTED_BUG");
    static const int chosen = name != nullptr ? std::atoi(name) : 0;
    return chosen == bug;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
    if (blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
    const std::function<void()> call = [&] { kernel(static_cast<Parameters>(arguments)...); };
    emulator::body = &call;
    gridDim = config->gridDim, blockDim = config->blockDim;
    // Two launches after two others go the other way.
    const int number = emulator::launches++;
    const bool forwards = ((number ^ number >> 1) & 1) == 0;
    for (unsigned k = 0; k < blocks; ++k) {
        blockIdx = dim3(forwards ? k : blocks - 1 - k, 0, 0);
        emulator::run_block(threads, forwards);
    }
    return cudaSuccess;
}
