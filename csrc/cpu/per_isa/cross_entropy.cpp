// Compiled once per instruction set. A row is read for its maximum, for the sum of its exponentials
// and for its gradient; the second and third time it comes from the cache.
#include "cross_entropy.h"

#include <math.h>

#include "columns.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int kSums = 4;  // running results side by side, so that none waits for the one before

template <typename Element>
float largest_of(const Element* row, int64_t V) {
    Floats top[kSums];
    for (int i = 0; i < kSums; ++i) top[i] = all(-INFINITY);
    int64_t c = 0;
    for (; c + kSums * kLanes <= V; c += kSums * kLanes) {
        for (int i = 0; i < kSums; ++i) top[i] = maximum(load(row + c + i * kLanes), top[i]);
    }
    for (; c + kLanes <= V; c += kLanes) top[0] = maximum(load(row + c), top[0]);
    if (c < V) top[1] = maximum(load(row + c, Part{V - c}, -INFINITY), top[1]);
    float largest = -INFINITY;
    for (int i = 0; i < kSums; ++i) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (top[i][lane] > largest) largest = top[i][lane];
        }
    }
    return largest;
}

template <typename Element>
float sum_of_exponentials(const Element* row, int64_t V, float largest) {
    Floats sums[kSums] = {};
    int64_t c = 0;
    for (; c + kSums * kLanes <= V; c += kSums * kLanes) {
        for (int i = 0; i < kSums; ++i) {
            sums[i] += exp2((load(row + c + i * kLanes) - largest) * kLog2E);
        }
    }
    for (; c + kLanes <= V; c += kLanes) sums[0] += exp2((load(row + c) - largest) * kLog2E);
    if (c < V) sums[1] += exp2((load(row + c, Part{V - c}, -INFINITY) - largest) * kLog2E);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// gradient = factor * exp(row - shift - total), less `dloss` at the target. lse is shift + total;
// their sum is rounded to the last bit of the largest logit, so they are subtracted one by one.
template <typename Element>
void write_gradient(const Element* row, int64_t V, float shift, float total, float factor,
                    float dloss, int64_t target, Element* gradient) {
    const auto scaled = [=](Floats logits) {
        return factor * exp2(((logits - shift) - total) * kLog2E);
    };
    const float at_target = scaled(load(row + target, Part{1}))[0];
    for_columns(0, V, [&](int64_t c, auto part) {
        store(gradient + c, scaled(load(row + c, part)), part);
    });
    store(gradient + target, all(at_target - dloss), Part{1});
}

template <typename Element>
void rows(const CrossEntropy& call, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        const Element* row = static_cast<const Element*>(call.logits) + n * call.stride;
        Element* gradient = static_cast<Element*>(call.gradient) + n * call.gradient_stride;
        const int64_t target = call.targets[n];
        const bool counts = target != call.ignore_index;
        float shift = 0.0f, total = 0.0f, lse = 0.0f;
        if (call.forward) {
            const float largest = largest_of(row, call.V);
            shift = largest == -INFINITY ? 0.0f : largest;
            total = logf(sum_of_exponentials(row, call.V, shift));
            lse = call.lse[n] = total + shift;
            call.loss[n] = 0.0f;
            if (counts) {
                const float picked = load(row + target, Part{1})[0];
                call.loss[n] = (total - (picked - shift)) + call.z_loss * lse * lse;
            }
        } else {
            lse = shift = call.lse[n];
        }
        if (call.dloss == nullptr) continue;
        if (!counts) {
            memset(gradient, 0, call.V * sizeof(Element));
            continue;
        }
        const float dloss = call.dloss[n * call.dloss_stride];
        const float factor = dloss * (1.0f + 2.0f * call.z_loss * lse);
        write_gradient(row, call.V, shift, total, factor, dloss, target, gradient);
    }
}

}  // namespace

void cross_entropy_rows(const CrossEntropy& call, int64_t begin, int64_t end) {
    if (call.is_bfloat16) {
        rows<uint16_t>(call, begin, end);
    } else {
        rows<float>(call, begin, end);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
