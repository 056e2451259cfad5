// Which thread adds which element, and in which order, depends on nothing but the element's index:
// not on the GPU, not on where x lies in memory. Products of two floats are exact in float64.
#include "grad_norm.h"

#include "bfloat16.h"
#include "launch.h"
#include "vector.h"

namespace stellarator {
namespace {

constexpr int kWarp = 32;
constexpr int kSumThreads = 256;
constexpr int kTotalThreads = 1024;
constexpr int kLanes = 4;  // running sums of a thread, so that additions do not wait for each other

// The sum over the block, in its first thread: pairs within each warp, then the warps in order.
template <int kThreads>
__device__ double block_sum(double value) {
    __shared__ double warps[kThreads / kWarp];
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value += __shfl_down_sync(0xffffffffu, value, distance);
    }
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warps[warp];
    }
    return sum;
}

template <typename Element>
__global__ void __launch_bounds__(kSumThreads)
    squares_kernel(const Element* x, int64_t n, bool aligned, double weight, double* sums) {
    constexpr int kVector = kInVector<Element>;
    constexpr int64_t kStep = kSumThreads * kVector;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSquaresPerSum;
    const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kVector;
    double lanes[kLanes] = {};
    const auto add = [&lanes](int k, Element element) {
        const double value = widen(element);
        lanes[k % kLanes] += value * value;
    };
    if (aligned && begin + kSquaresPerSum <= n) {
#pragma unroll 8
        for (int64_t i = 0; i < kSquaresPerSum; i += kStep) {
            const Vector<Element, kVector> vector = load<kVector>(x + first + i);
#pragma unroll
            for (int k = 0; k < kVector; ++k) add(k, vector.x[k]);
        }
    } else {
        for (int64_t i = 0; i < kSquaresPerSum; i += kStep) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
                if (first + i + k < n) add(k, x[first + i + k]);
            }
        }
    }
    const double sum = block_sum<kSumThreads>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
    if (threadIdx.x == 0) sums[blockIdx.x] = weight * sum;
}

__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const double* sums, int64_t n, double* total) {
    double lanes[kLanes] = {};
    for (int64_t i = threadIdx.x; i < n; i += kTotalThreads * kLanes) {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
            const int64_t at = i + k * kTotalThreads;
            if (at < n) lanes[k] += sums[at];
        }
    }
    const double sum = block_sum<kTotalThreads>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
    if (threadIdx.x == 0) *total = sum;
}

template <typename Element>
void launch_squares(const void* x, int64_t n, double weight, double* sums, void* stream) {
    const int64_t blocks = (n + kSquaresPerSum - 1) / kSquaresPerSum;
    const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
    launch("grad_norm", squares_kernel<Element>, blocks, kSumThreads, stream,
           static_cast<const Element*>(x), n, aligned, weight, sums);
}

}  // namespace

void sums_of_squares(const void* x, bool is_bfloat16, int64_t n, double weight, double* sums,
                     void* stream) {
    if (n == 0) return;
    if (is_bfloat16) {
        launch_squares<uint16_t>(x, n, weight, sums, stream);
    } else {
        launch_squares<float>(x, n, weight, sums, stream);
    }
}

void total_of_sums(const double* sums, int64_t n, double* total, void* stream) {
    launch("grad_norm", total_kernel, 1, kTotalThreads, stream, sums, n, total);
}

}  // namespace stellarator
