// Compiled once per instruction set. kLanes running sums, whatever the width of the registers, are
// what makes the order of the additions the same in all of them. The prefetch is worth a third of
// the time on one stream of reads (measured, docs/LOG.md).
#include "grad_norm.h"
#include "bfloat16.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kAheadBytes = 2048;
constexpr int64_t kLineBytes = 64;

template <typename Element>
double sum_range(const Element* __restrict x, int64_t begin, int64_t end) {
    double sums[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        const char* ahead = reinterpret_cast<const char*>(x + i) + kAheadBytes;
        for (int64_t byte = 0; byte < kLanes * int64_t{sizeof(Element)}; byte += kLineBytes) {
            __builtin_prefetch(ahead + byte);
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            const double value = widen(x[i + lane]);
            sums[lane] += value * value;
        }
    }
    for (int lane = 0; i < end; ++i, ++lane) {
        const double value = widen(x[i]);
        sums[lane] += value * value;
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}

}  // namespace

double squares_range(const void* x, bool is_bfloat16, int64_t begin, int64_t end) {
    if (is_bfloat16) return sum_range(static_cast<const uint16_t*>(x), begin, end);
    return sum_range(static_cast<const float*>(x), begin, end);
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
