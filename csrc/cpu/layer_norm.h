// Layer normalisation of rows, after the addition of a residual; forward and backward.
//
// A row is read from memory once and written once; in between it stays in the nearest caches. Rows
// are normalised alone and gradients of parameters added by fixed blocks (column_sums.h), so the
// number of threads changes no bit.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace stellarator {

constexpr int64_t kNormWidth = 8192;  // widest row

// The names are those of stellarator_kernels/layer_norm.py. Results are contiguous.
struct LayerNormForward {
    bool is_bfloat16;
    int64_t N, C;
    float eps;
    Rows x, residual;             // (N, C); residual: or null
    const void *weight, *bias;    // (C,); bias: or null
    void *y, *summed;             // (N, C); summed: null without a residual
    float *mean, *rstd;           // (N,)
};

struct LayerNormBackward {
    bool is_bfloat16;
    int64_t N, C;
    Rows dy, dsummed, summed;     // (N, C); dsummed: or null
    const void* weight;           // (C,)
    const float *mean, *rstd;     // (N,)
    void* dx;                     // (N, C)
    void *dweight, *dbias;        // (C,), each or null
    float* sums;                  // workspace (blocks_of_rows(N), 2, C), null without the two
};

void layer_norm_forward(const LayerNormForward& call, int threads, Isa isa);
void layer_norm_backward(const LayerNormBackward& call, int threads, Isa isa);

// Rows [begin, end), compiled per instruction set.
STELLARATOR_FOR_EACH_ISA(void normalise_rows(const LayerNormForward& call, int64_t begin,
                                             int64_t end))
// `sums` (2, C): those of dweight and dbias of these rows; or null.
STELLARATOR_FOR_EACH_ISA(void normalise_rows_backward(const LayerNormBackward& call, int64_t begin,
                                                      int64_t end, float* sums))

}  // namespace stellarator
