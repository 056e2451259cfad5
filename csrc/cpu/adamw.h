// AdamW over one flat range: one pass, in place.
#pragma once

#include <cstdint>

#include "isa.h"

namespace stellarator {

struct AdamW {
    float* weight;       // (n,) float32: the parameter, or its master copy
    uint16_t* rounded;   // (n,) bfloat16 copy of the master, written only; or null
    const void* grad;    // (n,) float32 or bfloat16
    float* exp_avg;      // (n,)
    float* exp_avg_sq;   // (n,)
    int64_t n;
    bool grad_is_bfloat16;
    float clip;             // multiplied into the gradient
    float beta1_rest;       // 1 - beta1
    float beta2;
    float beta2_rest;       // 1 - beta2
    float decay;            // 1 - lr * weight_decay
    float step_size;        // lr / (1 - beta1^step)
    float root_correction;  // (1 - beta2^step)^-1/2
    float eps;
};

// Updates elements [begin, end).
STELLARATOR_FOR_EACH_ISA(void adamw_range(const AdamW& update, int64_t begin, int64_t end))

// Updates all elements; the result does not depend on `threads` or `isa`.
void adamw(const AdamW& update, int threads, Isa isa);

}  // namespace stellarator
