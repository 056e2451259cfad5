// Gradient of an embedding on a GPU: sums of rows by their ids, in float32 and in an order that
// depends on the ids alone.
#pragma once

#include <cstdint>

namespace stellarator {

constexpr int kRowsOfChunk = 32;

struct EmbeddingBackward {
    const void* dy;        // (N, C) float32 or bfloat16, elements of a row adjacent
    int64_t stride;        // elements from one row to the next
    const int64_t* ids;    // (N,) ascending, none below zero
    const int64_t* order;  // (N,) the row of dy that each of them belongs to
    void* sums;            // (V, C) dense: float32, or bfloat16 where dy is
    float* parts;          // (chunks of kRowsOfChunk ids, 2, C)
    int64_t N;
    int C;
    bool is_bfloat16, sums_are_bfloat16;
    bool add;  // to what is in `sums`; else rows of ids that occur are written
};

// `stream` is a cudaStream_t. Throws std::runtime_error.
void embedding_backward(const EmbeddingBackward& call, void* stream);

}  // namespace stellarator
