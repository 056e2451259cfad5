// Layer normalisation of the rows of a matrix on a GPU, with the residual addition in front of it.
// Sums are float32, in an order that depends on the shape and the number of blocks alone.
#pragma once

#include <cstdint>

namespace stellarator {

constexpr int kWidestRow = 6144;

// Rows of a matrix: (N, C), float32 or bfloat16, elements of a row adjacent; null for none.
struct LayerNormRows {
    const void* data;
    int64_t stride;  // elements from one row to the next
};

struct LayerNormForward {
    LayerNormRows x, residual;
    const void *weight, *bias;  // (C,); bias may be null
    void* y;                    // (N, C), dense
    void* summed;               // x + residual, the same; null without a residual
    float *mean, *rstd;         // (N,)
    int64_t N;
    int C;
    float eps;
    bool is_bfloat16;
};

struct LayerNormBackward {
    LayerNormRows dy, dsummed, summed;  // dsummed may be null
    const void* weight;
    const float *mean, *rstd;
    void* dx;              // (N, C), dense
    void *dweight, *dbias;  // (C,); null if they are not needed
    float* partials;       // (blocks, 2, C): dweight and dbias of each block; null without dweight
    int64_t N, blocks;
    int C;
    bool is_bfloat16;
};

// `stream` is a cudaStream_t. Both throw std::runtime_error. C is at most kWidestRow.
void layer_norm_forward(const LayerNormForward& call, void* stream);
void layer_norm_backward(const LayerNormBackward& call, void* stream);

// Blocks of the backward on a GPU with so many multiprocessors: as many as run at once.
int64_t layer_norm_blocks(int64_t N, int C, int multiprocessors);

}  // namespace stellarator
