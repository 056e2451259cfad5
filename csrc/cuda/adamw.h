// AdamW over one flat range on a GPU: one launch, in place.
#pragma once

#include <cstdint>

namespace stellarator {

struct AdamW {
    float* weight;          // (n,) float32: the parameter, or its master copy
    uint16_t* rounded;      // (n,) bfloat16 copy of the master, written only; or null
    const void* grad;       // (n,) float32 or bfloat16
    float* exp_avg;         // (n,)
    float* exp_avg_sq;      // (n,)
    const float* clip;      // () multiplied into the gradient, in the memory of the GPU; or null
    const float* factors;   // (3,) decay, step_size, root_correction, there too; or null
    int64_t n;
    bool grad_is_bfloat16;
    float decay;            // 1 - lr * weight_decay; this and the next two: without `factors`
    float step_size;        // lr / (1 - beta1^step)
    float root_correction;  // (1 - beta2^step)^-1/2
    float beta1_rest;       // 1 - beta1
    float beta2;
    float beta2_rest;       // 1 - beta2
    float eps;
};

// Updates all elements on a stream (a cudaStream_t). Throws std::runtime_error.
void adamw(const AdamW& update, void* stream);

}  // namespace stellarator
